"""A mistake in a YAML file or on the command line is refused in one line that names the key, before anything is read,
built or written."""

import dataclasses
import importlib
import math
import tracemalloc
from collections.abc import Mapping
from dataclasses import is_dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm import cli, options
from nanollm.settings import CONFIGS, load_preset, read_mapping, to_yaml

FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
NO_LIMIT = ("objective.cispo_max", "objective.importance_cap")  # where infinity is a value like others: no cap
EASY = dict(max_examples=1, derandomize=True, deadline=None, database=None)


def verb_of(file):
    """The verb that a file is for; a model's preset is read by all, and info needs nothing else."""
    kind = file.partition("/")[0]
    return "info" if kind == "model" else kind


def kinds_of(file):
    kinds = options.kinds_of(stage_of(file))
    return {name: kind for name, kind in kinds.items() if name != "config" and name not in options.SWITCHES}


def stage_of(file):
    return importlib.import_module(cli.module_of(verb_of(file)))


def read(file):
    """The settings of a file, with those of its model in full."""
    given = read_mapping(CONFIGS / file)
    if file.startswith("model/"):
        return {"model": given}
    return given | ({"model": load_preset("model", given["model"])} if "model" in given else {})


def put(given, key, value):
    """A copy of the settings with one changed."""
    head, _, rest = key.partition(".")
    if not rest:
        return given | {head: value}
    inside = given.get(head)
    return given | {head: put(inside if isinstance(inside, Mapping) else {}, rest, value)}


class Bench:
    """Runs verbs up to where their work would begin."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.begun = []
        self.refused = 0

    def run(self, file, given, *words):
        path = self.folder / "given.yaml"
        path.write_text(to_yaml(given), encoding="utf-8")
        return self.run_words(file, "--config", str(path), *words)

    def run_words(self, file, *words):
        """Exit code and what was said."""
        self.begun.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage_of(file), "run", self.begun.append)
            code = cli.main([verb_of(file), *words])
        said = self.capsys.readouterr()
        assert said.out == ""
        return code, said.err

    def refuses(self, file, given, keys, *words):
        code, said = self.run(file, given, *words)
        what = f"{file} {keys} {words}: {said}"
        assert (code, self.begun) == (2, []), what
        assert said.startswith(f"nanollm {verb_of(file)}: ") and said.count("\n") == 1, what
        assert all(key in said for key in keys), what
        self.refused += 1


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """In an empty folder, that nothing may be added to."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield Bench(tmp_path, capsys)
    assert list((tmp_path / "cwd").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"cwd", "given.yaml"}


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_taken_as_it_is(bench, file):
    assert bench.run(file, read(file)) == (0, "")
    assert len(bench.begun) == 1


# One wrong value.

VALUES = {
    "text": "banana",
    "empty text": "",
    "number": -1,
    "fraction": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "endless": 10**400,
    "null": None,
    "list": [["banana"]],
    "mapping": {"banana": {"banana": 1}},
}
RIGHT = {  # which of them an option of a kind takes; all else, and each word of a choice, takes none
    "text": {"text", "empty text"},
    "text ...": {"text", "empty text"},
    "path": {"text"},
    "path ...": {"text"},
    "float": {"fraction"},
    "null": {"null"},
}


def wrong_values(key, kind):
    """Names of values that cannot be right."""
    if is_dataclass(kind):
        return [name for name in VALUES if name != "null"] + ["null"]
    right = set().union(*(RIGHT.get(part, set()) for part in options.notation(kind).split("|")))
    return [name for name in VALUES if name not in right and not (name == "inf" and key in NO_LIMIT)]


@st.composite
def mistakes(draw):
    """A file, its settings with one mistake, the words beside it, and the key that must be named."""
    file = draw(st.sampled_from(FILES))
    given, kinds = read(file), kinds_of(file)
    sections = ["", *(f"{name}." for name, kind in kinds.items() if is_dataclass(kind))]
    how = draw(st.sampled_from(["unknown", "wrong", "wrong", "wrong word"]))
    if how == "unknown":
        key = draw(st.sampled_from(sections)) + draw(st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True))
        if key in kinds or any(name.startswith(f"{key}.") for name in kinds) or f"{key}." in sections:
            key += "_zzz"
        return file, put(given, key, draw(st.sampled_from(list(VALUES.values())))), (), key
    if how == "wrong word":  # a number, a choice or a switch: any other option takes every text
        kinds = {
            name: kind
            for name, kind in kinds.items()
            if not is_dataclass(kind) and not {"text", "path"} & set(options.notation(kind).replace(" ", "|").split("|"))
        }
    key = draw(st.sampled_from(sorted(kinds)))
    name = draw(st.sampled_from(wrong_values(key, kinds[key])))
    if how == "wrong":
        return file, put(given, key, VALUES[name]), (), key
    word = "null" if VALUES[name] is None else str(VALUES[name])
    return file, given, (f"--{key}={word}",), key


def refuse_mistakes(bench, examples):
    @settings(**EASY | {"max_examples": examples})
    @given(mistakes())
    def check(mistake):
        file, given, words, key = mistake
        bench.refuses(file, given, [key], *words)

    check()
    return f"{bench.refused} of {bench.refused} mistakes refused in one line with their key, nothing begun"


def test_any_one_mistake_is_refused_and_its_key_named(bench, record_property):
    record_property("figure", refuse_mistakes(bench, 400))


@pytest.mark.slow
def test_any_one_of_thousands_of_mistakes_is_refused_and_its_key_named(bench, record_property):
    record_property("figure", refuse_mistakes(bench, 4000))
