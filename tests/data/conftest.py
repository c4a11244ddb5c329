from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nanollm.data.prepare import PrepareConfig, SourceSplit, prepare
from nanollm.data.shards import Shards, read_manifest
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer
from tests.conftest import STORY

Prepare = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Sixty different small documents, some long, some of one word."""
    words = STORY.read_text("utf-8").split()
    return [f"{n}. " + " ".join(words[n * 7 % len(words) :][: 1 + n * n % 83]) for n in range(60)]


@pytest.fixture(scope="session")
def conversations(documents: list[str]) -> list[Conversation]:
    return [Conversation.of(f"What follows {n}?", document) for n, document in enumerate(documents)]


@pytest.fixture
def prepared(tokenizer: Tokenizer) -> Prepare:
    """Prepare documents or conversations into a folder, with small files unless told otherwise."""

    def fill(folder: Path, items: Any, *, num_workers: int = 1, flush_every: int = 200, **rules: Any) -> Any:
        kind = "chat" if isinstance(items, list) and isinstance(items[0], Conversation) else "text"
        chosen = PrepareConfig(**{"kind": kind, "val_fraction": 0.2, "shard_tokens": 300} | rules)
        parts = [SourceSplit(lambda on_bad: items)]
        source = {"dataset": "test"}
        return prepare(
            parts, tokenizer, folder, chosen, source=source, num_workers=num_workers, flush_every=flush_every
        )

    return fill


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name; but for the lock, which holds nothing."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def documents_of(folder: Path, split: str) -> Iterator[tuple[Any, Any]]:
    """The ids of each document of a split, and its flags or None."""
    shards = Shards.open(folder, split, tokenizer_fingerprint=None, verify="sha256")
    for start, end in pairwise([*shards.document_offsets().tolist(), shards.tokens_total]):
        yield shards.read(start, end - start), shards.flags_read(start, end - start) if shards.has_flags else None


def manifest_of(folder: Path) -> dict[str, Any]:
    return read_manifest(folder)[0]
