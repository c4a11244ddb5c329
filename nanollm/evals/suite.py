"""Which tasks of lm-evaluation-harness make up one figure, and how?

A suite is a YAML file: tasks with their shots and metric. Each accuracy is centred, (accuracy - chance) / (1 - chance),
so that 0 is what guessing scores and 1 is everything right, and the figure is the mean over the tasks.
Source: CORE of DCLM, arXiv:2406.11794, section 3.5.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nanollm.evals.figures import Figures
from nanollm.evals.intervals import Mean, average
from nanollm.settings import read_mapping

FOLDER = Path(__file__).parent / "suites"
EXAMPLE = "tasks: {mine: {task: hellaswag, metric: acc_norm, shots: 0}}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A task of a suite."""

    task: str
    """lm_eval's name of it."""
    metric: str
    shots: int = 0
    chance: float | None = None
    """What guessing scores; None: one over the number of choices, and 0 where nothing is chosen."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of lm_eval's task, in place of its own."""

    def __post_init__(self) -> None:
        if self.shots < 0 or not 0 <= (self.chance or 0) < 1:
            got = f"{self.shots} and {self.chance}"
            raise ValueError(f"{self.task}: shots must be at least 0 and chance from 0 to below 1, got {got}")


@dataclass(frozen=True)
class Suite:
    """Tasks by their names in it, and those that belong to it and cannot be asked, with the reason."""

    name: str
    members: Mapping[str, Member]
    missing: Mapping[str, str]

    def key(self, member: str) -> str:
        """What a task is called beside those of other suites."""
        return f"{self.name}:{member}"

    def score(self, tasks: Figures) -> Figures:
        """The figure of the suite from those of its tasks: see evals/answers.py."""
        of_tasks: Figures = {}
        centred: dict[str, list[Mean]] = defaultdict(list)  # by lm_eval's task: the same documents
        for name, member in self.members.items():
            figures, chance = tasks[self.key(name)], self.chance(name, tasks)
            accuracy = figures["metrics"][member.metric]
            mean = Mean(accuracy["value"], accuracy["low"], accuracy["high"]).scaled(chance, 1)
            centred[member.task].append(mean)
            of_tasks[self.key(name)] = {"metric": member.metric, "chance": chance, "centred": mean.value}
        mean = average(list(centred.values()))
        return {
            "value": mean.value,
            "low": mean.low,
            "high": mean.high,
            "n": sum(tasks[self.key(name)]["n"] for name in self.members),
            "tasks": of_tasks,
            "missing": dict(self.missing),
        }

    def difference(self, tasks: Figures, differences: Figures) -> Figures:
        """The same of what two models differ by on the same documents."""
        found: dict[str, list[Mean]] = defaultdict(list)
        for name, member in self.members.items():
            each = differences[self.key(name)][member.metric]
            span = 1 - self.chance(name, tasks)
            found[member.task].append(Mean(each["difference"], each["low"], each["high"]).scaled(0, span))
        mean = average(list(found.values()))
        return {"difference": mean.value, "low": mean.low, "high": mean.high}

    def chance(self, name: str, tasks: Figures) -> float:
        """What guessing scores in a task."""
        given, counted = self.members[name].chance, tasks[self.key(name)]["chance"]
        return float(given if given is not None else counted or 0.0)


def is_suite(name: str) -> bool:
    """Whether this is one of ours, or a file with one."""
    return name.endswith(".yaml") or name in ours()


def ours() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read_suite(name: str) -> Suite:
    """One of ours by its name, or a file of one's own."""
    file = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"--harness {name} does not exist; it should be a suite, such as {EXAMPLE}")
    settings = read_mapping(file)
    members = settings.get("tasks")
    if not isinstance(members, dict) or not members or settings.keys() - {"tasks", "missing"}:
        raise ValueError(f"{file} is not a suite: expected tasks and perhaps missing, such as {EXAMPLE}")
    return Suite(
        file.stem, {key: read_member(file, key, each) for key, each in members.items()}, settings.get("missing", {})
    )


def read_member(file: Path, name: str, settings: object) -> Member:
    known = [option.name for option in fields(Member)]
    if not isinstance(settings, dict) or not {"task", "metric"} <= settings.keys() <= set(known):
        raise ValueError(f"{file}, {name}: expected task and metric, and perhaps {', '.join(known[2:])}")
    return Member(**settings)
