"""How threads wait is ours to choose, unless the user has; while cores are contended they wait differently."""

import os
import subprocess
import sys
import threading
import time

import pytest

from nanollm import threads

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="libgomp and /proc are Linux's")
SAYS = "import os, nanollm; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"


@LINUX
@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "active 300000"), ({"OMP_WAIT_POLICY": "passive"}, "passive None"), ({"GOMP_SPINCOUNT": "7"}, "None 7")],
    ids=str,
)
def test_what_the_user_chose_for_waiting_threads_is_kept(given, found):
    environment = {name: value for name, value in os.environ.items() if name not in threads.WAITING} | given
    said = subprocess.run([sys.executable, "-c", SAYS], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == found


def test_nothing_is_chosen_once_torch_is_there(monkeypatch):
    for name in threads.WAITING:
        monkeypatch.delenv(name, raising=False)
    import torch  # noqa: F401

    assert not threads.choose_waiting()
    assert "GOMP_SPINCOUNT" not in os.environ


def holds_a_team():
    return any(thread.name == "hold_a_team" for thread in threading.enumerate())


def test_a_team_is_held_while_cores_are_contended_and_that_is_said_once(monkeypatch, capsys):
    in_line, step, stop = 0.0, 0.0, threading.Event()

    def seconds():
        nonlocal in_line
        in_line += step
        return in_line

    monkeypatch.setattr(threads, "seconds_in_line", seconds)
    monkeypatch.setattr(threads, "INTERVAL_S", 0.02)
    watching = threading.Thread(target=threads._watch, args=[stop])
    watching.start()
    try:
        for held in (True, False, True, False):
            step = 1.0 if held else 0.0
            deadline = time.monotonic() + 20
            while holds_a_team() is not held and time.monotonic() < deadline:
                time.sleep(0.01)
            assert holds_a_team() is held
    finally:
        stop.set()
        watching.join()
    assert capsys.readouterr().err.count("other programs are at work (load ") == 1


@LINUX
def test_the_time_in_line_for_a_core_is_known_while_threads_come_and_go():
    stop = threading.Event()

    def start_short_threads():
        while not stop.is_set():
            threading.Thread(target=stop.is_set).start()

    starting = threading.Thread(target=start_short_threads)
    starting.start()
    try:
        times = [threads.seconds_in_line() for _ in range(300)]
    finally:
        stop.set()
        starting.join()
    assert all(seconds is not None and seconds >= 0 for seconds in times)
