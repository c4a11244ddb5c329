"""Which figures does docs/reliability.md tell?  Those of the last `make faults` and `make soak`.

    python -m tests.faults.report [FILE ...]

A FILE is what pytest wrote with --junitxml, a later one of tests that were run once more. They go to
figures/battery.json first, if nothing failed at last. The page then gets the figures of this folder, between its marks.
"""

import ast
import datetime
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from nanollm.origin import commit, hardware

HERE = Path(__file__).parent
FIGURES = HERE / "figures"
PAGE = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: written by make faults and make soak -->\n", "<!-- end of figures -->\n"
LABELS = {
    "tokens_per_s": "tokens/s",
    "steps_per_processor_s": "steps per second of processor time",
    "memory_bytes": "memory",
    "files": "open files",
    "threads": "threads",
}


def battery_of(junit: Sequence[Path]) -> dict[str, object]:
    """Promises, counts and figures by module. SystemExit if a test failed: a page tells what holds."""
    import torch

    cases = {}
    for file in junit:
        cases |= {(c.attrib["classname"], c.attrib["name"]): c for c in ElementTree.parse(file).iter("testcase")}
    areas: dict[str, dict[str, object]] = {}
    for case in cases.values():
        name = case.attrib["classname"].rpartition(".")[2]
        if case.find("failure") is not None or case.find("error") is not None:
            sys.exit(f"{name}::{case.attrib['name']} failed; the page keeps its old figures")
        area = areas.setdefault(name, {"passed": 0, "skipped": 0, "seconds": 0.0, "figures": []})
        area["skipped" if case.find("skipped") is not None else "passed"] += 1
        area["seconds"] = round(area["seconds"] + float(case.attrib["time"]), 1)
        area["figures"] += [each.attrib["value"] for each in case.iter("property") if each.attrib["name"] == "figure"]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit() or "unknown",
        "hardware": hardware() | {"torch": torch.__version__},
        "areas": {name: areas[name] for name in sorted(areas)},
    }


def promise_of(module: str) -> str:
    """The first paragraph of a test module's docstring."""
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    return " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())


def section() -> str:
    """The part of the page that is computed."""
    return "\n".join([*battery_lines(), *soak_lines()])


def battery_lines() -> list[str]:
    """Each area's promise and how many of its tests held; nothing before the first `make faults`."""
    if not (FIGURES / "battery.json").exists():
        return []
    battery = json.loads((FIGURES / "battery.json").read_bytes())
    machine = battery["hardware"]
    lines = [
        f"Measured on {battery['date']} at commit {battery['commit']} (+: and changes), on {machine['cores']} cores "
        f"({machine['processor']}), torch {machine['torch']}.",
        "",
    ]
    lines += ["| promise | tests | seconds |", "|---|---|---|"]
    for name, area in battery["areas"].items():
        skipped = f", {area['skipped']} skipped" if area["skipped"] else ""
        tests = f"[{name}](../tests/faults/{name}.py): {area['passed']} passed{skipped}"
        lines.append(f"| {promise_of(name)} | {tests} | {area['seconds']:,.0f} |")
    return [*lines, "", "What each counted is in [battery.json](../tests/faults/figures/battery.json).", ""]


def soak_lines() -> list[str]:
    """What the long runs showed, as far as there were any."""
    lines = []
    for file in sorted(FIGURES.glob("*_soak.json")):
        seen = json.loads(file.read_bytes())
        title = f"**{file.stem.replace('_', ' ').capitalize()}**, {seen['minutes']:.0f} minutes"
        lines += [f"{title} (`python -m tests.faults.{file.stem}`): {'; '.join(told(seen))}.", ""]
    return lines


def told(seen: dict[str, object]) -> list[str]:
    """A line for each number of a long run; what drifted, with its first and its last value."""
    lines = []
    for name, value in seen.items():
        label = LABELS.get(name, name.replace("_", " "))
        if isinstance(value, list):  # of several lives of a server
            lines += [f"{label}, {number}: {flat(each)}" for number, each in enumerate(value, start=1)]
        elif isinstance(value, dict) and "drift" in value:
            lines.append(
                f"{label}: {value['first']:,.6g} at first, {value['last']:,.6g} at last ({value['drift']:+.2%})"
            )
        elif name != "minutes":
            lines.append(f"{label}: {flat(value)}")
    return lines


def flat(value: object) -> str:
    """A number, or several with their names, as people write them."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {flat(each)}" for name, each in value.items()) or "none"
    return " to ".join(map(flat, value)) if isinstance(value, list) else f"{value:,}"


def main() -> None:
    if sys.argv[1:]:
        FIGURES.mkdir(exist_ok=True)
        battery = battery_of([Path(name) for name in sys.argv[1:]])
        (FIGURES / "battery.json").write_text(json.dumps(battery, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + section() + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
