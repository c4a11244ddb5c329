"""Do imports point down the floor plan, those inside functions too?"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nanollm"

FLOORS = {
    7: ["__main__", "cli"],
    6: ["stages"],
    5: ["serve", "export", "evals", "rl", "report", "curate"],
    4: ["generate", "train"],
    3: ["data", "bundle"],
    2: ["sources"],
    1: ["text", "model", "kernels"],
    0: [
        "__init__",
        "world",
        "heartbeat",
        "progress",
        "config",
        "durable",
        "extras",
        "hardware",
        "origin",
        "threads",
    ],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
WITHOUT_TORCH = ("text", "sources")
MEETING_PLACES = {"bundle", *(room for room, floor in FLOOR_OF.items() if floor >= 4)}  # of text and model

Imports = Mapping[str, set[str]]  # dotted module -> the modules it imports, others' by their first name


def read_imports(package: Path) -> Imports:
    """All imports of all modules of a package, wherever in the file they stand."""
    files = {module_name(package, file): file for file in sorted(package.rglob("*.py"))}
    return {module: set(imported_by(file, module, set(files))) for module, file in files.items()}


def module_name(package: Path, file: Path) -> str:
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_by(file: Path, module: str, known: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; write it out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            yield (ours(rest, known) if first == "nanollm" else first)


def ours(name: str, known: set[str]) -> str:
    """The module of ours that holds a dotted name: text.chat.Message is in text.chat."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or "__init__"


def room(module: str) -> str:
    return module.partition(".")[0]


def faults(imports: Imports) -> list[str]:
    """Everything that breaks the plan, one line each."""
    found = [f"{name} has no floor" for name in sorted({room(module) for module in imports} - FLOOR_OF.keys())]
    planned = {module: targets for module, targets in imports.items() if room(module) in FLOOR_OF}
    for module, targets in planned.items():
        for target in sorted(targets & planned.keys()):
            if FLOOR_OF[room(target)] > FLOOR_OF[room(module)]:
                found.append(f"{module} imports {target}, which is above it")
        rooms = {room(target) for target in targets} | {room(module)}
        if {"text", "model"} <= rooms and room(module) not in MEETING_PLACES:
            found.append(f"text and model meet in {module}")
        if room(module) in WITHOUT_TORCH and (chain := way_to("torch", module, imports)):
            found.append(f"torch reaches {room(module)}: {' -> '.join(chain)}")
    return found + cycles(imports)


def way_to(goal: str, module: str, imports: Imports) -> list[str]:
    """A chain of imports from a module to a goal; empty if there is none."""
    chains, seen = [[module]], {module}
    for chain in chains:
        for target in sorted(imports.get(chain[-1], set()) - seen):
            if target == goal:
                return [*chain, goal]
            seen.add(target)
            chains.append([*chain, target])
    return []


def cycles(imports: Imports) -> list[str]:
    """A circle of modules, or of rooms: neighbours on one floor import each other in one direction only."""
    modules = {module: {target for target in targets if target in imports} for module, targets in imports.items()}
    rooms: dict[str, set[str]] = {}
    for module, targets in modules.items():
        rooms.setdefault(room(module), set()).update({room(target) for target in targets} - {room(module)})
    found = []
    for graph in (modules, rooms):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(f"import in a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def test_imports_point_down_the_floor_plan_and_never_in_a_circle():
    assert faults(read_imports(PACKAGE)) == []


def plant(package: Path, **modules: str) -> Path:
    for name, source in modules.items():
        file = package / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("modules", "fault"),
    [
        (
            {"text__chat": "def f():\n    from nanollm.train import loss", "train__loss": ""},
            "train.loss, which is above",
        ),
        ({"data__a": "from nanollm.data import b", "data__b": "import nanollm.data.a"}, "circle: data.a -> data.b"),
        (
            {"train__a": "import nanollm.generate.b", "generate__b": "", "generate__c": "import nanollm.train.a"},
            "circle",
        ),
        ({"text__chat": "import nanollm.world", "world": "import torch.nn"}, "text.chat -> world -> torch"),
        ({"data__a": "import nanollm.text.b, nanollm.model.c", "text__b": "", "model__c": ""}, "meet in data.a"),
        ({"model__a": "import nanollm.text.b", "text__b": ""}, "meet in model.a"),
        ({"utils": ""}, "utils has no floor"),
    ],
)
def test_a_planted_fault_is_caught(tmp_path, modules, fault):
    assert any(fault in line for line in faults(read_imports(plant(tmp_path, **modules))))


def test_a_class_name_is_used_once_and_modules_open_with_a_statement():
    homes: dict[str, list[str]] = {}
    questions = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if (ast.get_docstring(tree) or "").partition("\n")[0].endswith("?"):
            questions.append(file.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name != "Config":  # every stage has one of that name
                homes.setdefault(node.name, []).append(file.name)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
    assert questions == []
