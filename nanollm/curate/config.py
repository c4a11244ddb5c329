"""Options of `nanollm curate`. They are read without datatrove, so that --help needs no extra package."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanollm.config import check_at_least, check_seed
from nanollm.data.prepare import PrepareConfig

MAX_TASKS = 99_999  # their folders and lists have five digits


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a document must be like to stay. The rules are for English."""

    gopher_repetition: bool = True
    """Drop documents with repeated lines, paragraphs or n-grams."""
    gopher_quality: bool = True
    """Drop documents with too few or over 100,000 words, too short or too long words, too many symbols, or fewer than 2
    stop words."""
    min_words: int = 50
    """Minimum number of words in a document, for gopher_quality."""
    min_letters: float = 0.8
    """Minimum share of words that contain a letter, for gopher_quality. Punctuation marks count as words, so text with
    code or tables needs less, such as 0.6."""
    c4: bool = False
    """Drop documents with a curly bracket or "lorem ipsum"; remove citation marks and lines of fewer than 3 words, with
    a word over 1,000 characters, or about cookies, privacy, terms of use or Javascript; then drop what has fewer than 5
    sentences. The only filter that changes documents."""
    language: str | None = None
    """Keep only this language, such as en; null: all. Needs fastText, whose model (126 MB) is downloaded once."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "min_words", prefix="filters.")
        if not 0 < self.min_letters <= 1:
            raise ValueError(f"filters.min_letters must be above 0 and at most 1, got {self.min_letters}")


@dataclass(frozen=True, kw_only=True)
class EvalsConfig:
    """Which evaluations' questions no document may hold."""

    enabled: bool = True
    """Drop documents that share 13 consecutive words with an evaluation question."""
    input: list[str] = field(default_factory=list)
    """Files with questions, or folders, of which the files with `test` in their names are taken; none: GSM8K's test,
    from the hub."""
    column: str = "question"
    """Column (.jsonl key) that holds the question."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """For --executor slurm. Further settings of sbatch go into its environment variables, such as SBATCH_QOS."""

    partition: str | None = None
    """Partition to submit to; required."""
    time: str = "24:00:00"
    """Time limit of a task."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Turn web text into token files: filtered, deduplicated and decontaminated.

    Needs `pip install -e ".[data]"`. Stopped at any moment, the same command goes on: a task that is done is not done
    again. All machines see save_dir and local inputs under the same paths.
    """

    tokenizer_path: Path
    """The .model file of the tokenizer, or the folder that holds it."""
    save_dir: Path
    """Folder to fill."""
    input: list[str]
    """Files or folders (.txt, .jsonl, .csv, .parquet, each also .gz or .zst), or addresses such as
    hf://datasets/OWNER/NAME/FOLDER and s3://BUCKET/FOLDER, also with *."""
    text_column: str = "text"
    """Column (.jsonl key) that holds the text."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """What runs the tasks: local processes, Slurm, or Ray (the cluster at $RAY_ADDRESS; if unset, one is started on
    this machine)."""
    tasks: int = 1
    """Number of parts that the input is split into: by whole files if there are enough; otherwise each task reads
    everything and takes every N-th document."""
    workers: int = 1
    """Tasks that run at once."""
    mem_gb: int = 4
    """Memory to request from Slurm or Ray per task, in GB."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """What a document must be like to stay."""
    dedup: bool = True
    """Keep one of several documents that share about 72 % or more of their 5-word n-grams (MinHash)."""
    evals: EvalsConfig = field(default_factory=EvalsConfig)
    """Which evaluations' questions no document may hold."""
    val_fraction: float = 0.0005
    """Share of the documents that becomes val, drawn by a hash of the text."""
    seed: int = 0
    """Random seed of the split into train and val."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """For --executor slurm."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("curate needs --input FILE_OR_FOLDER_OR_ADDRESS ...")
        for name in ("tasks", "workers", "mem_gb"):
            if not 1 <= getattr(self, name) <= MAX_TASKS:
                raise ValueError(f"--{name} must be from 1 to {MAX_TASKS:,}, got {getattr(self, name):,}")
        if self.executor == "slurm" and not self.slurm.partition:
            raise ValueError("--executor slurm needs --slurm.partition NAME")
        _ = self.prepare  # which checks its values
        check_seed(self.seed)

    @property
    def prepare(self) -> PrepareConfig:
        return PrepareConfig(kind="text", seed=self.seed, val_fraction=self.val_fraction)
