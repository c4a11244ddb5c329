"""Prompts are scored over HTTP as by the model itself, so that evaluations get the same figures."""

import pytest

from nanollm.generate.engine import generate
from nanollm.generate.model import LanguageModel
from nanollm.generate.sampling import SamplingConfig
from tests.serve.running import MODEL_NAME

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


def test_what_the_engine_says_of_its_tokens_an_echo_says_of_them_as_a_prompt(server, bundle):
    prompt = [bundle.tokenizer.bos_id, *bundle.tokenizer.encode("Once")]
    reply = generate(bundle.model, [prompt], SamplingConfig(temperature=0), max_tokens=9, stop_token_ids=frozenset())[0]
    told = completed(server, prompt=[*prompt, *reply.ids])["choices"][0]["logprobs"]["token_logprobs"]
    assert told[len(prompt) :] == pytest.approx(reply.logprobs, abs=1e-4)


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
