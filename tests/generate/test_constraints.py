"""A constrained reply follows its grammar and is the reply that the model gives when it is asked alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nanollm.generate.engine import Engine, generate
from nanollm.generate.request import Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.transformer import Transformer
from nanollm.text.chat import Conversation, encode_prompt, reply_borders, reply_ends
from tests.model.conftest import TINY, randomised

pytest.importorskip("llguidance", reason='llguidance is not installed: pip install -e ".[serve]"')
jsonschema = pytest.importorskip("jsonschema", reason="schemathesis brings it: pip install schemathesis")

from nanollm.generate.constraints import Compiler, choice_rule, json_rule, regex_rule  # noqa: E402

GREEDY, FREE = SamplingConfig(temperature=0), SamplingConfig(temperature=1.0)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tokenizer):
    config = replace(TINY, vocab_size=tokenizer.vocab_size + 3, context_length=512)  # some ids have no piece
    return randomised(Transformer(config).init(0)).eval()


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return Compiler(tokenizer)


@pytest.fixture(scope="module")
def ask(model, tokenizer, compiler):
    """ask(*rules): a completion for each; None: no constraint."""
    prompt = encode_prompt(Conversation.of("How many?"), tokenizer)

    def ask(*rules, sampling=FREE, seed=0, max_tokens=400, top_logprobs=None):
        engine = Engine(model, rows=len(rules))
        completions = [
            engine.submit(
                Request(
                    prompt=prompt,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    stop_token_ids=reply_borders(tokenizer),
                    constraint=None if rule is None else compiler.compile(f"start: {rule}"),
                    seed=seed,
                    top_logprobs=top_logprobs,
                )
            )
            for rule in rules
        ]
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        return completions, outputs

    return ask


# --- random schemas: each bounds what it allows, so that replies of a model that says nothing end ---

NAMES = st.sampled_from(["a", "name", "na\u00efve \U0001f600", 'say "hi"', "\\/", "", "$ref"]) | st.text(max_size=5)
VALUES = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | NAMES
PATTERNS = st.sampled_from(["^[a-c]{2,4}$", "^(x|yz)?$", "^[0-9]{1,3}-\u00e9$"])
LEAVES = (
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 9))
    | st.builds(lambda pattern: {"type": "string", "pattern": pattern}, PATTERNS)
    | st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, *[st.integers(0, 999)] * 2
    )
    | st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "format": "date"}])
    | st.builds(lambda value: {"const": value}, VALUES)
    | st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=4))
)


@st.composite
def parents(draw, inner):
    kind = draw(st.sampled_from(["array", "object", "anyOf"]))
    if kind == "array":
        low = draw(st.integers(0, 2))
        return {"type": kind, "items": draw(inner), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}
    if kind == "anyOf":
        return {kind: draw(st.lists(inner, min_size=1, max_size=3))}
    properties = draw(st.dictionaries(NAMES, inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(LEAVES, parents, max_leaves=8)


def check_random_schemas(ask, tokenizer, count):
    seen = {"whole": 0, "cut": 0}

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(SCHEMAS)
    def check(schema):
        (completion,), _ = ask(json_rule(schema), seed=sum(seen.values()))
        seen["whole" if completion.finish == "end" else "cut"] += 1
        if completion.finish == "end":
            jsonschema.validate(json.loads(tokenizer.decode_drawn(completion.ids)), schema)
        else:
            assert completion.finish == "length"

    check()
    return seen


def test_replies_follow_random_schemas(ask, tokenizer):
    assert check_random_schemas(ask, tokenizer, 40)["whole"] >= 36


@pytest.mark.long
def test_replies_follow_a_thousand_random_schemas(ask, tokenizer):
    seen = check_random_schemas(ask, tokenizer, 1000)
    assert seen["cut"] <= 20, seen


# --- one row among others ---


@pytest.mark.parametrize("sampling", [GREEDY, FREE, SamplingConfig(temperature=1.0, top_k=5, repetition_penalty=1.3)])
def test_a_constrained_row_and_its_neighbours_say_what_they_say_alone(ask, sampling):
    rules = [json_rule(SCHEMA), None, regex_rule("[0-9]{8}"), json_rule(SCHEMA), choice_rule(["no", "yes"]), None]
    together, _ = ask(*rules, sampling=sampling, max_tokens=24)
    for rule, completion in zip(rules, together, strict=True):
        ((alone,), _) = ask(rule, sampling=sampling, max_tokens=24)
        assert (alone.ids, alone.logprobs, alone.finish) == (completion.ids, completion.logprobs, completion.finish)


def test_log_probabilities_are_those_of_the_model_without_the_mask(ask, model):
    (completion,), outputs = ask(json_rule(SCHEMA), sampling=GREEDY, top_logprobs=3)
    ids = [*completion.request.prompt, *completion.ids]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].log_softmax(-1)
    first = len(completion.request.prompt) - 1
    for place, (output, logprob) in enumerate(zip(outputs, completion.logprobs, strict=True), start=first):
        assert output.logprobs.logprob == pytest.approx(expected[place, output.token].item(), abs=1e-3)
        assert logprob == pytest.approx(output.logprobs.logprob, abs=1e-3)
        assert output.logprobs.top[0][1] == pytest.approx(expected[place].max().item(), abs=1e-3)


def test_the_samples_of_a_prompt_share_no_state(model, tokenizer, compiler):
    constraint = compiler.compile(f"start: {json_rule(SCHEMA)}")
    prompt = encode_prompt(Conversation.of("How many?"), tokenizer)
    ends, settings = reply_ends(tokenizer), {"max_tokens": 40, "samples": 3, "seed": 5, "constraint": constraint.copy}
    completions = generate(model, [prompt], FREE, stop_token_ids=ends, **settings)
    assert len({tokenizer.decode_drawn(each.ids) for each in completions}) > 1
    for completion in completions:
        jsonschema.validate(json.loads(tokenizer.decode_drawn(completion.ids)), SCHEMA)


def test_no_bias_makes_a_token_that_is_not_allowed(ask, tokenizer):
    (never,), wanted = tokenizer.encode("z"), tokenizer.mark_id("<|end|>")
    bias = SamplingConfig(temperature=1.0, logit_bias={never: 100.0, wanted: 100.0})
    (completion,), _ = ask(regex_rule("[ab]{9}"), sampling=bias)
    assert len(tokenizer.decode_drawn(completion.ids)) == 9


# --- what is allowed ---


def names_allowed(constraint, tokenizer, text=""):
    bits = np.zeros(-(-tokenizer.vocab_size // 32) * 4, dtype=np.uint8)
    assert all(map(constraint.take, tokenizer.encode(text)))
    constraint.allow(bits.ctypes.data)
    allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
    return {token: tokenizer.symbols.get(token) for token in allowed}


def test_marks_are_never_allowed_and_the_end_where_the_text_may_end(compiler, tokenizer):
    constraint = compiler.compile(f"start: {regex_rule('(?s:.*)x')}")
    assert not any(names_allowed(constraint, tokenizer).values())
    assert set(filter(None, names_allowed(constraint, tokenizer, "max").values())) == {"<|end|>", "</s>"}


@pytest.mark.parametrize("text", ["a/b", 'say "hi"\n', "\\", "é\u2028😀", "", "/", "|", "<|end|>", "<[3]>"])
def test_choices_and_patterns_are_taken_to_the_letter(ask, tokenizer, text):
    (completion,), _ = ask(choice_rule([text]))
    assert tokenizer.decode_drawn(completion.ids) == text


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (json_rule({"$ref": "file:///etc/passwd"}), "retrieving it failed"),
        (json_rule({"$ref": "https://example.org/x.json"}), "retrieving it failed"),
        (json_rule({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable schema: minimum"),
        (json_rule({"enum": []}), "Unsatisfiable schema"),
        (json_rule({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "nothing fits it"),
        (json_rule({"not": {"type": "string"}}), "Unimplemented keys"),
        (json_rule({"type": "strin"}), "Invalid type: strin"),
        (json_rule({"type": "string", "pattern": "(a"}), "unclosed group"),
        ("/(?=a)b/", "look-around"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(compiler, rule, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        compiler.compile(f"start: {rule}")
    assert "\n" not in str(caught.value) and "%json" not in str(caught.value)


def test_a_grammar_that_gives_up_ends_its_own_reply_alone(ask):
    many = {"type": "object", "properties": {f"p{place}": {"type": "integer"} for place in range(1500)}}
    (failed, other), _ = ask(json_rule(many), choice_rule(["yes"]))
    assert failed.finish == "failed"
    assert "cannot be followed any further" in failed.failure
    assert other.finish == "end"


def test_a_reply_that_max_tokens_cuts_says_so(ask):
    (completion,), _ = ask(json_rule(SCHEMA), max_tokens=2)
    assert completion.finish == "length"
