"""How does text of the web become token files that are worth training on, on one machine or on a cluster?

datatrove runs the steps, each in many tasks: read and filter; find near duplicates by MinHash; drop them, and what
holds a question of an evaluation; tokenise. Each task of the last step prepares one part of the folder (data/merge.py).
What was removed is listed in curation/ beside the token files, and counted in curation.json.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanollm import __version__, durable
from nanollm.config import check_seed
from nanollm.data.executors import RayConfig, SlurmConfig, Step, run_here, submit
from nanollm.data.merge import finish_merge, is_merged, merge, missing
from nanollm.data.prepare import Rules, header_of, refuse_other
from nanollm.data.shards import read_manifest
from nanollm.evals.contamination import NGRAM_WORDS
from nanollm.extras import missing_package
from nanollm.progress import say
from nanollm.sources import gsm8k
from nanollm.sources.files import BadRecord, File, find_files, read_texts
from nanollm.sources.remote import find_everywhere, size_of
from nanollm.stages.preprocess import MAX_PARTS, summary
from nanollm.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

if TYPE_CHECKING:
    from nanollm.data.blocks import Workplace

DEDUP_WORDS, DEDUP_HASHES = 5, 8
"""Words in a row that are compared; hashes of them that must agree in a bucket."""
LANGUAGE_SCORE = 0.65
"""The least probability of a language that is kept."""
FASTTEXT_MODEL = "https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.bin"


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a document must be like to stay. The rules are for English."""

    gopher_repetition: bool = True
    """Drop what repeats lines, paragraphs or words in a row."""
    gopher_quality: bool = True
    """Drop what has too few or too many words, words too short or long, too many symbols, or no common words."""
    min_words: int = 50
    """Fewest words of a document, for gopher_quality."""
    max_words: int = 100_000
    """Most words of a document, for gopher_quality."""
    min_letters: float = 0.8
    """Least share of the words of a document that have a letter in them, for gopher_quality; marks are words, too, so
    that text with code or tables asks for less, such as 0.6."""
    c4: bool = False
    """Drop what has a curly bracket, "lorem ipsum" or fewer than 5 sentences, and take lines of fewer than 3 words and
    about cookies or Javascript out of the others: the one filter that changes documents."""
    language: str | None = None
    """Keep this language only, such as en; null: all. Needs filters.language_model."""
    language_model: Path | None = None
    """A fastText model that tells languages, such as lid.176.bin."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                f"filters.min_words must be from 1 to filters.max_words, got {self.min_words} and {self.max_words}"
            )
        if not 0 < self.min_letters <= 1:
            raise ValueError(f"filters.min_letters must be above 0 and at most 1, got {self.min_letters}")
        if self.language and self.language_model is None:
            raise ValueError(
                f"filters.language needs filters.language_model FILE; fastText's is at {FASTTEXT_MODEL} (126 MB)"
            )


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which documents are near duplicates: MinHash, of each cluster one document stays."""

    enabled: bool = True
    """Drop near and exact duplicates."""
    buckets: int = 14
    """Chances to be found alike; with 14, documents that share about (1/14)^(1/8) = 72 % are found."""

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise ValueError(f"dedup.buckets must be at least 1, got {self.buckets}")


@dataclass(frozen=True, kw_only=True)
class EvalsConfig:
    """Which evaluations' questions no document may hold."""

    enabled: bool = True
    """Drop documents that have 13 words in a row in common with a question."""
    input: list[str] = field(default_factory=list)
    """Files with questions, or folders, of which the files with `test` in their names are taken; none: GSM8K's test,
    from the hub."""
    column: str = "question"
    """Column (.jsonl key) that holds the question."""

    def __post_init__(self) -> None:
        if not self.column:
            raise ValueError("evals.column must be a name, got an empty text")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Turn text of the web into token files: filtered, without duplicates, without questions of evaluations.

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
    """Who runs the tasks: processes of this machine, Slurm, or Ray."""
    tasks: int = 1
    """Shares of the input, each of them one part of the result: whole files if there are enough, otherwise each task
    reads everything and takes every N-th document."""
    workers: int = 1
    """Tasks at once."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """What a document must be like to stay."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Which documents are near duplicates."""
    evals: EvalsConfig = field(default_factory=EvalsConfig)
    """Which evaluations' questions no document may hold."""
    val_fraction: float = 0.0005
    """Share of the documents that becomes val, drawn by a hash of the text."""
    seed: int = 0
    """Of the draw between train and val."""
    shard_tokens: int = 100_000_000
    """A file is closed after the document that brings it to this many tokens (2 bytes each)."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """For --executor slurm."""
    ray: RayConfig = field(default_factory=RayConfig)
    """For --executor ray."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("curate needs --input FILE_OR_FOLDER_OR_ADDRESS ...")
        for name in ("tasks", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) > MAX_PARTS:
                raise ValueError(f"--{name} must be at most {MAX_PARTS:,}, got {getattr(self, name):,}")
        if not self.text_column:
            raise ValueError("text_column must be a name, got an empty text")
        if self.executor == "slurm" and not self.slurm.partition:
            raise ValueError("--executor slurm needs --slurm.partition NAME")
        self.rules()  # which checks them
        check_seed(self.seed)

    def rules(self) -> Rules:
        return Rules(kind="text", seed=self.seed, val_fraction=self.val_fraction, shard_tokens=self.shard_tokens)


@dataclass(frozen=True)
class Job:
    """What is curated into what."""

    config: Config
    tokenizer: Tokenizer
    files: list[File]
    header: dict[str, Any]
    """Of the finished folder's manifest, and what decides all that is in it."""
    questions: list[dict[str, str]]
    place: "Workplace"

    @property
    def save_dir(self) -> Path:
        return self.config.save_dir


def plan(c: Config) -> str:
    """What would be done."""
    job = open_job(c)
    size = sum(map(size_of, job.files))
    questions = f", {len(job.questions):,} questions to be left out" if c.evals.enabled else ""
    tasks = ", ".join(f"{step.name} ({step.tasks} tasks)" for step in steps(job))
    return f"{len(job.files):,} files of {size:,} bytes{questions}; {tasks}; by {c.executor}, into {c.save_dir}"


def run(c: Config) -> Path | None:
    """Curate the folder, or go on, and say what is in it; None: Slurm has it now."""
    job = open_job(c)
    from nanollm.data.curated import lines

    durable.check_writable(c.save_dir, "--save_dir")
    with durable.lock_folder(job.place.folder):
        if not is_merged(c.save_dir):
            begin(job)
            if c.executor == "slurm":
                submit_all(job)
                return None
            run_here(steps(job), c.workers, job.place.logs, c.executor, c.ray)
            finish(job)
        else:
            refuse_other(c.save_dir, read_manifest(c.save_dir)[0], job.header)
            say(f"{c.save_dir} is already prepared with these settings; nothing to do")
        clean_up(job)
    manifest = read_manifest(c.save_dir)[0]
    for line in [*lines(manifest["curation"]), *summary(manifest, c.save_dir)]:
        say(line)
    say(f"what was removed is listed in {job.place.folder}")
    return c.save_dir


def open_job(c: Config) -> Job:
    """Everything that can be found missing or wrong before the work begins."""
    for package in ["datatrove", "regex", "tokenizers"] + ["ray"] * (c.executor == "ray"):
        if importlib.util.find_spec(package) is None:
            raise missing_package("curate", package, "data", *["ray"] * (package == "ray"))
    from nanollm.data.blocks import Workplace  # late: it needs datatrove

    tokenizer = Tokenizer.load(c.tokenizer_path)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(
            f"token files hold uint16: at most {MAX_VOCAB_SIZE:,} pieces, this tokenizer has {tokenizer.vocab_size:,}"
        )
    files = find_everywhere(c.input)
    questions = questions_of(c.evals) if c.evals.enabled else []
    source: dict[str, Any] = {"files": [[file.name, size_of(file)] for file in files], "column": c.text_column}
    source |= {"tasks": c.tasks, "filters": filters_of(c.filters), "dedup": asdict(c.dedup)}
    source["evals"] = {"ngram": NGRAM_WORDS, "questions": len(questions), "sha256": digest(questions)}
    header = header_of(tokenizer, c.rules(), source)
    return Job(c, tokenizer, files, json.loads(json.dumps(header)), questions, Workplace(c.save_dir / "curation"))


def questions_of(c: EvalsConfig) -> list[dict[str, str]]:
    """The questions that no document may hold, and where they are from."""
    from nanollm.evals.decontaminate import Question, to_json

    bad: list[BadRecord] = []
    found: list[Question] = []
    if not c.input:
        found = [Question(f"{gsm8k.NAME} test, {number:,}", text) for number, text in enumerate(_gsm8k(bad), start=1)]
    for file in find_files([Path(given) for given in c.input], "test") if c.input else []:
        texts = list(read_texts([file], c.column, bad.append))
        found += [Question(f"{file.name}, {number:,}", text) for number, text in enumerate(texts, start=1)]
    if bad:
        say(f"{len(bad):,} questions cannot be read and are not searched for, the first: {bad[0]}")
    if not found:
        raise ValueError(
            f"no question in {', '.join(c.input)}: name their column with --evals.column, now {c.column!r}, "
            f"or leave the search out with --evals.enabled false"
        )
    return to_json(found)


def _gsm8k(bad: list[BadRecord]) -> list[str]:
    try:
        return [problem.question for problem in gsm8k.problems(None, "test", bad.append)]
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}: --evals.input FILE ..., or --evals.enabled false") from error


def filters_of(c: FilterConfig) -> dict[str, Any]:
    """The filters as the manifest describes them; of the language model its bytes count, not its place."""
    if c.language is None:
        return {key: value for key, value in asdict(c).items() if not key.startswith("language")}
    assert c.language_model is not None
    if importlib.util.find_spec("fasttext") is None:
        raise ValueError("filters.language needs fastText: pip install fasttext-numpy2-wheel")
    if not c.language_model.is_file():
        raise FileNotFoundError(f"{c.language_model} does not exist; fastText's model is at {FASTTEXT_MODEL} (126 MB)")
    return asdict(c) | {"language_model": durable.sha256_of(c.language_model)}


def digest(questions: Sequence[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()


def begin(job: Job) -> None:
    """Refuse a folder that was begun otherwise, and write down what this job is."""
    settings = job.place.folder / "settings.json"
    if settings.exists():
        refuse_other(job.save_dir, durable.read_json(settings), job.header)
    elif strangers := sorted([*job.save_dir.glob("*.npy"), *job.save_dir.glob("part-*"), *job.save_dir.glob("prog*")]):
        raise ValueError(f"{strangers[0]} is not of curate; give an empty or a new folder as --save_dir")
    durable.write_json(job.place.questions, job.questions)
    durable.write_json(settings, job.header)


# The steps.


def steps(job: Job) -> list[Step]:
    """What datatrove runs, one after the other."""
    from nanollm.data.blocks import Keep, ReadShare

    c, place = job.config, job.place
    read = ReadShare(job.files, c.text_column, place.bad)
    last = Step("shards", c.tasks, list(last_blocks(job)))
    if not c.dedup.enabled:
        return [Step("filter", c.tasks, [read, *filters(job), Keep(place.kept)]), last]
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    from nanollm.data.filters import Words

    minhash = MinhashConfig(
        n_grams=DEDUP_WORDS,
        num_buckets=c.dedup.buckets,
        hashes_per_bucket=DEDUP_HASHES,
        hash_config=HashConfig(hash_fc="sha1"),  # its other one takes no text from xxhash 4 on
    )
    signatures, pairs, remove = (str(place.minhash / name) for name in ("signatures", "pairs", "remove"))
    sign = MinhashDedupSignature(signatures, minhash, Words())
    cluster = MinhashDedupCluster(pairs, remove, minhash, save_cluster_id=True)
    return [
        Step("filter", c.tasks, [read, *filters(job), Keep(place.kept), sign]),
        Step("buckets", c.dedup.buckets, [MinhashDedupBuckets(signatures, pairs, config=minhash)]),
        Step("clusters", 1, [cluster]),
        last,
    ]


def filters(job: Job) -> Iterator[Any]:
    """Those that are switched on, the quick ones first."""
    from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
    from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

    from nanollm.data.blocks import Removed
    from nanollm.data.filters import C4Quality, InLanguage, Words

    c, words = job.config.filters, Words()

    def removed(name: str) -> Removed:
        return Removed(job.place.removed / name)

    if c.language and c.language_model:
        yield InLanguage(c.language, LANGUAGE_SCORE, c.language_model, removed("language"))
    if c.gopher_repetition:
        yield GopherRepetitionFilter(exclusion_writer=removed("gopher_repetition"), language=words)
    if c.gopher_quality:
        yield GopherQualityFilter(
            c.min_words,
            c.max_words,
            max_non_alpha_words_ratio=c.min_letters,  # which is what it does with it
            exclusion_writer=removed("gopher_quality"),
            language=words,
        )
    if c.c4:
        yield C4Quality(words, removed("c4"), removed("c4_lines"))


def last_blocks(job: Job) -> Iterator[Any]:
    """From what the filters kept to one part of the folder."""
    from datatrove.pipeline.dedup import MinhashDedupFilter

    from nanollm.data.blocks import NameClusters, ReadKept, Removed, WriteShards
    from nanollm.evals.decontaminate import DropContaminated

    c, place = job.config, job.place
    yield ReadKept(place.kept)
    if c.dedup.enabled:
        remove = place.minhash / "remove"
        yield NameClusters(remove, place.clusters)
        yield MinhashDedupFilter(str(remove), Removed(place.removed / "duplicates"))
    if c.evals.enabled:
        yield DropContaminated(place.questions, NGRAM_WORDS, Removed(place.removed / "contaminated"))
    yield WriteShards(c.save_dir, job.tokenizer, c.rules(), job.header["source"], place.bad)


# The end.


def submit_all(job: Job) -> None:
    """Leave the steps to Slurm, and the end as well."""
    c = job.config
    last = submit([*steps(job), Step("end", 1, [partial(end, job)])], c.workers, job.place.logs, c.slurm)
    say(
        f"Slurm has the jobs, the last is {last}; logs in {job.place.logs}. After it, the same command says "
        f"what is in {c.save_dir}, or submits what failed"
    )


def end(job: Job, data: object, rank: int, world_size: int) -> None:
    """The last job in Slurm, as datatrove calls it."""
    finish(job)
    clean_up(job)


def finish(job: Job) -> None:
    """List the clusters, count what was removed, and merge the parts."""
    from nanollm.data.curated import bad_in_words, figures_of, lines, list_clusters

    c, place = job.config, job.place
    if is_merged(c.save_dir):
        return
    if others := missing(c.save_dir, c.tasks):
        raise ValueError(f"part {others[0]} of {c.save_dir} is missing; run the same command again")
    figures = figures_of(place)
    if not figures["documents"]["kept"]:
        raise ValueError(
            f"nothing to train on: {lines(figures)[0]}; {bad_in_words(place)}; lists are in {place.folder}. "
            f"Loosen the filters or give other text, with another --save_dir"
        )
    list_clusters(place)
    made_by = f"nanollm {__version__} curate, datatrove {version('datatrove')}"
    durable.write_json(c.save_dir / "curation.json", figures | {"settings": job.header, "made_by": made_by})
    merge(c.save_dir, c.tasks, job.header, {"curation": figures})


def clean_up(job: Job) -> None:
    """Remove what only the way here needed."""
    finish_merge(job.save_dir)
    for folder in (job.place.kept, job.place.minhash, job.place.bad, job.place.clusters):
        if folder.exists():
            shutil.rmtree(folder)
