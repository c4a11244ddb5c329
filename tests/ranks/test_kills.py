"""A rank is killed at any moment: nothing hangs, no half checkpoint is chosen, the end is the uninterrupted one."""

import random
import time

import pytest

from nanollm.train.checkpoint import checkpoints, verify
from nanollm.train.run import TrainConfig
from tests.ranks.launch import running, wait_until, workers
from tests.ranks.traced import read_rows

pytestmark = pytest.mark.dist

KILLS = 10
LONGEST_S = 60.0
TRAIN = TrainConfig(steps=120, batch_size=8, micro_batch_size=1, log_every=1, validate_every=0, save_every=2)


def finished(process, log):
    assert process.wait(600) == 0, log.read_text()[-3000:]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_job_whose_ranks_are_killed_ends_with_the_bits_of_one_that_was_left_alone(job, tmp_path, parallel):
    log, out = tmp_path / "log", tmp_path / "killed"
    with running(4, job(out="alone", train=TRAIN, parallel=parallel), log) as process:
        finished(process, log)
    draw, waited, in_a_save = random.Random(0), [], 0
    with running(4, job(out="killed", train=TRAIN, parallel=parallel), log, f"--max-restarts={KILLS}") as process:
        for number in range(KILLS):
            ranks = wait_until(lambda: (r := workers(process)) and len(r) == 4 and r, LONGEST_S)
            before = len(read_lines(out / "rows-0.jsonl"))
            wait_until(lambda seen=before: len(read_lines(out / "rows-0.jsonl")) > seen, LONGEST_S)  # it trains again
            if number % 2:
                wait_until(lambda: [*out.glob("checkpoints/step-*.tmp")], LONGEST_S, every_s=0.0001)
            else:
                time.sleep(draw.random())
            victim = draw.choice(ranks)
            in_a_save += bool([*out.glob("checkpoints/step-*.tmp")])
            victim.kill()
            killed = time.monotonic()
            wait_until(lambda old=victim.pid: all(rank.pid != old for rank in workers(process)), LONGEST_S)
            wait_until(lambda: len(workers(process)) == 4, LONGEST_S)
            waited.append(time.monotonic() - killed)
        finished(process, log)
    assert in_a_save >= 2 and max(waited) < LONGEST_S
    print(f"{KILLS} kills, {in_a_save} inside a save; started again after {min(waited):.1f} to {max(waited):.1f} s")
    weights = [(tmp_path / name / "bundle" / "model.safetensors").read_bytes() for name in ("alone", "killed")]
    assert weights[0] == weights[1]
    assert read_rows(tmp_path / "alone") == read_rows(out)
    for path in checkpoints(out / "checkpoints"):
        verify(path)


def test_without_restarts_a_killed_rank_ends_the_job_within_a_minute_and_says_so(job, tmp_path):
    log, out = tmp_path / "log", tmp_path / "run"
    with running(4, job(train=TRAIN), log) as process:
        wait_until(lambda: len(read_lines(out / "rows-0.jsonl")) > 3, LONGEST_S)
        workers(process)[2].kill()
        killed = time.monotonic()
        assert process.wait(LONGEST_S) != 0
        print(f"ended after {time.monotonic() - killed:.1f} s")
        assert workers(process) == []
    assert "another process of the job went away" in log.read_text()


def test_a_rank_that_stands_still_ends_the_job_within_a_minute_and_is_named(job, tmp_path):
    log, out = tmp_path / "log", tmp_path / "run"
    with running(4, job(train=TRAIN), log) as process:
        wait_until(lambda: len(read_lines(out / "rows-0.jsonl")) > 3, LONGEST_S)
        workers(process)[3].suspend()
        stopped = time.monotonic()
        assert process.wait(LONGEST_S + 30) != 0
        print(f"ended after {time.monotonic() - stopped:.1f} s")
    assert "nothing was heard of rank 3 on host" in log.read_text()


def test_a_signal_to_the_job_saves_once_and_the_same_command_goes_on(job, tmp_path):
    log, out = tmp_path / "log", tmp_path / "run"
    arguments = job(train=TRAIN)
    with running(2, arguments, log) as process:
        wait_until(lambda: len(read_lines(out / "rows-0.jsonl")) > 3, LONGEST_S)
        process.terminate()  # as a scheduler does
        assert process.wait(LONGEST_S) != 0
    assert "after SIGTERM; the same command goes on from here" in log.read_text()
    saved = int(checkpoints(out / "checkpoints")[0].name[5:])
    with running(2, arguments, log) as process:
        finished(process, log)
    assert f"going on from step {saved:,}" in log.read_text()
    assert list(read_rows(out)) == list(range(TRAIN.steps))


def read_lines(path):
    return path.read_text().splitlines() if path.exists() else []
