"""The small corpus and run of the stages' tests, as a job of several processes."""

import dataclasses
from pathlib import Path

import pytest

from nanollm.config import to_yaml
from tests.stages.conftest import run_config, token_files, tokenizer_path

__all__ = ["run_config", "token_files", "tokenizer_path"]


@pytest.fixture
def job(run_config, tmp_path: Path):
    """job(out=..., parallel=..., steps=..., **fields): the arguments of a run that saves every third step."""

    def make(steps: int = 12, out: str = "run", **fields) -> list[str]:
        config = run_config(steps=steps, out=out, **fields)
        file = tmp_path / f"{out}.yaml"
        file.write_text(to_yaml(dataclasses.asdict(config)), encoding="utf-8")
        return ["pretrain", "--config", str(file), "--out", str(config.out)]

    return make
