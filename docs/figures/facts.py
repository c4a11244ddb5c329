"""Where do the numbers in the pictures come from?

measured/*.json (measure.py), benchmarks/results/*.json, and the presets of configs/model/.
"""

import json
from pathlib import Path
from typing import Any

from nanollm.model.config import ModelConfig
from nanollm.settings import load_preset

MEASURED = Path(__file__).resolve().parent / "measured"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PRESETS = ("nano-1m", "nano-5m", "nano-20m", "nano-60m", "nano-327m", "nano-327m-fine")


def measured(name: str) -> Any:
    """What measure.py found."""
    return json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))


def result(name: str) -> Any:
    """The record of a benchmark, by the name of its file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def presets() -> dict[str, ModelConfig]:
    """The presets, small ones first."""
    return {name: ModelConfig(**load_preset("model", name)) for name in PRESETS}


def source(facts: Any) -> str:
    """One line below a picture: which model this was measured in."""
    seen = facts.get("tokens_seen")
    learnt = f" after {seen / 1e6:.1f} million tokens" if seen else ""
    return f"{facts['model']}{learnt}, commit {facts['commit']}"
