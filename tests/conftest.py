"""Fixtures that every test may ask for."""

import os
import random
import shutil
import sys
from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from nanollm.text.tokenizer import Tokenizer
from nanollm.text.train_tokenizer import train

if "CI" not in os.environ:  # where hypothesis has a profile of its own, which draws the same examples each time
    is_slow = [hypothesis.HealthCheck.too_slow]  # a busy machine is no fault of the code
    hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=is_slow)
    hypothesis.settings.load_profile("any machine")


# --- the order ---


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--order-seed", type=int, help="shuffle the modules, and the tests within each, by this seed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--order-seed")
    if seed is not None:
        draw = random.Random(seed)
        modules = [list(tests) for _, tests in groupby(items, lambda item: item.path)]
        draw.shuffle(modules)
        items[:] = [test for tests in modules for test in draw.sample(tests, len(tests))]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n: half of the list for each worker, or what is made once for a module would be made in each of them."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


# --- end of the order ---


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


# --- skips ---

CANNOT_BE_HAD = (  # of a machine: no package brings it
    *("needs a CUDA device", "there is no real data", "this processor has no AVX-512", "multiplies bfloat16"),
    *("this user cannot mount a tmpfs", "network namespaces need root", "llama.cpp's kernels for AMX fail"),
    "names no environment with",  # vLLM and MLX: gigabytes, in a Python of their own
)


def judge(report: Any) -> Any:
    """The same report; under CI a skip is a failure, unless what the test needs cannot be had there."""
    is_strict = "CI" in os.environ and sys.platform == "linux"  # elsewhere much is missing for good
    if is_strict and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(each in reason for each in CANNOT_BE_HAD):
            report.outcome = "failed"
            report.longrepr = f"skipped under CI, which must install what is missing ({reason}); see .ci/run"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return judge((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return judge((yield))


# --- end of skips ---


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
        real = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of tests/anyday.sh
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS, env=real)
        yield browser
        browser.close()
