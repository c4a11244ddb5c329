"""The notebook and the scripts of examples/ work as they stand there."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nanollm.train.metrics import read_metrics

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = json.loads((EXAMPLES / "first_model.ipynb").read_text(encoding="utf-8"))

# Runs the code cells of standard input one after the other in one namespace, and shows what a cell ends with as Jupyter
# would: by its own picture if it has one.
RUN_CELLS = """
import ast, json, sys
namespace = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin), start=1):
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), namespace)
    shown = last and eval(compile(last, f"cell {number}", "eval"), namespace)
    if shown is not None:
        print(shown._repr_svg_() if hasattr(shown, "_repr_svg_") else repr(shown))
"""


def code_cells(**parameters):
    """The notebook's code; parameters replace those of the cell that is tagged so."""
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    small = f"{', '.join(parameters)} = {', '.join(map(str, parameters.values()))}" if parameters else None
    is_set = ["parameters" in cell["metadata"].get("tags", []) for cell in cells]
    assert is_set.count(True) == 1
    return [small if small and here else "".join(cell["source"]) for cell, here in zip(cells, is_set, strict=True)]


def run_notebook(folder, **parameters):
    """What it prints, run top to bottom in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", RUN_CELLS]
    cells = json.dumps(code_cells(**parameters))
    done = subprocess.run(command, input=cells, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run_script(monkeypatch, tmp_path, capsys):
    """What a script of examples/ prints, run as a user would, from a folder of the test."""

    def run(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.long
def test_the_notebook_runs_top_to_bottom_and_ends_with_a_bundle(tmp_path):
    printed = run_notebook(tmp_path, DOCUMENTS=40, PROBLEMS=300, STEPS=4, LESSONS=2)
    assert re.search(r"^loss \d\.\d\d at step 4, \d\.\d\d at step 4$", printed, re.MULTILINE)
    assert '<polyline points="' in printed
    assert "160 numbers per token instead of 768: 4.8 times less" in printed
    assert "steps of its parent: 4" in printed
    names = {file.name for file in (tmp_path / "runs" / "first_model" / "my-first-model").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.model", "provenance.json"}


def test_the_notebook_is_committed_without_outputs_and_names_no_machine():
    assert {cell["cell_type"] for cell in NOTEBOOK["cells"]} == {"code", "markdown"}
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert NOTEBOOK["metadata"].keys() == {"kernelspec", "language_info"}
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


@pytest.mark.long
def test_the_scripts_train_a_model_let_it_write_and_let_it_learn_a_task(run_script, tmp_path):
    base = run_script("train.py", "--out", "runs/mine", "--steps", 2)
    assert base == f"{Path('runs/mine/pretrain/bundle')}\n"

    written = run_script("generate.py", base.strip(), "--prompts", "The", "def f(", "--max_tokens", 12)
    first, second, streamed = written.split(f"\n{'-' * 40}\n")
    assert (first[:3], second[:6]) == ("The", "def f(")
    assert len(first) > 3
    assert streamed == f"{first}\n"

    taught = run_script("grpo_own_task.py", base.strip(), "--out", "runs/own", "--lessons", 1, "--steps", 1)
    assert taught == f"{Path('runs/own/grpo/bundle')}\n"
    step = read_metrics(tmp_path / "runs" / "own" / "grpo")[-1]
    assert (step["groups"], step["faults"], "rewards/correct/mean" in step) == (32, 0, True)


def test_the_task_of_the_example_takes_what_is_between_and_nothing_else(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    task = importlib.import_module("grpo_own_task").Between()
    problem = task.problems("test")[0]
    low, high = map(int, re.findall(r"\d+", problem.question))
    replies = [f"{low}", f"{low + 1}", f"{high - 1}", f"{high}", "", " 30", "\u0663\u0660", "thirty", f"{low + 1}."]
    assert [task.grade(problem, reply) for reply in replies] == [False, True, True] + [False] * 6
    assert task.problems("train")[:5] == task.problems("train")[:5] != task.problems("test")[:5]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_script_says_how_it_is_run_on_what_and_how_long_and_does_nothing_when_imported(script):
    text = script.read_text(encoding="utf-8")
    for what in ("command   python examples/" + script.name, "hardware  ", "time      "):
        assert f"\n  {what}" in text
    assert '\nif __name__ == "__main__":\n' in text
    assert text.count("\n") < 80


@pytest.mark.slow
def test_the_notebook_as_it_stands_makes_a_model_that_solves_new_problems(tmp_path):
    printed = run_notebook(tmp_path)
    first, last = map(float, re.search(r"^loss (\S+) at step 5, (\S+) at step 150$", printed, re.MULTILINE).groups())
    assert first > 5.5
    assert last < 4.2
    assert int(re.search(r"^(\d+) of 100 right$", printed, re.MULTILINE)[1]) >= 80


@pytest.mark.slow
def test_the_scripts_as_they_stand_make_a_model_that_names_a_number_in_between(run_script, tmp_path):
    base = run_script("train.py").strip()
    run_script("generate.py", base)
    run_script("grpo_own_task.py", base)
    lines = read_metrics(tmp_path / "runs" / "example-grpo" / "grpo")
    accuracies = [line["val_accuracy"] for line in lines if "val_accuracy" in line]
    assert accuracies[0] < 0.25
    assert accuracies[-1] > 0.5
