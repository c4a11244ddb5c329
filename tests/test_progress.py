"""A long step is told once per interval in a log, live on a terminal, and never on stdout."""

import io
import re
from contextlib import redirect_stderr

import pytest

from nanollm import progress
from nanollm.progress import Progress, duration, say, set_quiet


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_a_log_gets_one_line_per_interval_and_one_at_the_end(clock, capsys):
    with Progress("tokenize", total=5_000, unit="docs") as bar:
        for _ in range(30):
            clock.now += 1
            bar.advance(100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "tokenize: 1,000 of 5,000 docs, 100 docs/s, 40 s left",
        "tokenize: 2,000 of 5,000 docs, 100 docs/s, 30 s left",
        "tokenize: 3,000 of 5,000 docs, 100 docs/s, 20 s left",
        "tokenize: 3,000 of 5,000 docs, 100 docs/s, 20 s left, in 30 s",
    ]


def test_an_unknown_total_shows_count_and_rate_only(clock, capsys):
    with Progress("read", unit="bytes") as bar:
        clock.now += 12
        bar.advance(6)
    assert capsys.readouterr().err.splitlines() == [
        "read: 6 bytes, 0.50 bytes/s",
        "read: 6 bytes, 0.50 bytes/s, in 12 s",
    ]


def test_work_done_by_an_earlier_run_counts_but_does_not_make_it_fast(clock):
    with Progress("train", total=100, unit="steps", done=60) as bar:
        clock.now += 10
        bar.advance(10)
        assert bar.status() == "70 of 100 steps, 1.00 steps/s, 30 s left"


def test_the_rate_is_that_of_the_last_minutes_and_at_the_end_that_of_all(clock, capsys):
    with Progress("train", total=2_000, unit="steps") as bar:
        for seconds in (1, 4):  # the machine gets four times slower
            for _ in range(400):
                clock.now += seconds
                bar.advance()
        assert bar.status() == "800 of 2,000 steps, 0.25 steps/s, 1 h 20 min left"
    assert capsys.readouterr().err.splitlines()[-1].startswith("train: 800 of 2,000 steps, 0.40 steps/s")


def test_the_time_left_counts_neither_the_costs_of_starting_nor_pauses(clock, capsys):
    with Progress("train", total=70, unit="steps") as bar:
        clock.now += 85  # validation at step 0, and compiling in the first step
        bar.advance(restarts=True)
        for _ in range(19):
            clock.now += 2
            bar.advance()
        clock.now += 30  # validation
        bar.leave_out(30)
        assert bar.status() == "20 of 70 steps, 0.50 steps/s, 1 min 40 s left"
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "train: 1 of 70 steps"
    assert told[1] == "train: 6 of 70 steps, 0.50 steps/s, 2 min 08 s left"
    assert told[-1].startswith("train: 20 of 70 steps, 0.13 steps/s")  # of all the time


def test_a_note_stands_behind_the_numbers(clock, capsys):
    with Progress("train", total=2) as bar:
        bar.note("loss 3.21")
        clock.now += 10
        bar.advance()
    assert capsys.readouterr().err.startswith("train: 1 of 2, 0.10/s, 10 s left, loss 3.21\n")


def test_an_error_inside_is_told_as_stopped_and_passes_through(clock, capsys):
    with pytest.raises(KeyError), Progress("train", total=3, unit="steps"):
        clock.now += 1
        raise KeyError
    assert capsys.readouterr().err == "train: 0 of 3 steps, stopped after 1 s\n"


def test_a_quiet_process_says_nothing(clock, capsys):
    set_quiet(True)
    try:
        with Progress("train", total=1) as bar:
            clock.now += 60
            bar.advance()
            say("hello")
    finally:
        set_quiet(False)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_live_bar_and_lines_above_it(terminal, capsys):
    with redirect_stderr(terminal), Progress("train [b]", total=10, unit="steps") as bar:
        bar.advance(4)
        say("sample: [bold] \\[x] 1 / 2")
        with Progress("validate", total=1) as inner:  # inside another: plain lines above the bar
            inner.advance()
    shown = terminal.getvalue()
    assert "train [b]" in shown
    assert "4 of 10 steps" in shown
    assert "sample: [bold] \\[x] 1 / 2" in shown
    assert re.search(r"validate: 1 of 1, .*in 0 s", shown)
    assert "\x1b[" in shown
    assert capsys.readouterr().out == ""


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(terminal), Progress("train", total=1) as bar:
        bar.advance()
    assert terminal.getvalue() == "train: 1 of 1, in 0 s\n"


def test_after_a_failure_the_next_bar_works(terminal):
    with redirect_stderr(terminal), pytest.raises(KeyError), Progress("first", total=3):
        raise KeyError
    with redirect_stderr(terminal), Progress("second", total=3) as bar:
        bar.advance()
    assert "1 of 3" in terminal.getvalue()
    assert progress._live is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (9_600, "2 h 40 min"),
        (9e6, "2,500 h 00 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
