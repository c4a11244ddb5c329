"""A source becomes a folder of token files, and a few lines that say what is in it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nanollm.config import check_at_least, check_seed
from nanollm.data.prepare import BAD_RECORDS, Document, PrepareConfig, SourceSplit, prepare
from nanollm.durable import check_writable
from nanollm.generate.tools import check_tools
from nanollm.progress import say
from nanollm.sources import builtin, gsm8k
from nanollm.sources.builtin import BUILTIN
from nanollm.sources.datasets import chats, openwebtext, rows_of, super_natural_instructions
from nanollm.sources.files import OnBad, checksums, find_files, format_of, is_named, read_texts
from nanollm.sources.split import hold_out
from nanollm.sources.word_problems import LENGTH, WordProblems, lessons
from nanollm.text.tokenizer import Tokenizer

POSITIONAL = ("kind",)
OF_DOCUMENTS, OF_ONE_TEXT = 0.01, 0.1  # becomes val
FEW_DOCUMENTS = 100
VAL_NAMES = ("val", "valid", "validation", "dev")
ENOUGH_BYTES, ADVISED = 500_000, "1 MB (200,000 words)"
OPTIONS_OF = {  # which options say what a kind reads
    "owt": ("input", "dataset_name"),
    "sni": ("input", "dataset_name"),
    "gsm8k": ("input",),
    "words": ("words",),
    "text": ("input", "dataset_name", "val_input"),
    "chat": ("input", "val_input"),
}

Read = Callable[[OnBad], Iterable[Document]]


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Which generated problems, for kind words."""

    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of steps to a solution, from 1 to 4; each comes equally often."""
    largest: int = 20
    """Largest number stated in a problem. Totals may be larger; no number of a problem exceeds 5 times this."""
    seed: int = 0
    """Another seed gives other problems."""
    count: int = 20_000
    """Problems in all, val included. Of every five, two make one conversation of two turns."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= LENGTH:
            raise ValueError(f"words.count must be from 1 to {LENGTH:,}, got {self.count:,}")
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

    The same command resumes a stopped job, and its files come out the same, byte for byte. What is done is not encoded
    again, but it is read again: quickly from files, and at the speed of the network from the hub.
    """

    kind: Literal["owt", "sni", "gsm8k", "words", "text", "chat"]
    """owt: OpenWebText; sni: Super-NaturalInstructions; gsm8k: grade-school math problems with worked solutions and
    their own test split; words: generated math word problems, offline; text: any documents; chat: .jsonl lines
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
    """Hugging Face dataset: any for text; for owt and sni, another copy of the usual one. It is streamed, so a resumed
    job streams the finished part again."""
    words: WordsConfig = field(default_factory=WordsConfig)
    """Which problems, for kind words; none of them is one that an evaluation on the generated test asks."""
    tools: list[str] = field(default_factory=list)
    """Tools that write into replies, for conversations. calculator: the results in GSM8K's notes, <<48/2=24>>. A model
    trained on these files replies with the same tools (docs/post-training.md)."""
    text_column: str = "text"
    """Column (.jsonl key) that holds the text, for kind text."""
    val_fraction: float | None = None
    """Share that becomes val, from 0 to below 1. Of documents, by default 0.01: drawn by a hash of the text, so that
    equal documents go to the same side. Of a single .txt file, by default 0.1: its end, cut between paragraphs or lines
    where there are any."""
    seed: int = 0
    """Random seed of the split into train and val."""
    max_tokens_train: int | None = None
    """Maximum number of training tokens; reading stops there. Text is cut at exactly this number; a conversation is
    never cut: the first that does not fit ends train. null: no limit."""
    max_tokens_val: int | None = None
    """Maximum number of validation tokens, cut in the same way; further documents of val are left out, not moved to
    train."""
    shard_tokens: int = 100_000_000
    """Tokens per file, 2 bytes each; a file ends with the document that reaches this number."""
    flush_every: int = 5_000_000
    """Tokens between two points at which a stopped job can resume."""
    num_workers: int = 1
    """Number of encoding processes; with more than one, another process reads and writes."""
    max_bad: float = 0.1
    """Share of bad records, from 0 to 1, above which the command stops at the end and asks what to do."""
    strict: bool = False
    """Stop at the first bad record. Otherwise bad records are counted, and listed in bad_records.jsonl."""

    def __post_init__(self) -> None:
        for name, nothing in (("input", []), ("val_input", []), ("dataset_name", None), ("words", WordsConfig())):
            takers = [kind for kind, options in OPTIONS_OF.items() if name in options]
            if getattr(self, name) != nothing and self.kind not in takers:
                raise ValueError(f"--{name} is for {', '.join(takers)}; {self.kind} has no use for it")
        if self.input and self.dataset_name:
            raise ValueError(f"{self.kind} reads --input or --dataset_name, not both")
        if self.kind in ("text", "chat") and not (self.input or self.dataset_name):
            hub = ", --input builtin, or --dataset_name NAME" if self.kind == "text" else " with .jsonl conversations"
            raise ValueError(f"{self.kind} needs --input FILE_OR_FOLDER ...{hub}")
        if self.tools and self.rules.kind == "text":
            raise ValueError(f"--tools is for conversations; {self.kind} has no use for it")
        for name in ("text_column", "dataset_name"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must be a name, got an empty text")
        check_at_least(1, self, "num_workers", "flush_every")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad must be from 0 to 1, got {self.max_bad}")
        _ = self.rules  # which checks them
        check_seed(self.seed)

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
    """Prepare the folder, and say what is in it."""
    tokenizer = Tokenizer.load(config.tokenizer_path)
    parts, source = open_source(config)
    check_writable(config.save_dir, "--save_dir")
    manifest = prepare(
        parts,
        tokenizer,
        config.save_dir,
        config.rules,
        source=source,
        tools=check_tools(config.tools, tokenizer),
        num_workers=config.num_workers,
        flush_every=config.flush_every,
        strict=config.strict,
        max_bad=config.max_bad,
    )
    for line in summary(manifest, config.save_dir):
        say(line)
    return config.save_dir


def open_source(c: Config) -> tuple[list[SourceSplit], dict[str, Any]]:
    """What to read, in order, and how the manifest describes it."""
    source: dict[str, Any] = {"dataset": c.dataset_name or c.kind}
    if c.kind == "words":
        problems = c.words.problems().problems("train")[: c.words.count]
        read: Read = lambda on_bad: lessons(problems)  # noqa: E731
        return [SourceSplit(read)], source | asdict(c.words)
    if c.kind == "text":
        source["column"] = c.text_column
    if c.kind == "gsm8k":
        train, test = (gsm8k.files_of(c.input, split) if c.input else None for split in ("train", "test"))
        source["files"] = checksums([*(train or []), *(test or [])]) if c.input else None
        return [SourceSplit(_reader(c, train)), SourceSplit(_reader(c, test, "test"), "test")], source
    if c.input == [Path(BUILTIN)]:
        source["dataset"] = BUILTIN
        read = lambda on_bad: builtin.documents()  # noqa: E731
    else:
        files = find_files(c.input) if c.input else None
        if files and not c.val_input and c.kind in ("text", "chat") and any(map(Path.is_dir, c.input)):
            files, val_files = by_split(files)
            if val_files:
                c = replace(c, input=files, val_input=val_files)
        source["files"] = None if files is None else checksums(files)
        read = _reader(c, files)
        share = OF_ONE_TEXT if c.val_fraction is None else c.val_fraction
        is_one_text = c.kind == "text" and [format_of(file) for file in files or []] == [".txt"]
        if is_one_text and not c.val_input and share:
            begin, end = hold_out(lambda on_bad: read_texts(files or [], c.text_column, on_bad), share)
            source["held_out"] = share
            return [SourceSplit(begin, "train"), SourceSplit(end, "val")], source
    if not c.val_input:
        return [SourceSplit(read)], source
    val_files = find_files(c.val_input)
    source["val_files"] = checksums(val_files)
    return [SourceSplit(read, "train"), SourceSplit(_reader(c, val_files), "val")], source


def by_split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files to train on and those for val, by their names, where some are named train; what is left out is said."""
    if not any(is_named(file, "train") for file in files):
        return files, []
    val = [file for file in files if any(is_named(file, name) for name in VAL_NAMES)]
    test = [file for file in files if is_named(file, "test")]
    if test:
        say(f"left out what is named test ({len(test):,}), the first {test[0]}; name it in --input to train on it")
    return [file for file in files if file not in val and file not in test], val


def _reader(c: Config, files: Sequence[Path] | None, split: str = "train") -> Read:
    """What reads these files, or the hub where they are None."""
    named = {"name": c.dataset_name} if c.dataset_name else {}
    match c.kind:
        case "owt":
            return lambda on_bad: openwebtext(files, on_bad, **named)
        case "sni":
            return lambda on_bad: super_natural_instructions(files, split, on_bad, **named)
        case "gsm8k":
            return lambda on_bad: (each.conversation for each in gsm8k.problems(files, split, on_bad))
        case "chat":
            return lambda on_bad: chats(files or [], on_bad)
    return lambda on_bad: (text for (text,) in rows_of(files, str(c.dataset_name), split, [c.text_column], on_bad))


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
