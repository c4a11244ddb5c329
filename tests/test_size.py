"""The package stays as small as it has become: lines, files, options, and what a verb must load.

`python -m tests.test_size` prints the figures. A figure that rises above its limit fails here. The way out is to remove
something else, or to raise the limit in the commit that needs it and to say why in docs/decisions/.
"""

import importlib
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from nanollm import cli
from nanollm.config import SWITCHES, kinds_of
from tests.test_floor_plan import PACKAGE, Imports, read_imports

LIMITS = {
    "package, lines of Python": 26_150,
    "package, files": 149,
    "options of all verbs": 464,
    "modules behind pretrain": 52,
    "modules behind rl.grpo": 51,
    "modules behind serve": 34,
}
"""What was reached, rounded up."""


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def leaf_options() -> int:
    """Options that hold a value, over all verbs, without --config, --help and the like."""
    stages = [importlib.import_module(cli.module_of(verb)) for verb in cli.all_verbs()]
    kinds = [kind for stage in stages for name, kind in kinds_of(stage).items() if name not in common()]
    return sum(not is_dataclass(kind) for kind in kinds)


def common() -> set[str]:
    return {"config", *SWITCHES}


def closure(module: str, imports: Imports) -> set[str]:
    """A module of ours and all that it imports, at once or later."""
    found, left = {module}, [module]
    while left:
        new = (imports[left.pop()] & imports.keys()) - found
        found |= new
        left += new
    return found


def figures() -> dict[str, int]:
    files, imports = python_files(PACKAGE), read_imports(PACKAGE)
    return {
        "package, lines of Python": sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files),
        "package, files": len(files),
        "options of all verbs": leaf_options(),
        "modules behind pretrain": len(closure("stages.pretrain", imports)),
        "modules behind rl.grpo": len(closure("rl.grpo", imports)),
        "modules behind serve": len(closure("serve.app", imports)),
    }


@pytest.fixture(scope="module")
def measured():
    return figures()


@pytest.mark.parametrize("name", LIMITS)
def test_the_package_does_not_grow_unseen(measured, name):
    advice = "remove something, or raise the limit here and say why in docs/decisions/"
    assert measured[name] <= LIMITS[name], f"{name}: {measured[name]:,}, at most {LIMITS[name]:,}; {advice}"


def test_a_closure_follows_imports_of_imports():
    imports = {"a": {"b", "torch"}, "b": {"c"}, "c": {"a"}, "d": set()}
    assert closure("a", imports) == {"a", "b", "c"}
    assert closure("d", imports) == {"d"}


if __name__ == "__main__":
    for name, value in figures().items():
        print(f"{name:<26}{value:>8,}   (at most {LIMITS[name]:,})")
