"""What nanollm eval writes is what its schema says, key by key, and docs/evaluation.md shows that schema."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from nanollm.bundle import save_bundle
from nanollm.evals import schema
from nanollm.model.transformer import Transformer
from nanollm.stages.eval import Config, EvalTask, run
from tests.conftest import STORY
from tests.evals.harness_tasks import write_tasks
from tests.stages.conftest import MODEL

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install -e ".[eval]"')

from lm_eval.tasks import TaskManager

from nanollm.evals import benchmarks

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
SUITE = "{tasks: {reply: {task: nano_reply, metric: exact_match}}, missing: {lost: nobody has it}}"


@pytest.fixture(scope="module")
def evaluations(tokenizer, token_files, tmp_path_factory):
    """One of everything at once, and one of next to nothing."""
    folder = tmp_path_factory.mktemp("schema")
    shape = replace(MODEL, context_length=256)
    first, second = (
        save_bundle(folder / str(seed) / "bundle", shape, Transformer(shape).init(seed).state_dict(), tokenizer, {})
        for seed in (0, 7)
    )
    (folder / "ours.yaml").write_text(SUITE)
    (folder / "tasks").mkdir()
    (folder / "question.jsonl").write_text(json.dumps({"text": question()}) + "\n")
    everything = Config(
        bundle=first,
        against=second,
        task=EvalTask(name="words"),
        n=3,
        max_tokens=4,
        samples=2,
        text=[STORY],
        data=token_files,
        harness=["nano_choice", "nano_reply", "nano_whole", str(folder / "ours.yaml")],
        harness_tasks=write_tasks(folder / "tasks"),
        harness_limit=3,
        contamination=[folder / "question.jsonl"],
        out=folder / "out",
        dtype="float32",
        json=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "TaskManager", partial(TaskManager, include_defaults=False))
        found = [json.loads(run(everything))]
    little = Config(bundle=first, text=[STORY], out=folder / "little", dtype="float32", json=True)
    return [*found, json.loads(run(little))]


def question():
    """The first one that everything asks."""
    return EvalTask(name="words").word_problems().problems("test")[0].question


def walk(value, rule, where, met):
    """Compare a value with its schema, and note in `met` which keys of it were there."""
    whole = schema.load()
    name = rule["$ref"].rpartition("/")[2] if "$ref" in rule else where
    rule = whole["$defs"][name] if "$ref" in rule else rule
    types = rule.get("type", list(TYPES))
    allowed = tuple(TYPES[each] for each in ([types] if isinstance(types, str) else types))
    assert any(isinstance(value, each) for each in allowed), f"{where}: {value!r} is not {types}"
    if "properties" in rule:
        assert set(rule["required"]) <= value.keys() <= set(rule["properties"]), f"{where}: {list(value)}"
        for key, each in value.items():
            met.add((name, key))
            walk(each, rule["properties"][key], f"{where}.{key}", met)
    elif "additionalProperties" in rule:
        for key, each in value.items():
            walk(each, rule["additionalProperties"], f"{where}.{key}", met)
    elif isinstance(value, list):
        for each in value:
            walk(each, rule["items"], f"{where}[]", met)


def test_every_key_that_is_written_is_in_the_schema_and_every_key_of_the_schema_is_written(evaluations):
    whole, met = schema.load(), set()
    for evaluation in evaluations:
        walk(evaluation, whole, "eval.json", met)
    parts = {"eval.json": whole} | whole["$defs"]
    assert met == {(name, key) for name, part in parts.items() for key in part["properties"]}


def test_a_key_without_a_place_in_the_schema_is_caught(evaluations):
    with pytest.raises(AssertionError, match=r"eval.json.bundle: .*'extra'"):
        walk(evaluations[1] | {"bundle": evaluations[1]["bundle"] | {"extra": 1}}, schema.load(), "eval.json", set())


def test_the_schema_is_json_schema(evaluations):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema.load())
    validator = jsonschema.Draft202012Validator(schema.load())
    assert [error.message for evaluation in evaluations for error in validator.iter_errors(evaluation)] == []
    assert not validator.is_valid(evaluations[0] | {"extra": 1})


def test_the_page_shows_the_schema():
    shown = PAGE.read_text(encoding="utf-8").partition("<!-- schema -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown.strip() == schema.tables().strip(), "python -m nanollm.evals.schema prints it"
