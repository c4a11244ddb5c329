"""The server answers whatever its own description allows, and whatever it does not, in good form.

NANOLLM_FUZZ_CASES=10000 makes more cases, other ones each time.
"""

import importlib
import math
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.running import MODEL_NAME, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")

requests = pytest.importorskip("requests", reason="schemathesis brings it: pip install schemathesis")

CASES = int(os.environ.get("NANOLLM_FUZZ_CASES", "40"))


@pytest.fixture(scope="module")
def fuzzed(bundle, serve_extra):
    with serving(bundle, max_running=16) as running:
        yield running


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_every_body_is_answered_in_good_form(fuzzed, mode):
    """Within and outside the description."""
    description = schemathesis.openapi.from_url(fuzzed.url + "/openapi.json")
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        seen = Counter()
        send_many(description[path]["POST"], mode, math.ceil(CASES / 4), seen)
        assert max(seen) < 500
        assert mode.is_negative or seen[200] > CASES / 80, f"{path}: too few bodies got through to the engine"
    fuzzed.settle()
    assert fuzzed.engine.is_alive


def send_many(operation, mode, cases, seen):
    """Make this many requests to one path, those within the description or those outside it; counts the statuses."""

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize="NANOLLM_FUZZ_CASES" not in os.environ,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def send(case):
        make_sensible(case, is_valid=mode.is_positive)
        response = case.call(session=session)
        seen[response.status_code] += 1
        excused = [checks.positive_data_acceptance]
        if response.status_code == 413:  # a refusal, too, before anybody reads the body
            excused.append(checks.negative_data_rejection)
        case.validate_response(response, excluded_checks=excused)
        check_form(response)

    # What the description cannot say: that users and assistants take turns, and how much this server allows.
    checks = importlib.import_module("schemathesis.specs.openapi.checks")
    with requests.Session() as session:
        send()


def make_sensible(case, *, is_valid):
    """Chance never finds the model's name, and hardly ever takes turns: help it in most cases."""
    body = case.body
    if not isinstance(body, dict) or len(str(body)) % 8 == 0:
        return
    if isinstance(body.get("model"), str):
        body["model"] = MODEL_NAME
    if not is_valid:
        return
    body["max_tokens"] = 4
    body["logit_bias"] = {str(len(key)): bias for key, bias in (body.get("logit_bias") or {}).items()}
    for number, message in enumerate(body.get("messages") or []):
        message["role"] = ("user", "assistant")[number % 2]
        message["content"] = message.get("content") or "Hm."
        for name in ("tool_calls", "tool_call_id"):
            message.pop(name, None)
    if body.get("messages") and len(body["messages"]) % 2 == 0:
        body["messages"].pop()


def check_form(response):
    if response.status_code >= 400:
        error = response.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"]
        assert error["code"]
