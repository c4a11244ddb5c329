"""A corpus becomes a tokenizer, and a report of how well it spells text that it has not seen."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from nanollm.config import check_at_least, check_seed
from nanollm.durable import check_writable, lock_folder, sha256_of, write_json
from nanollm.progress import Progress, say
from nanollm.sources import builtin
from nanollm.sources.builtin import BUILTIN
from nanollm.sources.datasets import stream_rows
from nanollm.sources.files import BadRecord, OnBad, checksums, find_files, read_texts
from nanollm.sources.split import hash_to_unit
from nanollm.text.tokenizer import ModelType, Tokenizer
from nanollm.text.train_tokenizer import CHARACTER_COVERAGE, SAMPLE_BYTES, check_sizes, cut, sample, train_on

HELD_OUT_BYTES = 2_000_000  # enough to measure on
SECTION_CHARS = 16_384  # a longer document is held out by sections, so that one huge file still gives some
BAD_RECORDS_LISTED = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a lossless SentencePiece tokenizer with chat tokens, from a Hugging Face dataset or from files."""

    dataset_name: str | None = None
    """Hugging Face dataset to learn from, such as Elriggs/openwebtext-100k; or give --corpus."""
    dataset_config: str | None = None
    """Configuration of that dataset, if it has several."""
    split: str = "train"
    """Split of that dataset."""
    corpus: list[str] = field(default_factory=list)
    """Files or folders to learn from (.txt .jsonl .csv .parquet, each also .gz or .zst). The word builtin stands for
    the documentation that is already on this machine; a file of that name is ./builtin."""
    text_column: str = "text"
    """Column that holds the text."""
    output_dir: Path = Path("checkpoints/tokenizer")
    """Folder for the model and its report."""
    model_name: str = "bpe_tokenizer"
    """Name of both files: {model_name}.model and {model_name}.json."""
    model_type: ModelType = "bpe"
    """Algorithm of SentencePiece. All four are lossless; char may end up with fewer than vocab_size pieces."""
    vocab_size: int = 50304
    """Vocabulary size, including special tokens and the 256 byte tokens (at most 65,536)."""
    character_coverage: float = CHARACTER_COVERAGE
    """Share of the text whose characters get their own pieces, most common first; the rest falls back to bytes.
    Lower, such as 0.9, for a small vocabulary of a script with thousands of characters."""
    sample_bytes: int = SAMPLE_BYTES
    """Maximum bytes of text to learn from, sampled evenly; takes about 6 times this in memory (unigram: 22 times)."""
    held_out: float = 0.01
    """Share of the documents held out for the report (0 to 0.5, at most 2 MB of text)."""
    seed: int = 0
    """Random seed of the sampled and the held-out text."""

    def __post_init__(self) -> None:
        if bool(self.dataset_name) == bool(self.corpus):
            given = "both" if self.corpus else "neither"
            raise ValueError(f"give either --dataset_name NAME or --corpus FILE_OR_FOLDER..., got {given}")
        for name in ("split", "text_column"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be a name, got an empty text")
        if not self.model_name or Path(self.model_name).name != self.model_name:
            raise ValueError(
                f"model_name must be a plain file name, got {self.model_name!r}; the folder is --output_dir"
            )
        check_at_least(1, self, "sample_bytes")
        if not 0 < self.character_coverage <= 1:
            raise ValueError(f"character_coverage must be above 0 and at most 1, got {self.character_coverage}")
        if not 0 <= self.held_out <= 0.5:
            raise ValueError(f"held_out must be from 0 to 0.5, got {self.held_out}")
        check_sizes(self.vocab_size, self.model_type)
        check_seed(self.seed)

    @property
    def model_path(self) -> Path:
        return self.output_dir / f"{self.model_name}.model"

    @property
    def report_path(self) -> Path:
        return self.output_dir / f"{self.model_name}.json"


def plan(c: Config) -> str:
    """What a run would read and write."""
    if is_done(c):
        return f"{c.model_path} was trained with these settings before; nothing to do"
    if c.dataset_name:
        source = f"{c.dataset_name} ({c.split}), column {c.text_column}, streamed from the hub"
    else:
        files = corpus_files(c)
        sources = ["the built-in corpus"] if BUILTIN in c.corpus else []
        if files:
            sources += [f"{len(files):,} files with {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"]
        source = " and ".join(sources)
    return (
        f"{c.model_type} tokenizer of {c.vocab_size:,} pieces from at most {c.sample_bytes / 1e6:,.1f} MB of {source}, "
        f"written to {c.model_path}"
    )


def run(c: Config) -> Path:
    """Train and report, unless that was done before; returns the path of the model."""
    if is_done(c):
        say(f"{c.model_path} was trained with these settings before; nothing to do")
        return c.model_path
    check_writable(c.output_dir, "--output_dir")
    with lock_folder(c.output_dir):
        return train(c)


def train(c: Config) -> Path:
    """Train and report; returns the path of the model."""
    started, files = time.monotonic(), checksums(corpus_files(c))
    bad, split = list[BadRecord](), HeldOut(c.held_out, c.seed)
    kept = sample(split.training(_counted(_documents(c, bad.append))), c.sample_bytes, c.seed)
    if not kept.pieces and bad:
        raise ValueError(f"no record of the corpus is usable; {len(bad):,} bad, the first: {bad[0]}")
    with Progress(f"learn from {kept.bytes_kept / 1e6:,.1f} of {kept.bytes_seen / 1e6:,.1f} MB", unit="pieces") as bar:
        tokenizer = train_on(
            kept, vocab_size=c.vocab_size, model_type=c.model_type, character_coverage=c.character_coverage
        )
        bar.advance(tokenizer.vocab_size)
    # A corpus of a few documents may hold none of them out; the report then says so.
    measured = measure(tokenizer, split.texts or [piece.decode() for piece in kept.pieces[:500]])
    on = "held-out text" if split.texts else "training text"
    report = {
        "settings": _settings(c),
        "files": files,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "documents": split.documents,
        "bytes_seen": kept.bytes_seen,
        "bytes_sampled": kept.bytes_kept,
        "measured_on": on,
        **measured,
        "bad_records": len(bad),
        "first_bad_records": [str(record) for record in bad[:BAD_RECORDS_LISTED]],
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(c.report_path, report)
    tokenizer.save(c.model_path)  # last: where a model is, its report is
    say(f"{measured['bytes_per_token']:.3f} bytes per token on {measured['bytes'] / 1e6:,.2f} MB of {on}")
    if bad:
        say(f"{len(bad):,} bad records were skipped, the first: {bad[0]}; more are in {c.report_path}")
    return c.model_path


def is_done(c: Config) -> bool:
    """Whether these settings made the model that is there. Any other is refused: token files may depend on it."""
    if not c.model_path.exists():
        return False
    report = json.loads(c.report_path.read_bytes()) if c.report_path.exists() else {}
    before, now = report.get("settings", {}), _settings(c)
    other = next((name for name in now if name != "output_dir" and before.get(name) != now[name]), None)
    if other is not None:
        how = f"with {other} {before[other]}, this command has {now[other]}" if other in before else "in another way"
    elif report.get("files") != checksums(corpus_files(c)):
        how = "from files that were changed, added or removed since"
    elif report["fingerprint"] != sha256_of(c.model_path):
        how = "in another way"
    else:
        return True
    raise ValueError(
        f"{c.model_path} exists already, made {how}; choose another --model_name or --output_dir, or remove it"
    )


def _settings(c: Config) -> dict[str, Any]:
    """The settings as a report holds them."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(c), default=str))
    return settings


class HeldOut:
    """Sets aside, by the hash of its text, a part of the documents; equal texts are never on both sides."""

    def __init__(self, fraction: float, seed: int):
        self.fraction, self.key = fraction, f"held out {seed}"
        self.documents = 0
        self.texts: list[str] = []
        self._room = HELD_OUT_BYTES

    def training(self, documents: Iterator[str]) -> Iterator[str]:
        """The documents to train on; the others are in `texts` once this has come to its end."""
        first = True  # the very first section always trains, so that a tiny corpus is not held out whole
        for document in documents:
            self.documents += 1
            for section in cut(document, SECTION_CHARS):
                if first or hash_to_unit(section, self.key) >= self.fraction:
                    yield section
                elif len(section.encode()) <= self._room:
                    self.texts.append(section)
                    self._room -= len(section.encode())
                first = False


def measure(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """How many bytes a token stands for, on these texts."""
    encoded = [tokenizer.encode(text) for text in texts]
    assert all(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True)), "lossless"
    tokens, size = sum(map(len, encoded)), sum(len(text.encode()) for text in texts)
    return {"texts": len(texts), "bytes": size, "tokens": tokens, "bytes_per_token": round(size / tokens, 4)}


def _documents(c: Config, on_bad: OnBad) -> Iterator[str]:
    if c.dataset_name:
        rows = stream_rows(c.dataset_name, c.split, [c.text_column], on_bad, c.dataset_config)
        return (text for (text,) in rows)
    ours = builtin.documents() if BUILTIN in c.corpus else iter(())
    return chain(ours, read_texts(corpus_files(c), c.text_column, on_bad))


def corpus_files(c: Config) -> list[Path]:
    """The files of the corpus; none where it is the built-in one alone."""
    given = [Path(name).expanduser() for name in c.corpus if name != BUILTIN]
    return find_files(given) if given else []


def _counted(documents: Iterator[str]) -> Iterator[str]:
    with Progress("read the corpus", unit="docs") as bar:
        for document in documents:
            yield document
            bar.advance()
