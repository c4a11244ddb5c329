"""metrics.jsonl tells a run once, however often it was interrupted."""

import json
import math
import sys
import time

import pytest

from nanollm.train.metrics import RunLog, read_metrics, start_tracker


def test_each_line_is_one_json_object_and_is_there_at_once(tmp_path):
    log = RunLog(tmp_path)
    log.write(3, loss=1.5, bad=math.nan, worse=math.inf, shares=[[0.5, 0.5]])
    written = {"step": 3, "loss": 1.5, "bad": None, "worse": None, "shares": [[0.5, 0.5]]}
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail) == written
    assert read_metrics(tmp_path) == [written]


def test_resuming_cuts_away_what_will_be_told_again(tmp_path):
    log = RunLog(tmp_path)
    for step in (0, 10, 20, 30):
        log.write(step, loss=1.0)
    with log.path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    resumed = RunLog(tmp_path, resume_from=20)
    resumed.write(30, loss=2.0)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (0, 1.0),
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
    ]


def test_a_run_killed_before_its_first_checkpoint_tells_its_start_once(tmp_path):
    RunLog(tmp_path).write(0, loss=1.0)
    RunLog(tmp_path, resume_from=0).write(0, loss=1.0)
    assert len(read_metrics(tmp_path)) == 1


def test_trackers_receive_the_numbers(tmp_path):
    seen = []
    RunLog(tmp_path, [lambda step, values: seen.append((step, values))]).write(1, loss=2.0, samples=["text"])
    assert seen == [(1, {"loss": 2.0})]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = start_tracker("tensorboard", tmp_path, {})
    for step in (5, 10, 15):
        first(step, {"loss": 1.0})
    time.sleep(1.1)  # the names of its files tell the second
    start_tracker("tensorboard", tmp_path, {}, resume_from=10)(15, {"loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 1.0), (10, 1.0), (15, 2.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_go_on_with_the_run_of_the_same_folder(tmp_path, monkeypatch, name):
    """A small stand-in with the calls that both packages share: a run is found again by its id, else by its name."""
    runs = {}

    class Run:
        def __init__(self):
            self.lines = []

        def log(self, values, step):
            self.lines.append((step, values))

    class Package:
        @staticmethod
        def init(*, project, name, config, resume, id=None, dir=None):
            assert resume == "allow"
            return runs.setdefault(id or name, Run())

    monkeypatch.setitem(sys.modules, name, Package)
    start_tracker(name, tmp_path, {"seed": 1})(7, {"loss": 0.5})
    start_tracker(name, tmp_path, {"seed": 1}, resume_from=7)(8, {"loss": 0.4})
    start_tracker(name, tmp_path / "other", {"seed": 1})(1, {"loss": 0.9})
    assert [run.lines for run in runs.values()] == [[(7, {"loss": 0.5}), (8, {"loss": 0.4})], [(1, {"loss": 0.9})]]


def test_a_damaged_line_is_named_and_nothing_is_cut_away(tmp_path):
    written = '{"step": 1}\n{"stop": 2}\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(written)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged .* remove that line to go on"):
        RunLog(tmp_path, resume_from=3)
    assert (tmp_path / "metrics.jsonl").read_text() == written
