"""Fixtures that every test may ask for."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


# --- a browser ---

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")  # its event loop must have gone before tests that have their own
def browser() -> Iterator[Any]:
    """Chromium; where there is none, or no playwright, what needs it is skipped."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()
