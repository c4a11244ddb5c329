"""Fixtures that every test may ask for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanollm.text.learn import train
from nanollm.text.tokenizer import Tokenizer

# --- text and data: a small real tokenizer, and the real data beside the project ---

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: no test may reach the network

STORY = Path(__file__).parent / "story.txt"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def datasets_cache_stays_in_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A BPE tokenizer of 600 pieces, trained on a story of this folder."""
    path = tmp_path_factory.mktemp("tokenizer") / "story.model"
    return train([STORY.read_text(encoding="utf-8")], path, vocab_size=600)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; what needs it is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"there is no real data at {SHARED_DATA}")
    return SHARED_DATA


# --- end of text and data ---
