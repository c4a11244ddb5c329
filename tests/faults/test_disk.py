"""A disk that is full or fails at any write costs nothing that was saved: one line says so, nothing is left over."""

import random
import subprocess
from itertools import cycle

import pytest

from nanollm.train.checkpoint import checkpoints, verify
from tests.faults.processes import Fault
from tests.faults.test_kills import FEW, VERBS, short, shot_of

__all__ = ["shot_of"]

REASON = {Fault.FULL: "No space left on device", Fault.BROKEN: "Input/output error"}


def check_refused(shot, code, said, reason):
    """The command ended in one line about the disk; its checkpoints are sound; once there is room it goes on."""
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith(f"nanollm {shot.job.verb}: ")]
    assert reason in line and "Traceback" not in said
    for path in checkpoints(shot.job.out / "checkpoints"):
        verify(path)
    shot.end()


def strike(shot, faults):
    """A run for each (moment, fault): it recovers from it, or comes to its end. How many did the one and the other."""
    struck = harmless = 0
    for moment, fault in faults:
        child = shot.start(fault, moment)
        if (code := child.wait()) == 0:  # as where only a file is deleted after it
            assert shot.job.outcome() == shot.expected
            shot.job.remove()
            harmless += 1
        else:
            check_refused(shot, code, child.said, REASON[fault])
            struck += 1
    assert struck > harmless
    return struck, harmless


@pytest.mark.parametrize("verb", FEW)
def test_from_a_disk_that_fails_a_job_recovers(shot_of, verb):
    shot = shot_of(verb, *short(verb))
    strike(shot, zip(range(0, shot.moments, 149), cycle(REASON), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("fault", REASON, ids=["full", "broken"])
@pytest.mark.parametrize("verb", VERBS)
def test_from_a_disk_that_fails_at_any_write_a_job_recovers(shot_of, record_property, verb, fault):
    shot = shot_of(verb, *short(verb))
    struck, harmless = strike(shot, ((moment, fault) for moment in range(shot.moments)))
    how = "the disk was full from there on" if fault is Fault.FULL else "the disk failed once"
    record_property(
        "figure", f"{verb}: {struck} of {struck} moments where {how}; it came to its end in spite of {harmless} others"
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory of a size that can be changed: resize(bytes). For root."""
    place = tmp_path / "runs"
    place.mkdir(exist_ok=True)

    def mount(*options):
        return subprocess.run(["mount", *options, "-t", "tmpfs", "tmpfs", str(place)], check=False, capture_output=True)

    if mount("-o", "size=1m").returncode:
        pytest.skip("this user cannot mount a tmpfs")
    yield lambda size: mount("-o", f"remount,size={size}").check_returncode()
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_on_a_disk_that_is_really_full_a_job_stops_and_goes_on_when_there_is_room(
    small_disk, shot_of, record_property, verb
):
    small_disk("100m")
    shot, draw, refused = shot_of(verb, *short(verb)), random.Random(verb), 0
    needed = 2 * 2**20 if shot.job.is_training else 2**17
    for size in sorted(draw.randrange(4096, needed, 4096) for _ in range(25)):
        small_disk(size)
        child = shot.start()
        code = child.wait()
        small_disk("100m")
        if code == 0:
            assert shot.job.outcome() == shot.expected
            shot.job.remove()
        else:
            refused += 1
            check_refused(shot, code, child.said, "No space left on device")
    assert refused >= 5
    record_property("figure", f"{verb}: on a tmpfs of 25 sizes, {refused} times full: all went on to the same bits")
