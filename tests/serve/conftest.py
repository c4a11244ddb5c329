"""A tiny random model behind the real server; without the packages of the extra `serve` these tests are skipped."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nanollm.bundle import Bundle
from nanollm.model.transformer import Transformer
from nanollm.text.tokenizer import Tokenizer
from tests.model.conftest import TINY, randomised
from tests.serve.running import Running, serving

CONTEXT = 192


@pytest.fixture(scope="session")
def bundle(tokenizer: Tokenizer) -> Bundle:
    """A random model of a few hundred thousand weights, which says nothing sensible and never the same thing long."""
    return random_bundle(tokenizer, CONTEXT)


def random_bundle(tokenizer: Tokenizer, context_length: int) -> Bundle:
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, context_length=context_length)
    return Bundle(randomised(Transformer(config).init(0)).eval(), tokenizer, {})


@pytest.fixture(scope="session")
def serve_extra() -> None:
    """Skips the test where the packages of the extra `serve` are missing."""
    for package in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install -e ".[serve]"')


@pytest.fixture(scope="session")
def server(bundle: Bundle, serve_extra: None) -> Iterator[Running]:
    """One server for all tests that need no settings of their own."""
    with serving(bundle) as running:
        yield running


@pytest.fixture
def serve(bundle: Bundle, serve_extra: None):
    """serve(**limits): a server with settings of its own, as a context manager."""
    return lambda **settings: serving(bundle, **settings)
