import sys
from itertools import islice

import pytest

from nanollm.sources import builtin


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose documentation is the whole corpus."""
    folder = tmp_path / "apackage"
    (folder / "tests").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(builtin, "PACKAGES", ("apackage", "not_installed"))
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    monkeypatch.setattr(builtin, "_topics", lambda: iter(()))
    return folder


LONG = "This sentence tells what the thing does. " * 6


def test_modules_classes_and_functions_are_documents_and_nothing_is_imported(package):
    (package / "__init__.py").write_text(f'"""Package. {LONG}"""\nraise SystemExit("imported")\n')
    (package / "b.py").write_text(
        f'class C:\n    """Class. {LONG}"""\n    def m(self):\n        """A method."""\n\n\n'
        f'def f():\n    """Function. {LONG}"""\n\n\ndef g():\n    """Short."""\n'
        f'add_docstr(f, """call() {LONG}""")\n'
    )
    found = list(builtin.documents())
    assert [text.splitlines()[0].split(" This")[0] for text in found] == [
        "apackage",
        "apackage.b.C",
        "apackage.b.f",
        "call()",
    ]
    assert found[1].endswith("C.m\n\nA method.")
    assert "apackage" not in sys.modules


def test_a_text_comes_once_and_tests_and_broken_files_do_not_come(package):
    for name in ("a.py", "b.py", "tests/c.py"):
        (package / name).write_text(f'"""{LONG}"""\n')
    (package / "broken.py").write_text(f'"""{LONG} broken"""\ndef (:\n')
    (package / "surrogate.py").write_text(f'"""{LONG} \\ud800"""\n')
    (package / "escape.py").write_text(f'"""{LONG} \\d"""\n')
    assert [text.splitlines()[0] for text in builtin.documents()] == ["apackage.a", "apackage.escape"]


def test_this_machine_has_the_same_long_documents_each_time():
    first, again = (list(islice(builtin.documents(), 60)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 60
    assert all(len(text) >= builtin.MIN_CHARS for text in first)
