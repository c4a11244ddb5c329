"""A disk that is full or fails at any write costs nothing that was saved: one line says so, nothing is left over."""

import random
import subprocess

import pytest

from nanollm.train.checkpoint import checkpoints, verify
from tests.faults.processes import Fault
from tests.faults.test_kills import VERBS, Shot, short

REASON = {Fault.FULL: "No space left on device", Fault.BROKEN: "Input/output error"}


def check_refused(shot, code, said, reason):
    """The command ended in one line about the disk; its checkpoints are sound; once there is room it goes on."""
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith(f"nanollm {shot.job.verb}: ")]
    assert reason in line and "Traceback" not in said
    for path in checkpoints(shot.job.out / "checkpoints"):
        verify(path)
    shot.end()


@pytest.mark.parametrize("every", [53, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", [Fault.FULL, Fault.BROKEN], ids=["full", "broken"])
@pytest.mark.parametrize("verb", VERBS)
def test_from_a_disk_that_fails_at_any_write_a_job_recovers(
    job_of, children, tmp_path, record_property, verb, fault, every
):
    shot, struck, harmless = Shot(job_of(verb, *short(verb)), children, tmp_path), 0, 0
    for moment in range(0, shot.moments, every):
        child = shot.start(fault, moment)
        if (code := child.wait()) == 0:  # as where only a file is deleted after it
            assert shot.job.outcome() == shot.expected
            shot.job.remove()
            harmless += 1
        else:
            check_refused(shot, code, child.said, REASON[fault])
            struck += 1
    assert struck > harmless
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
    job_of, children, tmp_path, small_disk, record_property, verb
):
    small_disk("100m")
    shot, draw, refused = Shot(job_of(verb, *short(verb)), children, tmp_path), random.Random(verb), 0
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
