"""A small model that was really trained, as a bundle, and llama.cpp where it is installed."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nanollm.bundle import save_bundle
from nanollm.config import load_preset
from nanollm.export import engines
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.sources.tasks import TaskConfig, open_task
from nanollm.text.tokenizer import Tokenizer
from tests.model.conftest import rng

__all__ = ["rng"]

STEPS, ROWS, LENGTH = 120, 8, 64


@pytest.fixture(scope="session")
def with_llama():
    """llama.cpp; what needs it skips with what would install it."""
    try:
        engines.package_folder()
    except ValueError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def trained(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano-1m with 600 pieces, 60,000 tokens of school problems old: it is sure of most words."""
    config = ModelConfig(**load_preset("model", "nano-1m") | {"vocab_size": tokenizer.vocab_size + 8})
    problems = open_task(TaskConfig(name="words")).problems("train")
    texts = (f"{problem.question}\n{problem.answer}\n" for problem in islice(iter(problems), 600))
    ids = torch.tensor([token for text in texts for token in tokenizer.encode_document(text)])
    model, generator = Transformer(config).init(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH - 1, (ROWS,), generator=generator)
        rows = torch.stack([ids[start : start + LENGTH + 1] for start in starts.tolist()])  # (ROWS, LENGTH + 1)
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 10, (STEPS - step) / 50)
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.moe_layers():
            layer.balance(1e-2)
    folder = tmp_path_factory.mktemp("trained") / "bundle"
    return save_bundle(folder, config, model.state_dict(), tokenizer, {"made_by": "a test"})
