"""The tables of docs/scaling.md are those of its script, and the script's formulas are what the page says."""

from pathlib import Path

import pytest

from benchmarks import scaling_table
from benchmarks.scaling_table import MUON_S, NETWORK, NVLINK, step, tables

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_page_has_the_tables_of_the_script():
    page = PAGE.read_text(encoding="utf-8")
    for table in tables().strip().split("\n\n"):
        assert table in page


def test_one_gpu_sends_nothing_and_is_as_fast_as_it_was_measured_to_be():
    alone = step(1, "ddp", rows=16)
    assert alone.wires == 0
    assert alone.compute == pytest.approx(scaling_table.STEP_S + MUON_S)


def test_ddp_sends_the_gradients_twice_and_hsdp_an_eighth_of_them_between_hosts(monkeypatch):
    monkeypatch.setattr(scaling_table, "LATENCY_S", 0.0)
    n = scaling_table.N
    assert step(8, "ddp").wires == pytest.approx(8 * n * 7 / 8 / NVLINK)
    slow = step(64, "hsdp", rows=64 * 16).wires - step(64, "hsdp", rows=64 * 16, between=2 * NETWORK).wires
    assert slow == pytest.approx(8 * n / 8 * 7 / 8 / NETWORK / 2)


def test_a_model_of_the_preset_has_the_parameters_of_the_script():
    from nanollm.bundle import build_model
    from nanollm.model.config import ModelConfig
    from nanollm.settings import load_preset
    from nanollm.train.optim import is_hidden_matrix

    parameters = dict(build_model(ModelConfig(**load_preset("model", "nano-327m"))).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == scaling_table.N
    assert sum(p.numel() for name, p in parameters.items() if is_hidden_matrix(name, p)) == scaling_table.M
