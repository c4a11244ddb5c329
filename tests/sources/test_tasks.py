import importlib
import inspect
import json
import re
import sys
import textwrap
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nanollm.config import parse_options
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import Gsm8k, Task, TaskConfig, open_task
from nanollm.sources.word_problems import WordProblems


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes a module into the current folder, which is one that Python does not know."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(source, name="mine_of_a_test"):
        names.append(name)
        Path(f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        sys.modules.pop(name, None)
        importlib.invalidate_caches()

    yield write
    for name in names:
        sys.modules.pop(name, None)


def gsm8k_folder(folder, **answers):
    for split, written in answers.items():
        rows = [json.dumps({"question": f"{split}?", "answer": answer}) for answer in written]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_words_is_the_task_where_none_is_named():
    assert open_task(TaskConfig()) == WordProblems(levels=(1, 2), largest=20, seed=0)
    config = TaskConfig(levels=[3], largest=30, seed=7)
    assert open_task(config) == WordProblems(levels=(3,), largest=30, seed=7)


def test_gsm8k_has_the_problems_of_its_split_and_grades_them(tmp_path, capsys):
    folder = gsm8k_folder(tmp_path, train=["3+4=7\n#### 7"], test=["#### 8", "#### 9"])
    for given in ([folder], [folder / "train.jsonl", folder / "test.jsonl"]):
        task = open_task(TaskConfig(name="gsm8k", input=given))
        assert list(task.problems("train")) == [Problem("train?", "3+4=7\n#### 7")]
        assert [each.answer for each in task.problems("test")] == ["#### 8", "#### 9"]
        assert task.grade(task.problems("test")[1], "I guess\n#### 9.0")
        assert not task.grade(task.problems("test")[0], "8")
    assert capsys.readouterr().err == ""


def test_bad_records_of_gsm8k_are_said_and_counted(tmp_path, capsys):
    gsm8k_folder(tmp_path, train=["#### 7", *["#### none"] * 5], test=["#### none"])
    assert len(Gsm8k((tmp_path,)).problems("train")) == 1
    first = f"{tmp_path / 'train.jsonl'}:2: answer must end in '#### <number>', got '#### none'"
    assert capsys.readouterr().err == f"gsm8k, train: 5 bad records were left out, the first: {first}\n"
    with pytest.raises(ValueError, match="gsm8k has no problem for test; look at --task"):
        Gsm8k((tmp_path,)).problems("test")


def test_a_split_that_gsm8k_lacks_is_refused(tmp_path):
    gsm8k_folder(tmp_path, train=["#### 7"])
    with pytest.raises(ValueError, match="gsm8k has no split 'heldout'; it has train, test"):
        Gsm8k((tmp_path,)).problems("heldout")
    with pytest.raises(ValueError, match=r"gsm8k needs files named for their split .* none is named 'test'"):
        Gsm8k((tmp_path,)).problems("test")


def test_the_task_in_the_documentation_works(mine):
    example = inspect.getdoc(Task).split("mine:Doubles\n")[1].split("\nTraining imitates")[0]
    source = textwrap.dedent(example.strip("\n"))
    assert len(source.splitlines()) <= 20
    mine(source, "mine")
    task = open_task(TaskConfig(name="mine:Doubles"))
    assert len(task.problems("train")) == 80
    problem = task.problems("test")[0]
    assert problem == Problem("What is 80 plus 80?", "160")
    assert task.grade(problem, " 160\n")
    assert not task.grade(problem, "161")
    with pytest.raises(ValueError, match="mine:Doubles has no split 'heldout': KeyError: 'heldout'"):
        task.problems("heldout")


def test_a_task_in_a_package_is_found(mine, tmp_path):
    (tmp_path / "a_package_of_a_test").mkdir()
    mine(
        "class T:\n    def problems(self, split): return ()\n    def grade(self, problem, reply): return True\n",
        "a_package_of_a_test/inside",
    )
    assert open_task(TaskConfig(name="a_package_of_a_test.inside:T")).grade(Problem("", ""), "")


def test_the_current_folder_hides_no_library(mine):
    mine("raise SystemExit('the wrong one')", "pydoc_data")
    with pytest.raises(ValueError, match=r"pydoc_data.*no attribute 'T'"):
        open_task(TaskConfig(name="pydoc_data:T"))


OWN = """
    from nanollm.sources.gsm8k import Problem

    class NoGrade:
        def problems(self, split): return []

    class NeedsMore:
        def __init__(self, size): ...

    a_value = 3

    class Wrong:
        def problems(self, split):
            if split == "val":
                raise ValueError("only train, please")
            return {"train": [], "heldout": ["a question"]}[split]
        def grade(self, problem, reply):
            problem == reply
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:T", r"is no_such_module:T \(module:Name\), but No module named 'no_such_module'; a module is"),
        (
            "mine_of_a_test:Nothing",
            r"task.name is mine_of_a_test:Nothing \(module:Name\), but .* no attribute 'Nothing'",
        ),
        ("mine_of_a_test:NoGrade", r"mine_of_a_test:NoGrade, which makes no task: .* no attribute 'grade'; see .*Task"),
        ("mine_of_a_test:NeedsMore", r"makes no task: .*missing 1 required .*'size'"),
        ("mine_of_a_test:a_value", r"makes no task: 'int' object is not callable"),
    ],
)
def test_a_task_that_cannot_be_opened_is_refused_in_one_line(mine, name, message):
    mine(OWN)
    with pytest.raises(ValueError) as caught:
        open_task(TaskConfig(name=name))
    assert re.search(message, one_line(caught))


def test_a_task_whose_module_imports_what_is_not_there_says_what(mine):
    mine("import no_such_module")
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        open_task(TaskConfig(name="mine_of_a_test:T"))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train", "mine_of_a_test:Wrong.problems('train') must return a list of Problem, got []"),
        ("heldout", "mine_of_a_test:Wrong.problems('heldout') must return a list of Problem, got ['a question']"),
        ("val", "mine_of_a_test:Wrong has no split 'val': ValueError: only train, please"),
        ("other", "mine_of_a_test:Wrong has no split 'other': KeyError: 'other'"),
    ],
)
def test_a_split_that_cannot_be_used_is_refused_in_one_line(mine, split, message):
    mine(OWN)
    with pytest.raises(ValueError) as caught:
        open_task(TaskConfig(name="mine_of_a_test:Wrong")).problems(split)
    assert one_line(caught) == message


def test_a_grade_that_forgets_to_return_is_refused(mine):
    mine(OWN)
    with pytest.raises(ValueError, match=r"mine_of_a_test:Wrong\.grade must return True or False, got None"):
        open_task(TaskConfig(name="mine_of_a_test:Wrong")).grade(Problem("", ""), "")


def test_a_task_is_chosen_on_the_command_line():
    @dataclass(frozen=True, kw_only=True)
    class Config:
        """A stage with a task."""

        task: TaskConfig = field(default_factory=TaskConfig)
        """What is asked."""

    stage = types.SimpleNamespace(Config=Config)
    read, _ = parse_options("eval", stage, ["--task.name", "gsm8k", "--task.input", "a", "b"])
    assert read.task == TaskConfig(name="gsm8k", input=[Path("a"), Path("b")])
    read, _ = parse_options("eval", stage, ["--task.levels", "3", "4", "--task.largest", "50", "--task.seed", "1"])
    assert read.task == TaskConfig(levels=[3, 4], largest=50, seed=1)
    with pytest.raises(ValueError, match=r"task\.largest must be at least 5, got 1"):
        parse_options("eval", stage, ["--task.largest", "1"])
