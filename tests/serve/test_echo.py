"""Prompts are scored over HTTP as by the model itself, so that evaluations get the same figures."""

import json
from functools import partial

import pytest

from nanollm.generate.engine import Engine
from nanollm.generate.model import LanguageModel
from nanollm.generate.request import Request
from tests.generate.test_adapters import pairs
from tests.serve.running import MODEL_NAME, Running

httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")


def completed(server, **settings):
    asked = {"model": MODEL_NAME, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": 2} | settings
    response = httpx.post(server.url + "/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_echo_has_the_models_own_log_probabilities_and_nothing_behind(server, bundle):
    text = "Once, f\u00fcr the \u65e5 sea."
    answer = completed(server, prompt=[text, "the"])
    choice, other = answer["choices"]
    expected = [each for _, each in LanguageModel(bundle, "none").logprobs(text)]
    told = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"], other["text"]) == (text, "length", "the")
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    assert [len(top) for top in told["top_logprobs"][1:]] == [2] * len(expected)
    assert told["text_offset"][0] == 0 and told["text_offset"] == sorted(told["text_offset"])
    assert answer["usage"]["completion_tokens"] == 0


def test_a_completion_behind_its_echo_is_the_one_without(server):
    alone, both = (completed(server, prompt="Once", max_tokens=12, echo=echo)["choices"][0] for echo in (False, True))
    assert both["text"] == "Once" + alone["text"]
    for key, before in (("tokens", 0), ("token_logprobs", 0), ("text_offset", len("Once"))):
        expected = [value + before for value in alone["logprobs"][key]] if before else alone["logprobs"][key]
        assert both["logprobs"][key][-len(expected) :] == expected


@pytest.mark.parametrize(
    ("quantize", "rounding"), [("none", 1e-4), ("int8", 1.0)]
)  # where rounding chooses another expert
def test_an_echo_is_what_the_engine_says_of_the_same_tokens(serve, bundle, quantize, rounding):
    """Of prompts to the last bit, whatever runs with them; of replies up to rounding; of adapters as well."""
    adapters = {"math": pairs(bundle.model)[0]}
    alone = Engine(bundle.model, rows=1, quantize=quantize, adapters=adapters)
    busy = partial(Engine, bundle.model, rows=3, chunk=7, quantize=quantize, adapters=adapters)
    settings = {"prompt": ["Once", "A sea"], "n": 2, "max_tokens": 20, "temperature": 1, "seed": 3}
    with serve(make_engine=busy, adapters=adapters) as running:
        for model in (MODEL_NAME, "math"):
            bare, echoed = (completed(running, model=model, echo=echo, **settings)["choices"] for echo in (False, True))
            for reply, choice in zip(bare, echoed, strict=True):
                ids, likely = ids_of(running, bundle, choice), choice["logprobs"]["token_logprobs"]
                of_reply = reply["logprobs"]["token_logprobs"]
                assert likely[-len(of_reply) :] == of_reply
                told = alone.submit(Request(prompt=ids, max_tokens=1, prompt_logprobs=2, adapter=adapter_of(model)))
                while alone.has_work:
                    alone.step()
                expected = [each.logprob for each in told.prompt_logprobs]
                assert likely[1:] == pytest.approx(expected, abs=rounding)
                again = completed(running, model=model, prompt=ids)["choices"][0]["logprobs"]
                assert again["token_logprobs"][1:] == expected


def adapter_of(model):
    return None if model == MODEL_NAME else model


def ids_of(running: Running, bundle, choice):
    """The ids of a completion, from the names of its tokens."""
    spell = running.service.detokenizer.spell
    by_name = {spell(token)[0]: token for token in range(bundle.model.config.vocab_size)}
    return [by_name[name] for name in choice["logprobs"]["tokens"]]


def test_a_streamed_echo_joined_is_the_answer_at_once(server):
    settings = {"prompt": ["Once", "The sea"], "max_tokens": 9}
    expected = completed(server, **settings)["choices"]
    text, tokens, offsets = (["", ""] if empty == "" else [[], []] for empty in ("", [], []))
    asked = {"model": MODEL_NAME, "temperature": 0, "echo": True, "logprobs": 2, "stream": True} | settings
    with httpx.stream("POST", server.url + "/v1/completions", json=asked) as stream:
        events = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    for choice in (json.loads(event)["choices"][0] for event in events):
        text[choice["index"]] += choice["text"]
        tokens[choice["index"]] += (choice["logprobs"] or {}).get("tokens", [])
        offsets[choice["index"]] += (choice["logprobs"] or {}).get("text_offset", [])
    assert text == [choice["text"] for choice in expected]
    assert tokens == [choice["logprobs"]["tokens"] for choice in expected]
    assert offsets == [choice["logprobs"]["text_offset"] for choice in expected]


def test_a_prompt_alone_ends_by_its_length_whatever_would_follow(server, bundle):
    (token,) = bundle.tokenizer.encode("x")
    for follows in (bundle.tokenizer.eos_id, token):
        settings = {"logit_bias": {str(follows): 100}, "stop": "x", "logprobs": None}
        answer = completed(server, prompt="Once x", **settings)
        assert [(each["text"], each["finish_reason"]) for each in answer["choices"]] == [("Once x", "length")]
        assert answer["usage"]["completion_tokens"] == 0


def test_lm_eval_reads_the_scores_of_our_adapter_from_an_echo(server, bundle):
    api = pytest.importorskip(
        "lm_eval.models.openai_completions", reason="lm_eval[api] is not installed: pip install 'lm_eval[api]'"
    )
    from nanollm.evals.lm_eval import NanoLM

    ours = NanoLM(bundle)
    texts = [("Once upon", " a time"), ("The sea", " is"), ("The sea", " was")]
    asked = [("", ours.tok_encode(a), ours.tok_encode(b, add_special_tokens=False)) for a, b in texts]
    expected = ours._loglikelihood_tokens(asked)
    prompts, contexts = [a + b for _, a, b in asked], [len(a) for _, a, _ in asked]
    answer = completed(server, prompt=prompts, max_tokens=1, logprobs=1)  # as it asks
    found = api.LocalCompletionsAPI.parse_logprobs(answer, ctxlens=contexts)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [each for each, _ in found] == pytest.approx([each for each, _ in expected], abs=1e-4)
