"""The same command gives the same bits, and the losses that are kept in the repository.

golden/ is written by these tests where the variable NANOLLM_WRITE_GOLDEN is set. Other processors add numbers up in
other orders, so the losses agree to 1e-4; on one machine nothing differs at all.
"""

import json
import os
from pathlib import Path

import pytest

from nanollm.train.metrics import read_metrics
from tests.faults.test_kills import TRAINING

GOLDEN = Path(__file__).with_name("golden")
STEPS = ["--train.steps", 20]
KEPT = ("loss", "grad_norm", "val_loss", "reward", "val_accuracy")


@pytest.mark.parametrize("verb", TRAINING)
def test_two_runs_give_the_same_bits_and_the_losses_of_the_repository(
    job_of, children, tmp_path, record_property, verb
):
    job, outcomes = job_of(verb, *STEPS), []
    for number in range(2):
        child = children.start(job.words, tmp_path / f"{number}.log")
        assert child.wait() == 0, child.said
        outcomes.append(job.outcome())
        lines = [{name: line[name] for name in ("step", *KEPT) if name in line} for line in read_metrics(job.out)]
        job.remove()
    assert outcomes[0] == outcomes[1]
    if "NANOLLM_WRITE_GOLDEN" in os.environ:
        (GOLDEN / f"{verb}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    golden = [json.loads(line) for line in (GOLDEN / f"{verb}.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == [line.keys() for line in golden]
    difference = max(
        abs(line[name] - kept[name]) / max(1.0, abs(kept[name]))
        for line, kept in zip(lines, golden, strict=True)
        for name in kept
    )
    assert difference <= 1e-4
    told = f"{verb}: 2 of 2 runs the same bits; 20 golden losses, largest difference {difference:.1e}"
    record_property("figure", told)
