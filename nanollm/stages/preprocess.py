"""A source becomes a folder of token files, and a few lines that say what is in it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nanollm.config import check_seed
from nanollm.data.merge import MAX_PARTS, begin_part, finish_merge, is_merged, merge, missing, part_source, refuse_parts
from nanollm.data.prepare import BAD_RECORDS, Document, PrepareConfig, SourceSplit, header_of, prepare
from nanollm.durable import check_writable
from nanollm.progress import say
from nanollm.sources import builtin, gsm8k
from nanollm.sources.builtin import BUILTIN
from nanollm.sources.datasets import chats, openwebtext, stream_rows, super_natural_instructions
from nanollm.sources.files import OnBad, find_files, format_of, read_texts
from nanollm.sources.split import hold_out, share
from nanollm.sources.word_problems import LENGTH, WordProblems
from nanollm.text.tokenizer import Tokenizer

POSITIONAL = ("kind",)
OF_DOCUMENTS, OF_ONE_TEXT = 0.01, 0.1  # becomes val
FEW_DOCUMENTS = 100
ENOUGH_BYTES, ADVISED = 500_000, "1 MB (200,000 words)"

Reader = Callable[[Sequence[Path] | None, OnBad], Iterable[Document]]


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Which generated problems, for kind words."""

    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of steps to a solution, from 1 to 4; each comes equally often."""
    largest: int = 20
    """The largest number given, but for totals; no number of a problem is above 5 times this."""
    seed: int = 0
    """Another seed gives other problems."""
    count: int = 20_000
    """Problems in all, val included."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"words.count must be at least 1, got {self.count}")
        if self.count > LENGTH:
            raise ValueError(f"words.count must be at most {LENGTH:,}, got {self.count:,}")
        try:
            self.problems()
        except ValueError as error:
            raise ValueError(f"words.{error}") from None
        check_seed(self.seed, "words.seed")

    def problems(self) -> WordProblems:
        return WordProblems(levels=tuple(self.levels), largest=self.largest, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Turn text into token files, split by document into train and val.

    Stopped at any moment, the same command goes on where it was; the files come out the same, byte for byte. What is
    done is not encoded again, but it is read again: quickly from files, and at the speed of the network from the hub.
    """

    kind: Literal["owt", "sni", "gsm8k", "words", "text", "chat"]
    """owt: OpenWebText; sni: Super-NaturalInstructions; gsm8k: school problems with worked solutions, with a split of
    its own for test; words: generated school problems, offline; text: any documents; chat: .jsonl lines
    {"messages": [{"role": ..., "content": ...}, ...]}."""
    tokenizer_path: Path
    """The .model file of the tokenizer, or the folder that holds it."""
    save_dir: Path
    """Folder to fill."""
    input: list[Path] = field(default_factory=list)
    """Files or folders to read (.txt, .jsonl, .csv, .parquet, each also .gz or .zst); none: the dataset from the hub.
    For text, the word "builtin" stands for the documentation that is already on this machine."""
    val_input: list[Path] = field(default_factory=list)
    """Files or folders that become val, for text and chat; all of --input is then train."""
    dataset_name: str | None = None
    """Dataset of the hub: any for text, another copy of the usual one for owt and sni. It is streamed: a job that goes
    on after a stop streams what is done once more."""
    words: WordsConfig = field(default_factory=WordsConfig)
    """Which problems, for kind words; none of them is one that an evaluation on the generated test asks."""
    text_column: str = "text"
    """Column (.jsonl key) that holds the text, for kind text."""
    val_fraction: float | None = None
    """Share that becomes val, from 0 to below 1. Of documents, by default 0.01: drawn by a hash of the text, so that
    equal documents go to the same side. Of a single .txt file, by default 0.1: its end, cut between paragraphs or lines
    where there are any."""
    seed: int = 0
    """Of the draw between train and val."""
    max_tokens_train: int | None = None
    """Tokens of train at most; reading stops there. Text is cut at exactly this number; a conversation is never cut,
    the first that does not fit ends train. None: everything."""
    max_tokens_val: int | None = None
    """Tokens of val at most, cut in the same way; further documents drawn for val are left out, not moved to train."""
    shard_tokens: int = 100_000_000
    """A file is closed after the document that brings it to this many tokens (2 bytes each)."""
    flush_every: int = 5_000_000
    """Tokens between two points from which a stopped job can go on."""
    num_workers: int = 1
    """Processes that encode, this one included."""
    strict: bool = False
    """Stop at the first bad record. Otherwise bad records are counted, and listed in bad_records.jsonl."""
    part: int | None = None
    """Which of --parts this job prepares, from 0: in a Slurm array, $SLURM_ARRAY_TASK_ID of --array=0-7 for 8 parts."""
    parts: int = 1
    """Jobs that share the source, on any number of machines with one file system; each is this command with another
    --part. Whoever ends last puts the parts together in --save_dir."""

    def __post_init__(self) -> None:
        if self.kind == "chat" and not self.input:
            raise ValueError("chat needs --input FILE_OR_FOLDER ... with .jsonl conversations")
        if self.kind == "text" and bool(self.input) == bool(self.dataset_name):
            raise ValueError("text needs either --input FILE_OR_FOLDER ... (or --input builtin) or --dataset_name NAME")
        if self.kind != "text" and self.input and self.dataset_name:
            raise ValueError(f"{self.kind} reads --input or --dataset_name, not both")
        if self.kind == "words" and (self.input or self.dataset_name):
            raise ValueError("words are generated: they take --words.count and its like, no --input or --dataset_name")
        if self.kind != "words" and self.words != WordsConfig():
            given = next(name for name, value in asdict(self.words).items() if value != asdict(WordsConfig())[name])
            raise ValueError(
                f"--words.count and its like are for words; {self.kind} is read from files or the hub; leave out "
                f"--words.{given}"
            )
        if self.kind in ("gsm8k", "chat") and self.dataset_name:
            raise ValueError(f"--dataset_name is for owt, sni and text; {self.kind} takes --input FILE_OR_FOLDER ...")
        if self.kind not in ("text", "chat") and self.val_input:
            raise ValueError(f"--val_input is for text and chat; {self.kind} draws val by --val_fraction")
        for name in ("text_column", "dataset_name"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must be a name, got an empty text")
        for name in ("num_workers", "flush_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _ = self.rules  # which checks them
        check_seed(self.seed)
        self._check_parts()

    def _check_parts(self) -> None:
        if self.parts < 1:
            raise ValueError(f"--parts must be at least 1, got {self.parts}")
        if self.parts > MAX_PARTS:
            raise ValueError(f"--parts must be at most {MAX_PARTS:,}, got {self.parts:,}")
        if self.part is None and self.parts > 1:
            raise ValueError(
                f"--parts {self.parts} needs --part, from 0 to {self.parts - 1}: which of them this job is"
            )
        if self.part and self.parts == 1:
            raise ValueError(f"--part {self.part} needs --parts, the number of jobs")
        if self.part is not None and not 0 <= self.part < self.parts:
            raise ValueError(f"--part must be from 0 to --parts - 1 = {self.parts - 1}, got {self.part}")
        if self.parts > 1 and (self.max_tokens_train, self.max_tokens_val) != (None, None):
            raise ValueError(
                "--max_tokens_train and --max_tokens_val count from the start of the source, and no part knows how far "
                "the others are; leave them out with --parts, or prepare in one job"
            )

    @property
    def rules(self) -> PrepareConfig:
        return PrepareConfig(
            kind="text" if self.kind in ("owt", "text") else "chat",
            seed=self.seed,
            val_fraction=OF_DOCUMENTS if self.val_fraction is None else self.val_fraction,
            max_tokens_train=self.max_tokens_train,
            max_tokens_val=self.max_tokens_val,
            shard_tokens=self.shard_tokens,
        )


def run(config: Config) -> Path:
    """Prepare the folder, or a part of it, and say what is in it."""
    tokenizer = Tokenizer.load(config.tokenizer_path)
    stretches, source = open_source(config)
    check_writable(config.save_dir, "--save_dir")
    finish_merge(config.save_dir)
    fill = partial(
        prepare,
        stretches,
        tokenizer,
        rules=config.rules,
        num_workers=config.num_workers,
        flush_every=config.flush_every,
        strict=config.strict,
    )
    if config.part is None or config.parts == 1 or is_merged(config.save_dir):
        refuse_parts(config.save_dir)
        manifest = fill(folder=config.save_dir, source=source)
    else:
        header = header_of(tokenizer, config.rules, source)
        folder = begin_part(config.save_dir, config.part, config.parts, header)
        fill(folder=folder, source=part_source(source, config.part, config.parts), may_be_empty=True)
        if others := missing(config.save_dir, config.parts):
            say(f"{folder} is done; {len(others)} of {config.parts} parts are still missing, the first is {others[0]}")
            return folder
        manifest = merge(config.save_dir, config.parts, header)
    for line in summary(manifest, config.save_dir):
        say(line)
    return config.save_dir


def open_source(config: Config) -> tuple[list[SourceSplit], dict[str, Any]]:
    """What to read, in order, and how the manifest describes it. With --parts each stretch is this job's share."""
    source: dict[str, Any] = {"dataset": config.dataset_name or config.kind}
    if config.kind == "words":
        chosen = config.words.problems().problems("train")[: config.words.count]
        conversations = _mine(config, lambda files, on_bad: (problem.conversation for problem in chosen), None)
        return [SourceSplit(conversations)], source | asdict(config.words)
    if config.kind == "text":
        source["column"] = config.text_column
    if config.kind == "gsm8k":
        train, test = (gsm8k.files_of(config.input, split) if config.input else None for split in ("train", "test"))
        source["files"] = _sizes([*(train or []), *(test or [])]) if config.input else None
        return [SourceSplit(_open(config, train, "train")), SourceSplit(_open(config, test, "test"), "test")], source
    if config.input == [Path(BUILTIN)]:
        source["dataset"] = BUILTIN
        read = _mine(config, lambda files, on_bad: builtin.documents(), None)
    else:
        files = find_files(config.input) if config.input else None
        source["files"] = None if files is None else _sizes(files)
        read = _open(config, files)
        share_of_one = OF_ONE_TEXT if config.val_fraction is None else config.val_fraction
        if _is_one_text(config, files) and not config.val_input and share_of_one:
            begin, end = hold_out(lambda on_bad: read_texts(files or [], config.text_column, on_bad), share_of_one)
            source["held_out"] = share_of_one
            return [
                SourceSplit(_mine(config, lambda _, on_bad: begin(on_bad), None), "train"),
                SourceSplit(_mine(config, lambda _, on_bad: end(on_bad), None), "val"),
            ], source
    if not config.val_input:
        return [SourceSplit(read)], source
    val_files = find_files(config.val_input)
    source["val_files"] = _sizes(val_files)
    return [SourceSplit(read, "train"), SourceSplit(_open(config, val_files), "val")], source


def _open(config: Config, files: Sequence[Path] | None, split: str = "train") -> Callable[[OnBad], Iterable[Document]]:
    """How to read these files, or the hub where they are None; with --parts, this job's share of them."""
    return _mine(config, _reader(config, split), files)


def _mine(config: Config, read: Reader, files: Sequence[Path] | None) -> Callable[[OnBad], Iterable[Document]]:
    return share(read, files, config.part or 0, config.parts)


def _reader(config: Config, split: str) -> Reader:
    """What reads files of this kind, or the hub where they are None."""
    name = config.dataset_name
    named = {"name": name} if name else {}
    match config.kind:
        case "owt":
            return lambda files, on_bad: openwebtext(files, on_bad, **named)
        case "sni":
            return lambda files, on_bad: super_natural_instructions(files, split, on_bad, **named)
        case "gsm8k":
            return lambda files, on_bad: gsm8k.conversations(files, split, on_bad)
        case "chat":
            return lambda files, on_bad: chats(files or [], on_bad)
    if name is None:
        return lambda files, on_bad: read_texts(files or [], config.text_column, on_bad)
    return lambda files, on_bad: (row[0] for row in stream_rows(name, split, [config.text_column], on_bad))


def _is_one_text(config: Config, files: Sequence[Path] | None) -> bool:
    return config.kind == "text" and files is not None and [format_of(file) for file in files] == [".txt"]


def _sizes(files: Sequence[Path]) -> list[list[str | int]]:
    """Enough to notice another set of files, wherever they lie: names and bytes."""
    return [[path.name, path.stat().st_size] for path in files]


def summary(manifest: dict[str, Any], folder: Path) -> list[str]:
    """What a prepared folder holds, one line for each thing worth knowing."""
    lines = []
    for split, entry in manifest["splits"].items():
        tokens, documents = entry["tokens"], entry["documents"]
        what = "documents" if manifest["kind"] == "text" else "conversations"
        per_token = f", {entry['text_bytes'] / tokens:.2f} bytes of text per token" if tokens else ""
        lines.append(f"{split}: {tokens:,} tokens in {documents:,} {what}{per_token}")
    if not manifest["splits"].get("val", {}).get("tokens"):
        is_drawn = sum(entry["documents"] for entry in manifest["splits"].values()) >= FEW_DOCUMENTS
        lines.append(
            "val is empty, so training will measure nothing on it; to have some, prepare a new --save_dir with "
            + ("a larger --val_fraction, or with " if is_drawn else "")
            + "--val_input FILE"
        )
    if manifest["kind"] == "text" and (size := manifest["splits"]["train"]["text_bytes"]) < ENOUGH_BYTES:
        lines.append(
            f"{size / 1000:,.0f} kB of text is too little: even the smallest model learns it by heart; "
            f"from about {ADVISED} on it learns to write"
        )
    if bad := manifest["bad_records"]:
        lines.append(f"{bad:,} bad records were left out; {folder / BAD_RECORDS} lists them")
    return lines
