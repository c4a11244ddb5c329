"""A bundle continues prompts, and nothing that does not fit is tried."""

import json

import pytest

from nanollm.stages.generate import BETWEEN, Config, run
from nanollm.text.stream import TextStream


def records(**settings):
    return [json.loads(line) for line in run(Config(json=True, dtype="float32", **settings)).splitlines()]


def test_a_batch_of_prompts_gives_what_each_gives_alone(bundle):
    prompts = ["Once upon a time", "The", "No one knew why"]
    together = records(bundle=bundle, prompt=prompts, max_tokens=8, temperature=0.9, seed=5)
    alone = [
        records(bundle=bundle, prompt=[p], max_tokens=8, temperature=0.9, seed=5 + i)[0] for i, p in enumerate(prompts)
    ]
    assert together == alone
    assert [record["prompt"] for record in together] == prompts


def test_the_same_seed_gives_the_same_text_and_another_seed_another(bundle):
    first, same, other = (records(bundle=bundle, prompt=["The"], max_tokens=12, seed=s)[0]["text"] for s in (1, 1, 2))
    assert first == same != other


def test_a_stop_text_ends_the_reply_and_is_left_out(bundle):
    (free,) = records(bundle=bundle, prompt=["The"], max_tokens=20, seed=1)
    stop = free["text"][4:6]
    (stopped,) = records(bundle=bundle, prompt=["The"], max_tokens=20, seed=1, stop=[stop])
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["finish"] == "stop"


def test_a_line_of_dashes_stands_between_continuations(bundle):
    one, other = run(Config(bundle=bundle, prompt=["The", "Once"], max_tokens=3, dtype="float32")).split(
        f"\n{BETWEEN}\n"
    )
    assert (one[:3], other[:4]) == ("The", "Once")


@pytest.mark.parametrize(("stops", "expected"), [([], "abcabc"), (["ca"], "ab"), (["c", "b"], "a"), (["x"], "abcabc")])
def test_text_is_cut_at_the_first_stop(tokenizer, stops, expected):
    assert TextStream(tokenizer, stops).read(tokenizer.encode("abcabc")) == expected


def test_a_prompt_longer_than_the_context_is_refused(bundle):
    with pytest.raises(ValueError, match="the model's context is 32"):
        run(Config(bundle=bundle, prompt=["word " * 100], dtype="float32"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"prompt": []}, "--prompt expects at least one text"), ({"prompt": ["a"], "stop": [""]}, "got an empty one")],
)
def test_senseless_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Config(bundle=tmp_path, **settings)


def test_continuations_follow_the_schema_of_a_file(bundle, tmp_path):
    pytest.importorskip("llguidance", reason='llguidance is not installed: pip install -e ".[serve]"')
    path, schema = tmp_path / "schema.json", {"enum": [{"a": 1}, [True, None]]}
    path.write_text(json.dumps(schema))
    for record in records(bundle=bundle, prompt=["The", "A"], schema=path):
        assert json.loads(record["text"]) in schema["enum"]
        assert record["finish"] == "end"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is no JSON that can be read"),
        ("[1]", "must hold a JSON schema, which is an object"),
        ('{"enum": []}', "schema: Unsatisfiable schema"),
        ('{"$ref": "other.json"}', "schema: "),
    ],
)
def test_a_file_that_holds_no_schema_is_refused(bundle, tmp_path, text, reason):
    pytest.importorskip("llguidance", reason='llguidance is not installed: pip install -e ".[serve]"')
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        run(Config(bundle=bundle, prompt=["The"], schema=path))
