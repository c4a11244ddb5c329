"""Killed at any moment, inside saves as well, the same command goes on and ends with the same bits."""

import json
import random
import re
import signal
import time

import pytest

from nanollm.train.checkpoint import checkpoints, verify
from tests.faults.conftest import SAVE_EVERY
from tests.faults.processes import Fault

VERBS = ("preprocess", "pretrain", "sft", "grpo", "prefer", "distill")
TRAINING = VERBS[1:]
FEW = [*VERBS[:2], *(pytest.param(verb, marks=pytest.mark.long) for verb in VERBS[2:])]
"""All of them; what is tested of the others takes long, and breaks with pretraining."""
WITHIN_S = 10.0
MAX_LOST = SAVE_EVERY | {"preprocess": 3 * SAVE_EVERY["preprocess"]}
"""One interval; preprocess writes whole chunks, of at most four bytes of text for each token of it."""


def short(verb):
    """Options that make a job as short as it can be: it saves twice, and deletes the first."""
    return [] if verb == "preprocess" else ["--train.steps", 2 * SAVE_EVERY[verb], "--train.keep_last", 1]


@pytest.fixture
def shot_of(job_of, children, tmp_path, left_alone):
    return lambda verb, *options: Shot(job_of(verb, *options), children, tmp_path / "log", left_alone)


class Shot:
    """A job that is killed and started again, and what it had done each time."""

    def __init__(self, job, children, log, left_alone):
        self.job, self.children, self.log, self.lost = job, children, log, [0]
        words = tuple(word for word in job.words if word != str(job.out))
        if words not in left_alone:
            child = self.start()
            assert child.wait() == 0, child.said
            left_alone[words] = child.moments, job.outcome()
            job.remove()
        self.moments, self.expected = left_alone[words]

    def start(self, fault=Fault.COUNT, at=0):
        self.log.write_text("")  # a child may be gone before it opens it
        return self.children.start(self.job.words, self.log, watched=self.job.out, fault=fault, at=at)

    def note_lost(self, done):
        """After another start, if it came so far: how much of what was done had to be done again."""
        if not self.job.is_training:
            if "documents are done" in self.log.read_text():
                self.lost.append(done - self.noted)
        elif found := re.search(r"going on from step ([\d,]+)", self.log.read_text()):
            self.lost.append(done - int(found[1].replace(",", "")))
        elif self.done() < done:
            self.lost.append(done)

    def done(self):
        """Steps that the metrics tell of; of preprocess, tokens in its files."""
        if not self.job.is_training:
            progress = self.job.out / "progress.json"
            splits = json.loads(progress.read_bytes())["splits"].values() if progress.exists() else ()
            self.noted = sum(split["tokens"] for split in splits)
            return sum((path.stat().st_size - 128) // 2 for path in self.job.out.glob("*-?????.npy"))
        if not (self.job.out / "metrics.jsonl").exists():
            return 0
        whole = (self.job.out / "metrics.jsonl").read_text().rpartition("\n")[0]
        return len(whole.splitlines()) - 1 if whole else 0

    def end(self):
        """Let it go on to its end: it must be the one of the run that was left alone."""
        done, child = self.done(), self.start()
        assert child.wait() == 0, child.said
        self.note_lost(done)
        assert self.job.outcome() == self.expected
        assert self.job.leftovers() == []
        self.job.remove()


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", FEW)
def test_killed_at_random_moments_a_job_ends_with_the_bits_of_one_left_alone(shot_of, record_property, verb, kills):
    shot, draw = shot_of(verb), random.Random(f"{verb} {kills}")
    struck = in_saves = 0
    latest = 0.2
    while struck < kills:
        done, by_the_clock = shot.done(), struck % 2 == 0
        if by_the_clock:
            child = shot.start()
            time.sleep(draw.uniform(0, latest))
            child.kill()
        else:  # between, or in the middle of, two changes of its files
            child = shot.start(Fault.KILL, draw.randrange(shot.moments))
        code = child.wait()
        assert code in (0, -signal.SIGKILL), child.said
        shot.note_lost(done)
        if by_the_clock:  # some machines need longer
            latest *= 1.2 if code else 0.7
        struck += code != 0
        in_saves += code != 0 and bool(shot.job.leftovers())
        if code == 0 or draw.random() < 0.5:
            shot.end()
    shot.end()
    assert max(shot.lost) <= MAX_LOST[verb]
    what = "steps" if shot.job.is_training else "tokens"
    lost = f"; at most {max(shot.lost):,} {what} done again, saved every {SAVE_EVERY[verb]:,}"
    record_property("figure", f"{verb}: {struck} of {kills} the same bits, {in_saves} of them inside a save{lost}")


@pytest.mark.long
def test_killed_with_turns_tools_mini_batches_and_foreign_rewards_a_run_ends_with_the_same_bits(shot_of):
    own = "tests.faults.even"
    shot = shot_of(
        "grpo",
        *("--task.name", f"{own}:EvenTwice", "--rollout.tools", "calculator", "--rollout.max_tokens", 24),
        *("--objective.mini_batches", 2, "--reward.weights", f'{{correct: 1.0, "{own}:brief": 0.1}}'),
    )
    for moment in (shot.moments // 3, shot.moments // 2):
        assert shot.start(Fault.KILL, moment).wait() == -signal.SIGKILL
        shot.end()
    assert max(shot.lost) <= MAX_LOST["grpo"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_each_change_of_a_file_a_job_ends_with_the_same_bits(shot_of, record_property, verb):
    shot = shot_of(verb, *short(verb))
    for moment in range(shot.moments):
        assert shot.start(Fault.KILL, moment).wait() == -signal.SIGKILL
        shot.end()
    assert max(shot.lost) <= MAX_LOST[verb]
    record_property("figure", f"{verb}: {shot.moments} of {shot.moments} changes, the same bits")


@pytest.mark.parametrize(
    ("verb", "fault", "code"),
    [
        ("pretrain", Fault.ASK_BY_SIGTERM, 143),
        pytest.param("pretrain", Fault.ASK_BY_SIGINT, 130, marks=pytest.mark.long),
        *(pytest.param(verb, Fault.ASK_BY_SIGTERM, 143, marks=pytest.mark.long) for verb in TRAINING[1:]),
        *(pytest.param(verb, Fault.ASK_BY_SIGINT, 130, marks=pytest.mark.slow) for verb in TRAINING[1:]),
    ],
)
def test_asked_to_stop_a_run_saves_leaves_within_ten_seconds_and_goes_on_to_the_same_bits(
    shot_of, record_property, verb, fault, code
):
    shot = shot_of(verb, "--train.save_every", 0, "--train.keep_last", 1)
    began = time.monotonic()
    child = shot.start(fault, shot.moments // 3)
    assert child.wait() == code, child.said
    took = time.monotonic() - began
    name = fault.name.removeprefix("ASK_BY_")
    assert f"{name}: saving after this step" in child.said and "the same command goes on from here" in child.said
    (newest,) = checkpoints(shot.job.out / "checkpoints")
    assert verify(newest)["step"] == shot.done() >= 1  # nothing is lost
    began = time.monotonic()
    shot.end()
    assert max(shot.lost) == 0
    assert took < max(WITHIN_S, time.monotonic() - began)  # on a busy machine all takes long
    record_property("figure", f"{verb}, {name}: exit code {code} {took:.1f} s after its start, no step lost")


@pytest.mark.parametrize(("fault", "code"), [(Fault.ASK_BY_SIGTERM, -signal.SIGTERM), (Fault.ASK_BY_SIGINT, 130)])
def test_asked_to_stop_preprocess_leaves_at_once_and_goes_on_to_the_same_bytes(shot_of, fault, code):
    """It needs no goodbye: what is noted in progress.json is safe at any moment."""
    shot = shot_of("preprocess")
    child = shot.start(fault, shot.moments // 2)
    assert child.wait() == code, child.said
    shot.end()


@pytest.mark.parametrize("verb", FEW)
def test_nothing_takes_its_place_before_its_bytes_are_on_the_disk(job_of, children, tmp_path, verb):
    """What a power cut leaves is what was synced: a rename comes after the sync of every file it shows to readers."""
    job, log = job_of(verb), tmp_path / "log"
    assert children.start(job.words, log, watched=job.out.parent, fault=Fault.TRACE).wait() == 0
    unsynced, unnamed, renamed = {}, set(), 0
    for line in log.with_suffix(".trace").read_text().splitlines():
        call, inode, path = line.split(" ", 2)
        if call in ("write", "truncate"):
            unsynced[inode] = path
        elif call == "mkdir" and inode == "0" and not path.endswith(".tmp"):  # a draft is about to get another name
            unnamed.add(path)  # which stands in its parent, and that has to be synced as well
        elif call == "fsync":
            unsynced.pop(inode, None)
            unnamed = {folder for folder in unnamed if folder.rpartition("/")[0] != path}
        elif call == "rename":
            renamed += 1
            shown = [each for each in unsynced.values() if each == path or each.startswith(f"{path}/")]
            lost = [each for each in unnamed if path.startswith(f"{each}/")]
            assert shown == lost == [], f"{path} was renamed too early"
    unsafe = [path for path in unsynced.values() if not path.endswith((".lock", ".probe"))]
    assert unsafe == [] and renamed >= 5
