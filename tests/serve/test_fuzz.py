"""Does the server answer whatever its own description allows, and whatever it does not, in good form?

NANOLLM_FUZZ_CASES=10000 makes more cases, other ones each time.
"""

import importlib
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.running import MODEL_NAME, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")

requests = pytest.importorskip("requests", reason="schemathesis brings it")

CASES = int(os.environ.get("NANOLLM_FUZZ_CASES", "2000"))
FORMS = ["/v1/chat/completions", "/v1/completions"]


@pytest.fixture(scope="module")
def fuzzed(bundle, serve_extra):
    with serving(bundle, max_tokens=4, max_running=16, max_n=4) as running:
        yield running


@pytest.fixture(scope="module")
def description(fuzzed):
    return schemathesis.openapi.from_url(fuzzed.url + "/openapi.json")


@pytest.fixture(scope="module")
def seen():
    return Counter()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("path", FORMS)
def test_bodies_within_and_outside_the_description_are_answered_in_good_form(description, seen, path, mode):
    share = {"/v1/chat/completions": 0.18, "/v1/completions": 0.35}[path]  # chats take longer to make up
    send_many(description[path]["POST"], mode, round(share * CASES), seen)


def test_the_other_routes_answer_in_good_form(description, seen):
    for operation in description.get_all_operations():
        if operation.ok().method == "get":
            send_many(operation.ok(), schemathesis.GenerationMode.POSITIVE, CASES // 100, seen)


def test_there_were_as_many_cases_as_promised_and_none_was_a_fault_of_the_server(fuzzed, seen):
    if not seen:
        pytest.skip("the cases were not run")
    print(f"\n{seen.total():,} cases: " + ", ".join(f"{count:,} x {status}" for status, count in sorted(seen.items())))
    assert seen.total() >= CASES
    assert max(seen) < 500
    assert seen[200] > CASES / 10, "too few bodies got through to the engine"
    fuzzed.settle()
    assert fuzzed.worker.is_alive


def send_many(operation, mode, cases, seen):
    """Make this many requests to one path; those within the description, or those outside it."""

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
        case.validate_response(response, excluded_checks=[excused])
        check_form(response)

    # What the description cannot say: that users and assistants take turns, and how much this server allows.
    excused = importlib.import_module("schemathesis.specs.openapi.checks").positive_data_acceptance
    with requests.Session() as session:
        send()


def make_sensible(case, *, is_valid):
    """Chance never finds the model's name, and hardly ever what this server allows: help it in most cases."""
    body = case.body
    if not isinstance(body, dict) or len(str(body)) % 8 == 0:
        return
    if isinstance(body.get("model"), str):
        body["model"] = MODEL_NAME
    if not is_valid:
        return
    for name in ("n", "max_tokens", "max_completion_tokens"):
        if body.get(name):
            body[name] = 1 + body[name] % 4
    body["logit_bias"] = {str(len(key)): bias for key, bias in (body.get("logit_bias") or {}).items()}
    for number, message in enumerate(body.get("messages", [])):
        message["role"] = ("user", "assistant")[number % 2]
        message["content"] = message["content"] or "Hm."
    if body.get("messages") and len(body["messages"]) % 2 == 0:
        body["messages"].pop()


def check_form(response):
    if response.status_code >= 400:
        error = response.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"]
        assert error["code"]
