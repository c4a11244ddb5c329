"""One HTML page of a run's folder, or of several to compare."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from nanollm.durable import check_writable
from nanollm.progress import duration, say
from nanollm.report.folder import read_run
from nanollm.report.page import PAGE, write_page

POSITIONAL = ("run",)
COMPARED = "compared.html"
WATCH_S = 10.0
"""Between two writings of --watch."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write a self-contained HTML page of a run: settings, curves, expert load, samples, scores and time.

    Every run writes it at its end; this is for one that goes on, for scores that came later, and for comparing.
    """

    run: Path
    """Folder of a run, such as runs/demo/pretrain."""
    compare: list[Path] = field(default_factory=list)
    """Folders of other runs, whose curves are drawn over those of the first."""
    out: Path | None = None
    """The page; null: report.html in the folder of the run, and with --compare compared.html there."""
    watch: bool = False
    """Rewrite the page every 10 s until all its runs are done; a browser that shows it reloads it."""

    @property
    def page(self) -> Path:
        return self.out or self.run / (COMPARED if self.compare else PAGE)


def run(c: Config) -> Path:
    """Write the page and return its path."""
    folders = [c.run, *c.compare]
    while c.watch and not (c.run / "metrics.jsonl").exists():
        say(f"{c.run} has no metrics.jsonl yet; waiting for the run to begin")
        time.sleep(WATCH_S)
    runs = [read_run(folder) for folder in folders]
    check_writable(c.page.parent, "--out")
    while c.watch and not all(run.is_done for run in runs):
        write_page(c.page, runs, WATCH_S)
        say(f"step {runs[0].step:,} of {runs[0].steps:,}, {duration(runs[0].quiet_s)} ago: {c.page}")
        time.sleep(WATCH_S)
        runs = [read_run(folder) for folder in folders]
    write_page(c.page, runs)
    return c.page
