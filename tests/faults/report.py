"""The figures of docs/reliability.md, from the last `make faults` and `make soak`.

    python -m tests.faults.report [FILE ...]

A FILE is pytest's --junitxml output; later files replace tests that were run again. If all tests passed, the results go
to figures/battery.json. The page then gets one table between its marks, from the JSON files in that folder.
"""

import datetime
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from nanollm.origin import commit, hardware

HERE = Path(__file__).parent
FIGURES = HERE / "figures"
PAGE = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: written by make faults and make soak -->\n", "<!-- end of figures -->\n"
OUTCOME = re.compile(r"(\d[\d,]*) of (\d[\d,]*)")  # "104 of 104 the same bits"


def battery_of(junit: Sequence[Path]) -> dict[str, object]:
    """Counts and figures by module. SystemExit if a test failed: the page reports only what holds."""
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


def section() -> str:
    """The generated part of the page; empty before the first `make faults`."""
    if not (FIGURES / "battery.json").exists():
        return ""
    battery = json.loads((FIGURES / "battery.json").read_bytes())
    machine = battery["hardware"]
    lines = [
        f"{battery['date']}, commit {battery['commit']}, {machine['cores']} cores ({machine['processor']}), "
        f"torch {machine['torch']}:",
        "",
        "| run | tests passed | cases that held | time |",
        "|---|---|---|---|",
    ]
    lines += [row_of(name, area) for name, area in battery["areas"].items()]
    lines += [row_of_soak(file) for file in sorted(FIGURES.glob("*_soak.json"))]
    return "\n".join([*lines, "", "[battery.json](../tests/faults/figures/battery.json) has each case.", ""])


def row_of(name: str, area: dict) -> str:
    """A module of the battery; its cases are those that its tests counted, such as kills or damaged files."""
    outcomes = [match.groups() for figure in area["figures"] if (match := OUTCOME.search(figure))]
    held, tried = (sum(int(each[n].replace(",", "")) for each in outcomes) for n in (0, 1))
    cases = f"{held:,} of {tried:,}" if tried else ""
    skipped = f", {area['skipped']} skipped" if area["skipped"] else ""
    return f"| [{name}](../tests/faults/{name}.py) | {area['passed']}{skipped} | {cases} | {area['seconds']:,.0f} s |"


def row_of_soak(file: Path) -> str:
    """A long run: what it counted, and how its figures drifted."""
    soak = json.loads(file.read_bytes())
    if "lives" in soak:
        drift = max(life["memory_drift_percent"] for life in soak["lives"])
        wrong = soak["wrong_bytes"] + soak["lost_otherwise"]
        found = f"{soak['replies']:,} replies, {wrong} wrong or lost while the server ran, memory {drift:+.2f} %"
    else:
        drifts = {"tokens/s": "tokens_per_s", "steps per CPU second": "steps_per_processor_s", "memory": "memory_bytes"}
        found = f"{soak['steps']:,} steps, " + ", ".join(
            f"{label} {100 * soak[key]['drift']:+.2f} %" for label, key in drifts.items()
        )
    return f"| [{file.stem}](../tests/faults/{file.stem}.py) | | {found} | {soak['minutes']:.0f} min |"


def main() -> None:
    if sys.argv[1:]:
        FIGURES.mkdir(exist_ok=True)
        battery = battery_of([Path(name) for name in sys.argv[1:]])
        (FIGURES / "battery.json").write_text(json.dumps(battery, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + section() + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
