"""Runs benchmarks: speed beside what others use and beside what this machine can do.

    python benchmarks/run.py NAME [NAME ...] [--repeats N] [--compare] [--json] [--no_save] [options of the benchmark]

Each NAME is a module of this folder with `measure(options)`, which returns plain facts, and perhaps `add_options`;
without names all run that need no GPU. Every record goes to benchmarks/results/<date>_<hardware>_<name>.json with
commit, hardware and versions; options other than the defaults become part of its name. --compare shows the change
against the newest earlier record of the same hardware and options. Torch is imported where it is needed: the workers of
some benchmarks import this module again, and would wait for it.
"""

import argparse
import ast
import datetime
import importlib
import importlib.metadata
import json
import platform
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nanollm.origin import commit, hardware  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "sentencepiece", "transformers", "tokenizers", "trl", "xllamacpp")
LINE = 320  # letters of a record's longest line: a spread of nine values
HOW_IT_RUNS = ("repeats", "compare", "json", "no_save")  # options that do not change what is measured


def all_benchmarks() -> dict[str, str]:
    """The modules of this folder that have `measure`, and the first line of each docstring. Imports none of them."""
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


# --- words of the command line ---


def parser_of(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """A benchmark may give its own default to an option that all have."""
    parser = argparse.ArgumentParser(
        prog=f"python benchmarks/run.py {name}",
        description=module.__doc__,
        conflict_handler="resolve",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns, in each of which every side is measured once")
    parser.add_argument("--compare", action="store_true", help="show the change against the newest earlier record")
    parser.add_argument("--json", action="store_true", help="print the record instead of a table")
    parser.add_argument("--no_save", action="store_true", help="write no file to benchmarks/results/")
    if hasattr(module, "add_options"):
        module.add_options(parser)
    return parser


def read_words(words: list[str]) -> dict[str, argparse.Namespace]:
    """The options of every named benchmark. Raises ValueError for a name or an option that none of them has."""
    found = all_benchmarks()
    first_option = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    names, rest = words[:first_option], words[first_option:]
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"unknown benchmark {unknown[0]}; they are {', '.join(found)}")
    names = names or [name for name in found if not getattr(module_of(name), "NEEDS_GPU", False)]
    parsed = {name: parser_of(name, module_of(name)).parse_known_args(rest) for name in names}
    for word in rest:
        if all(word in strange for _, strange in parsed.values()):
            raise ValueError(f"{', '.join(names)}: no option takes {word}; --help lists them")
    return {name: options for name, (options, _) in parsed.items()}


def changed_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What the user set to something else than the default, except how it runs and where files are."""
    return {
        name: value
        for name, value in vars(options).items()
        if name not in HOW_IT_RUNS and value != parser.get_default(name) and not isinstance(value, Path)
    }


# --- the record ---


def versions() -> dict[str, str]:
    """Of Python and of the packages that take part, if they are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def record_of(name: str, module: ModuleType, options: argparse.Namespace) -> dict[str, Any]:
    """Run one benchmark and tell under which circumstances it ran."""
    record: dict[str, Any] = {"benchmark": name, "about": all_benchmarks()[name]}
    record |= {"date": datetime.date.today().isoformat(), "commit": commit() or "unknown", "hardware": hardware()}
    record |= {"versions": versions(), "options": changed_options(options, parser_of(name, module))}
    with redirect_stdout(sys.stderr):  # a peer may print what it likes
        facts: dict[str, Any] = module.measure(options)
    return record | facts


def path_of(record: Mapping[str, Any], results: Path) -> Path:
    """<date>_<hardware>_<name>.json, with options other than the defaults behind the name."""
    machine = record["hardware"]
    label = str(machine["gpu"] or f"{machine['cores']}-cores").replace(" ", "-").lower()
    options = (
        f"{name}-{'+'.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in record["options"].items()
    )
    words = re.sub(r"[^\w.+-]", "-", "_".join([record["benchmark"], *options]))
    return results / f"{record['date']}_{label}_{words}.json"


def to_json(value: Any, indent: str = "") -> str:
    """Indented JSON in which whatever fits on a line stands on one."""
    line = json.dumps(value)
    if len(line) + len(indent) <= LINE or not isinstance(value, (dict, list)):
        return line
    deeper = indent + "  "
    if isinstance(value, list) and '"' not in line:  # numbers: as many as fit on a line
        return f"[\n{textwrap.indent(textwrap.fill(line[1:-1], LINE), deeper)}\n{indent}]"
    if isinstance(value, dict):
        items, ends = [f"{json.dumps(key)}: {to_json(item, deeper)}" for key, item in value.items()], "{}"
    else:
        items, ends = [to_json(item, deeper) for item in value], "[]"
    return f"{ends[0]}\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}{ends[1]}"


# --- what is shown ---


def is_spread(value: object) -> bool:
    return isinstance(value, Mapping) and {"median", "least", "greatest"} <= value.keys()


def spreads(facts: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    """Every spread in a record, with the keys that lead to it."""
    for name, value in facts.items():
        if is_spread(value):
            yield (*path, name), value
        elif isinstance(value, Mapping):
            yield from spreads(value, (*path, name))


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def shown(spread: Mapping[str, float]) -> str:
    """Median (least to greatest)."""
    return f"{number(spread['median'])} ({number(spread['least'])} to {number(spread['greatest'])})"


def table(facts: Mapping[str, Any], indent: str = "  ") -> Iterator[str]:
    """A comparison as one line per side with its ratio; everything else as name and value, nested as it is."""
    if "sides" in facts:
        for side, spread in facts["sides"].items():
            ratio = facts.get("ratio", {}).get(side)
            line = f"{indent}{side:<28}{shown(spread):>32} {facts.get('unit', '')}"
            yield line.rstrip() + (f"   {shown(ratio)} x" if ratio else "")
    for name, value in facts.items():
        if name in ("sides", "ratio", "unit"):
            continue
        if is_spread(value):
            yield f"{indent}{name:<28}{shown(value):>32}"
        elif isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from table(value, indent + "  ")
        else:
            yield f"{indent}{name:<28}{number(value) if isinstance(value, float) else value!s:>32}"


def newest_before(record: Mapping[str, Any], results: Path) -> dict[str, Any] | None:
    """The newest earlier record of the same benchmark, hardware and options."""
    for path in sorted(results.glob("*.json"), reverse=True):  # names begin with the date
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = all(earlier.get(key) == record[key] for key in ("benchmark", "hardware"))
        if same and earlier.get("options", {}) == record["options"]:
            return {**earlier, "file": path.name}
    return None


def change_since(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """New over old of every figure that both have: of the medians, and the least and greatest that spreads allow."""
    old = dict(spreads(earlier))
    return {
        " / ".join(path): {
            "before": old[path]["median"],
            "now": new["median"],
            "change": new["median"] / old[path]["median"],
            "least": new["least"] / old[path]["greatest"],
            "greatest": new["greatest"] / old[path]["least"],
        }
        for path, new in spreads(record)
        if path in old and min(old[path]["least"], new["least"]) > 0
    }


def change_table(compared: Mapping[str, Any]) -> Iterator[str]:
    yield f"  against {compared['file']}, commit {compared['commit']}: new over old (within the spreads)"
    for name, change in compared["changes"].items():
        yield (
            f"    {name:<42}{number(change['before'])} -> {number(change['now'])}   {change['change']:.2f} x "
            f"({change['least']:.2f} to {change['greatest']:.2f})"
        )


def compare(record: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """What changed since the newest earlier record. Raises ValueError if there is none."""
    earlier = newest_before(record, results)
    if earlier is None:
        raise ValueError(f"{record['benchmark']}: no earlier record of this hardware and these options to compare with")
    return {"file": earlier["file"], "commit": earlier["commit"], "changes": change_since(earlier, record)}


# --- the command ---


def run_one(name: str, options: argparse.Namespace, results: Path) -> None:
    print(f"{name}: {all_benchmarks()[name]}", file=sys.stderr, flush=True)
    record = record_of(name, module_of(name), options)
    compared = None
    if options.compare:
        try:
            compared = compare(record, results)
        except ValueError as problem:
            print(problem, file=sys.stderr)  # what was measured is kept
    if not options.no_save:
        results.mkdir(exist_ok=True)
        path = path_of(record, results)
        path.write_text(to_json(record) + "\n", encoding="utf-8", newline="\n")
        print(f"  written to benchmarks/results/{path.name}", file=sys.stderr)
    if options.json:
        print(to_json(record | ({"compared": compared} if compared else {})), flush=True)
        return
    circumstances = ("benchmark", "about", "date", "commit", "hardware", "versions", "options")
    print(name)
    print("\n".join(table({key: value for key, value in record.items() if key not in circumstances})))
    if compared:
        print("\n".join(change_table(compared)))
    sys.stdout.flush()


def overview() -> str:
    return f"{__doc__}\n" + "\n".join(f"  {name:<16}{about}" for name, about in all_benchmarks().items())


def main(words: list[str], results: Path = RESULTS) -> int:
    """Exit status: 0 all measured, 1 one of them could not be, 2 unknown words."""
    if words and words[0] in ("-h", "--help"):
        print(overview())
        return 0
    try:
        asked = read_words(words)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    failed = 0
    for name, options in asked.items():
        try:
            run_one(name, options, results)
        except (ValueError, ModuleNotFoundError) as problem:
            print(f"{name}: {problem}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
