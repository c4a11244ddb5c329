"""Progress of a long step: how far, how fast, and how long it will still take.

Everything goes to stderr: a live bar on a terminal, otherwise one plain line per interval and one at the end, so that
a log file stays readable. Colours follow the terminal; NO_COLOR turns them off (https://no-color.org).
"""

import os
import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

INTERVAL_S = 10.0  # between two plain lines
RECENT_S = 300.0  # that the rate is of: long enough for pauses, short enough to notice that the machine got slower

_quiet = False
_live: "Progress | None" = None  # the one bar that owns the terminal's last line


def set_quiet(quiet: bool) -> None:
    """Silence every bar and line of this process; ranks other than the first are quiet."""
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """Print one line to stderr, above the live bar if there is one."""
    if _quiet:
        return
    if _live is not None and _live.console is not None:
        _live.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """A long step of `total` units (None: unknown), `done` of which were finished by an earlier run.

    A bar that is opened inside another one writes plain lines above it.
    """

    def __init__(self, task: str, total: int | None = None, unit: str = "", *, done: int = 0) -> None:
        self.task, self.total, self.unit, self.done = task, total, unit, done
        self.console: Console | None = None
        self._already = done  # finished before, so neither fast nor slow
        self._marks: deque[tuple[float, int]] = deque()  # moments of the last minutes, and what was done by then
        self._note = ""
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._started = self._spoken = time.monotonic()
        self._marks.append((self._started, self._already))
        if not _quiet and _live is None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._open_bar()
        return self

    def advance(self, n: int = 1, *, restarts: bool = False) -> None:
        """Count n more units. `restarts`: they bore the costs of starting, so rate and time left begin behind them."""
        self.done += n
        if restarts:
            self._marks.clear()
        self._mark()
        self._show()

    def leave_out(self, seconds: float) -> None:
        """The last seconds were work of another kind: they change neither rate nor time left."""
        self._marks = deque((moment + seconds, done) for moment, done in self._marks)

    def note(self, text: str) -> None:
        """Show a few words behind the numbers, until the next note."""
        self._note = text
        self._show()

    def status(self) -> str:
        """The numbers in one line: `1,200 of 5,000 docs, 310 docs/s, 12 s left, shard 3`; the rate is a recent one."""
        return self._status_since(*self._marks[0])

    def _status_since(self, moment: float, done: int) -> str:
        elapsed = time.monotonic() - moment
        rate = (self.done - done) / elapsed if elapsed >= 1 else 0.0  # before that it would be noise
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of} {self.unit}".rstrip()]
        if rate > 0:
            number = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
            parts.append(f"{number} {self.unit}/s".replace(" /s", "/s"))
        if rate > 0 and self.total is not None and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self._note] if self._note else parts)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close_bar()
        self._note = ""
        outcome = "in" if kind is None else "stopped after"
        status = self._status_since(self._started, self._already)  # of all the time
        say(f"{self.task}: {status}, {outcome} {duration(time.monotonic() - self._started)}")

    def _mark(self) -> None:
        """Remember this moment, once a second, and forget those of which the next one is old enough."""
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append((now, self.done))
        while len(self._marks) > 1 and now - self._marks[1][0] >= RECENT_S:
            self._marks.popleft()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done)
        elif time.monotonic() - self._spoken >= INTERVAL_S:
            self._spoken = time.monotonic()
            say(f"{self.task}: {self.status()}")

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column
        from rich.text import Text

        class Status(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(task.fields["status"]())

        global _live
        self.console = Console(stderr=True)
        status = Status(table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), status)
        self._bar = RichProgress(*columns, console=self.console, transient=True, refresh_per_second=4)
        self._bar.add_task(self.task, total=self.total, completed=self.done, status=self.status)
        self._bar.start()
        _live = self

    def _close_bar(self) -> None:
        global _live
        if self._bar is not None:
            self._bar.stop()
            self._bar, self.console, _live = None, None, None


def duration(seconds: float) -> str:
    """Seconds as people say them: `8 s`, `3 min 05 s`, `2 h 40 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
