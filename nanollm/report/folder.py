"""The folder of a run, read as values.

A run may be writing meanwhile: an incomplete last line is left out.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from nanollm.config import read_mapping
from nanollm.data.shards import read_manifest
from nanollm.durable import read_json
from nanollm.model.config import ModelConfig
from nanollm.train.run import STARTS

EARLIER = {  # names of metrics in earlier versions
    "reply_tokens": "completions/mean_length",
    "reply_tokens_max": "completions/max_length",
    "engine_logprob_difference": "sampling/sampling_logp_difference/mean",
    "engine_logprob_difference_max": "sampling/sampling_logp_difference/max",
}

Line = Mapping[str, Any]
Stage = Literal["pretrain", "sft", "grpo", "prefer", "distill"]


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run, as far as it has come."""

    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    starts: Sequence[Line]
    """When and where it was started, see train.run.note_start."""
    lines: Sequence[Line]
    """metrics.jsonl."""
    model: ModelConfig | None
    """None: it is written into the bundle, which is not there yet."""
    evaluations: Sequence[Line] = ()
    """Every eval.json beside its bundle."""
    rollouts: Sequence[Line] = ()
    """Replies of the newest step that was kept, of grpo."""
    quiet_s: float = 0.0
    """Seconds since the last line was written."""
    data: Mapping[str, Mapping[str, Any]]
    """Folders of token files that are still at their place, and their manifests."""
    earlier: Sequence[Path] = ()
    """Folders of the runs that made the bundle it began with, the first first, as far as they are at their place."""

    @property
    def stage(self) -> Stage:
        marks: dict[str, Stage] = {"teacher": "distill", "rollout": "grpo", "objective": "prefer", "bundle": "sft"}
        return next((stage for setting, stage in marks.items() if setting in self.settings), "pretrain")

    @property
    def steps(self) -> int:
        """Steps in all, as the settings say."""
        return int(self.settings["train"]["steps"])

    @property
    def step(self) -> int:
        """The newest step that is told of."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def is_done(self) -> bool:
        return self.step >= self.steps

    @property
    def seconds(self) -> float | None:
        """How long it has trained until its last line, evaluations and saving included."""
        return sum(line["seconds"] for line in self.lines if "seconds" in line) or None

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of an optimizer step, where every step has as many."""
        if self.stage != "pretrain" or self.model is None:
            return None
        return int(self.settings["train"]["batch_size"]) * self.model.context_length

    @cached_property
    def numbers(self) -> Mapping[str, list[tuple[int, float]]]:
        """Every number of the log by its name, as (step, value)."""
        found: dict[str, list[tuple[int, float]]] = {}
        for line in map(_renamed, self.lines):
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault(name, []).append((line["step"], value))
        return found

    @property
    def loads(self) -> list[tuple[int, list[list[float]]]]:
        """Step, and of each Mixture of Experts the share of the tokens that each expert got."""
        return [(line["step"], line["expert_load"]) for line in self.lines if "expert_load" in line]

    @property
    def skipped(self) -> list[int]:
        """Steps whose update was left out."""
        return [line["step"] for line in self.lines if line.get("skipped")]


def read_run(folder: Path) -> RunFolder:
    """The run in a folder. ValueError where there is none."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            runs = [folder.parent] if (folder / "provenance.json").exists() else []
            runs += sorted(file.parent for file in folder.glob("*/metrics.jsonl"))
            known = ", ".join(map(str, runs)) or "runs/NAME"
            raise ValueError(f"{folder} is not the folder of a run: it has no {name}; give one such as {known}")
    settings = read_mapping(folder / "config.yaml")
    inputs = folder / "inputs.json"
    return RunFolder(
        name=folder.resolve().name,
        settings=settings,
        inputs=read_json(inputs) if inputs.exists() else {},
        starts=_lines(folder / STARTS) if (folder / STARTS).exists() else [],
        lines=_lines(folder / "metrics.jsonl"),
        model=_model(folder, settings),
        evaluations=[read_json(file) for file in sorted(folder.glob("eval/*/eval.json"))],
        rollouts=_newest_rollouts(folder / "rollouts"),
        quiet_s=max(0.0, time.time() - (folder / "metrics.jsonl").stat().st_mtime),
        data=_manifests(settings.get("data")),
        earlier=_earlier(settings),
    )


def _earlier(settings: Mapping[str, Any]) -> list[Path]:
    run = Path(settings.get("bundle", "")).resolve().parent
    if "bundle" not in settings or not (run / "config.yaml").exists():
        return []
    return [*_earlier(read_mapping(run / "config.yaml")), run]


def _lines(path: Path, needs: str = "step") -> list[Line]:
    """The complete lines of a file that somebody may be writing; each has the key `needs`."""
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            parsed = json.loads(line)
            parsed[needs]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged ({error!r}); remove that line") from error
        lines.append(parsed)
    return lines


def _renamed(line: Line) -> Line:
    """The line of an earlier version by the names of this one."""
    if "groups_dropped" in line:
        line = {**line} | {"frac_reward_zero_std": line["groups_dropped"] / line["groups"]}
    if "finished" in line:
        line = {**line} | {"completions/clipped_ratio": 1 - line["finished"]}
    parts = {name: f"rewards/{name[7:]}/mean" for name in line if name.startswith("reward_") and name != "reward_std"}
    return {(EARLIER | parts).get(name, name): value for name, value in line.items()}


def _model(folder: Path, settings: Mapping[str, Any]) -> ModelConfig | None:
    """Of its settings if it makes a model; else of its bundle, or until that is there of the one it started from."""
    bundles = [folder / "bundle", *([Path(settings["bundle"])] if "bundle" in settings else [])]
    files = [bundle / "config.json" for bundle in bundles if (bundle / "config.json").exists()]
    shape = settings.get("model") or (read_json(files[0])["model"] if files else None)
    try:
        return ModelConfig(**shape) if shape else None
    except TypeError as error:
        raise ValueError(
            f"the model of {folder} is not one of this version ({error}); use that which trained it"
        ) from error


def _newest_rollouts(folder: Path) -> list[Line]:
    files = sorted(folder.glob("step-*.jsonl"))
    return _lines(files[-1], "question") if files else []


def _manifests(data: object) -> dict[str, Mapping[str, Any]]:
    """Manifests of the folders that a run names and that are still there: `data` is one, or several with weights."""
    names = list(data) if isinstance(data, Mapping) else [str(data)] if data else []
    return {name: read_manifest(Path(name))[0] for name in names if (Path(name) / "manifest.json").exists()}
