"""Promises of benchmarks/race.py: the judge of all sides measures what `nanollm eval --text` does."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import race
from nanollm.bundle import load_bundle, save_bundle
from nanollm.evals.documents import bits_of_texts
from nanollm.model.transformer import Transformer
from nanollm.text.tokenizer import Tokenizer
from tests.stages.conftest import MODEL

TEXTS = ["The king rode out.", "Once upon a time " * 300, "x"]


def test_the_judge_counts_the_bytes_of_the_text_and_bits_as_eval_does(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = replace(MODEL, context_length=race.CONTEXT)
    weights = Transformer(config).init(0).state_dict()
    save_bundle(tmp_path / "a" / "bundle", config, weights, tokenizer, {"made_by": "a test"})
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "val.parquet")
    words = [sys.executable, "-c", race.JUDGE + race.JUDGE_OURS, str(tmp_path / "val.parquet"), str(tmp_path), "a"]
    facts = json.loads(subprocess.run(words, cwd=race.ROOT, capture_output=True, text=True, check=True).stdout)
    total = bits_of_texts(load_bundle(tmp_path / "a" / "bundle"), TEXTS).total
    assert facts["bytes"] == total.bytes == sum(len(text.encode()) for text in TEXTS)
    assert facts["whole"] == pytest.approx(total.value, rel=1e-5)
    assert facts["first"] != facts["whole"]


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no checkout of nanochat: there is no scripts/base_train\.py"):
        race.copy_of(tmp_path, tmp_path / "nanochat", "scripts/base_train.py")
