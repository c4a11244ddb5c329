"""The server lets in who may, with as much as is allowed, and tells everybody else in one form why not."""

import asyncio
import base64
import gzip
import json
import logging
import time

import pytest

from nanollm.generate.engine import Engine, generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.text.chat import reply_ends
from tests.generate.test_adapters import adapters_of, merged_model, pairs
from tests.serve.running import MODEL_NAME, wait_until

httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

KEY = "a-key-of-some-length"
MESSAGES = [{"role": "user", "content": "Once?"}]
LONG = {"max_tokens": 64, "logit_bias": {str(token): -100 for token in (3, 4, 5, 6, 7)}}  # never ends by itself


def body(**settings):
    return {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": 4} | settings


def error_of(response, status):
    """The error in an answer, after a look at its form."""
    assert response.status_code == status, response.text
    answer = response.json()
    assert list(answer) == ["error"]
    assert list(answer["error"]) == ["message", "type", "param", "code"]
    return answer["error"]


def paths_of(app):
    """A method and the path of every route, parameters filled in, and a file of the page."""
    found = [("GET", "/page/index.html"), ("GET", "/openapi.json")]
    for path, methods in app.openapi()["paths"].items():
        found += [(method.upper(), path.replace("{model}", MODEL_NAME)) for method in methods]
    return [*found, ("GET", "/")]


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(bundle, serve_extra):
    from tests.serve.running import serving

    with serving(bundle, api_key=KEY) as running:
        yield running


# Keys


def test_the_key_guards_every_route_but_health(guarded):
    paths = paths_of(guarded.app)
    assert {"/", "/page/index.html", "/metrics", "/openapi.json", "/v1/models"} < {path for _, path in paths}
    wrong = [
        {},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": "Bearer"},
        {"Authorization": KEY},
        {"Authorization": "Basic ???"},
        {"Authorization": "Basic " + base64.b64encode(b"anybody:\xe9").decode()},
        {"Authorization": "Bearer \xff".encode("latin-1")},
        {"Authorization": "Basic " + base64.b64encode(f"{KEY}:".encode()).decode()},
        {"api-key": KEY},
    ]
    with httpx.Client(base_url=guarded.url) as client:
        for method, path in paths:
            for headers in wrong:
                response = client.request(method, path, headers=headers)
                if path == "/health":
                    assert response.status_code == 200
                else:
                    assert error_of(response, 401)["code"] == "invalid_api_key"
        assert client.get("/nothing/here").status_code == 401


def test_the_key_opens_every_route_as_bearer_and_as_a_password(guarded):
    for headers in (
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": "Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode()},
    ):
        with httpx.Client(base_url=guarded.url, headers=headers) as client:
            for method, path in paths_of(guarded.app):
                assert client.request(method, path).status_code == (400 if method == "POST" else 200), path
            assert client.post("/v1/chat/completions", json=body()).status_code == 200


def test_a_browser_is_asked_for_a_password_and_a_program_for_a_token(guarded):
    assert httpx.get(guarded.url + "/").headers["www-authenticate"].startswith("Basic ")
    assert httpx.get(guarded.url + "/v1/models").headers["www-authenticate"].startswith("Bearer ")


def test_the_key_is_never_logged(bundle, serve_extra, serve, caplog, capfd):
    with caplog.at_level(logging.DEBUG), serve(api_key=KEY) as running:
        for key in (KEY, KEY + "x"):
            httpx.get(running.url + "/v1/models", headers={"Authorization": f"Bearer {key}"})
            httpx.post(running.url + "/v1/chat/completions", headers={"Authorization": f"Bearer {key}"}, json={})
    assert KEY not in caplog.text
    assert KEY not in "".join(capfd.readouterr())


def test_without_a_key_only_this_machines_names_are_answered(client):
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "page.localhost"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1:8000", "", "[::2]"):
        assert "localhost" in error_of(client.get("/v1/models", headers={"Host": host}), 403)["message"]


# Browsers


def test_other_pages_get_no_leave_unless_they_are_listed(client, serve):
    asked = {"Origin": "http://other.example", "Access-Control-Request-Method": "POST"}
    response = client.options("/v1/chat/completions", headers=asked)
    assert "need the server's option --cors_origins" in error_of(response, 405)["message"]
    assert not [name for name in response.headers if name.startswith("access-control")]
    with serve(cors_origins=["http://other.example"], api_key=KEY) as running:
        url = running.url + "/v1/chat/completions"
        response = httpx.options(url, headers=asked)
        assert response.headers["access-control-allow-origin"] == "http://other.example"
        near = {"Access-Control-Request-Private-Network": "true"}
        assert httpx.options(url, headers=asked | near).headers["access-control-allow-private-network"] == "true"
        refused = httpx.options(url, headers=asked | {"Origin": "http://evil.example"})
        assert error_of(refused, 400)["message"].startswith(
            "Disallowed CORS origin: expected GET or POST from an origin"
        )
        assert "access-control-allow-origin" not in refused.headers
        refused = httpx.options(url, headers=asked | {"Access-Control-Request-Method": "DELETE"})
        assert error_of(refused, 400)["message"].endswith("got DELETE from 'http://other.example'")
        error_of(httpx.post(url, headers={"Origin": "http://other.example"}, json=body()), 401)


def test_every_answer_carries_the_security_headers(client):
    for path in ("/", "/health", "/v1/models", "/nothing", "/page/nothing.js", "/openapi.json"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_the_page_is_served_by_name_and_nothing_outside_it(client):
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    for name in (
        "..%2fapp.py",
        "%2e%2e%2fapp.py",
        "..%5capp.py",
        "%00",
        "index.html%00",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "nothing.css",
    ):
        error_of(client.get(f"/page/{name}"), 404)
        error_of(client.get(f"/v1/models/{name}"), 404)


# What is asked


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "a message of the user is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "then user and assistant in turn"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]}, "messages", "must be the user's"),
        ({"messages": [*MESSAGES, *MESSAGES]}, "messages", "then user and assistant in turn"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "messages.0", "got 'judge'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "user", "content": "a"}] * 1001}, "messages", "at most 1000 items"),
        ({"temperature": "1"}, "temperature", "a valid number, got '1'"),
        ({"max_tokens": 0}, None, "max_tokens expects at least 1 token, or -1 for as many as fit, got 0"),
        ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1, got -2"),
        ({"n": 9}, "n", "less than or equal to 8, got 9"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"top_logprobs": 2}, None, "top_logprobs expects logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"experts": True}, None, "experts expects logprobs"),
        ({"logit_bias": {"600": 1}}, None, "logit_bias speaks of token 600, the model has 600 tokens"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "should match pattern"),
        ({"logit_bias": {str(number): 1 for number in range(301)}}, "logit_bias", "at most 300"),
        ({"presence_penalty": 0.5}, None, "use repetition_penalty"),
        ({"stream_options": {"include_usage": True}}, None, "expects stream"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "Field required"),
        ({"tool_choice": "required"}, None, "tool_choice required expects tools, got none"),
        ({"function_call": {"name": "f"}}, None, "function_call is not supported"),
        ({"modalities": ["text", "audio"]}, None, "modalities is not supported"),
        ({"prediction": {"type": "content", "content": "a"}}, None, "prediction is not supported"),
        ({"echo": True}, None, "echo is not supported"),
        ({"guided_grammar": "root ::= x"}, None, "guided_grammar is not supported"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}
                ]
            },
            "messages.0.0",
            "image parts are not supported, only text",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "'text'"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.1"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_with_its_reason(client, settings, param, message):
    error = error_of(client.post("/v1/chat/completions", json=body(**settings)), 400)
    assert message in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": [[]]}, "at least 1 item"),
        ({"prompt": ["a"] * 10, "n": 8}, "at most 72 replies to all prompts, got 80"),
        ({"prompt": [600]}, "from 0 to 599, got 600"),
        ({"prompt": [10**300]}, "less than 2147483648"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": [1, "a"]}, "valid"),
        ({"prompt": None}, "valid"),
        ({"max_tokens": 0}, "max_tokens expects at least 1 token"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"logprobs": 6}, "less than or equal to 5"),
    ],
)
def test_a_completion_that_cannot_be_is_refused_with_its_reason(client, settings, message):
    asked = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 2} | settings
    assert message in error_of(client.post("/v1/completions", json=asked), 400)["message"]


def test_a_refusal_repeats_little_of_what_was_sent(client):
    long = "x" * 200_000
    for settings in (
        {"logit_bias": {long: "a"}},
        {"temperature": {long: long}},
        {"messages": [{"role": long, "content": "a"}]},
    ):
        response = client.post("/v1/chat/completions", json=body(**settings))
        assert error_of(response, 400)["param"].split(".")[0] in settings
        assert len(response.text) < 600


def test_unknown_fields_are_ignored_as_clients_send_many(client):
    assert client.post("/v1/chat/completions", json=body(user="me", store=False, frequency_penalty=0)).is_success


def test_minus_one_and_numbers_beyond_the_context_are_no_limit(client):
    for settings in ({"max_tokens": -1}, {"max_tokens": 4097}, {"max_completion_tokens": 10**12}):
        reply = client.post("/v1/chat/completions", json=body(temperature=0) | settings).json()
        assert reply["usage"]["total_tokens"] == 192 or reply["choices"][0]["finish_reason"] == "stop"
    without = {"tool_choice": "auto", "function_call": "none", "modalities": ["text"]}
    replies = [
        client.post("/v1/chat/completions", json=body(seed=5, max_tokens=8) | settings).json()["choices"]
        for settings in ({}, {"top_k": 0}, {"top_k": -1}, without, {"max_tokens": 8.0, "n": 1.0, "seed": 5.0})
    ]
    assert replies == [replies[0]] * 5


def test_a_seed_of_minus_one_is_a_random_one(client):
    drawn = [client.post("/v1/chat/completions", json=body(seed=-1, max_tokens=30)).json() for _ in range(4)]
    assert len({each["choices"][0]["message"]["content"] for each in drawn}) > 1


def test_a_slash_at_the_end_is_no_other_path_and_near_misses_are_told(client):
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()
    assert client.post("/v1/chat/completions/", json=body(max_tokens=2)).is_success
    for path, meant in (
        ("/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/chat/completions", "/v1/chat/completions"),
    ):
        assert error_of(client.post(path), 404)["message"].endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": }', "Expecting value, at character 10"),
        (b'{"model": "a\n"}', "Invalid control character, at character 12"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "it is nested too deeply"),
        (gzip.compress(b"{}", mtime=0), "it is compressed by gzip; send it as it is"),
        ('{"model": "Perch\u00e9"}'.encode("latin-1"), "it is not UTF-8 (byte 0xe9 at place 16)"),
    ],
)
def test_a_body_that_is_no_json_hears_what_is_wrong_with_its_bytes(client, content, message):
    response = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert f"the body is not valid JSON: {message}" in error_of(response, 400)["message"]


def test_errors_have_one_form_whatever_the_path_and_method(client):
    for path in ("/nothing", "/docs", "/redoc", "//v1/models"):  # /docs would load others' scripts
        error_of(client.get(path), 404)
    assert error_of(client.delete("/v1/models"), 405)["code"] == "method_not_allowed"
    assert client.delete("/v1/models").headers["allow"] == "GET"
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


# Adapters


def test_a_client_chooses_an_adapter_by_the_name_of_a_model(bundle, serve):
    adapters = dict(zip(("math", "style"), pairs(bundle.model), strict=False))
    with serve(adapters=adapters) as running, httpx.Client(base_url=running.url) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            (MODEL_NAME, None),
            ("math", MODEL_NAME),
            ("style", MODEL_NAME),
        ]
        assert client.get("/v1/models/math").json() == cards[1]
        said = {}
        for path, asked in (("chat/completions", {}), ("completions", {"prompt": "Once"})):
            for name in (MODEL_NAME, "math", "style"):
                settings = body(model=name, temperature=0, max_tokens=9, **asked)
                answer = client.post(f"/v1/{path}", json=settings).json()
                assert answer["model"] == name
                with client.stream("POST", f"/v1/{path}", json=settings | {"stream": True}) as stream:
                    first = next(stream.iter_lines())
                assert json.loads(first.removeprefix("data: "))["model"] == name
                said[path, name] = answer["choices"][0].get("text") or answer["choices"][0]["message"]["content"]
        assert len(set(said.values())) == 6
        prompt = [bundle.tokenizer.bos_id, *bundle.tokenizer.encode("Once")]
        for name, weights in zip(("math", "style"), adapters_of(bundle.model), strict=False):
            alone = merged_model(bundle.model, weights)
            ends = reply_ends(bundle.tokenizer)
            (reply,) = generate(alone, [prompt], SamplingConfig(temperature=0), max_tokens=9, stop_token_ids=ends)
            assert said["completions", name] == bundle.tokenizer.decode(reply.ids)
        message = error_of(client.post("/v1/completions", json=body(model="maths", prompt="a")), 404)["message"]
        assert message == f"there is no model 'maths' here, only '{MODEL_NAME}', 'math', 'style'"


# Sizes and times


def test_a_body_beyond_the_limit_is_refused_with_and_without_a_declared_length(client):
    url, headers = "/v1/chat/completions", {"Content-Type": "application/json"}
    exact = json.dumps(body()).encode().ljust(2**20)
    assert client.post(url, content=iter([exact[:5000], exact[5000:]]), headers=headers).status_code == 200
    for content in (exact + b" ", iter([exact, b" "]), exact * 9, iter([exact] * 4)):
        assert error_of(client.post(url, content=content, headers=headers), 413)["code"] == "body_too_large"


def test_what_is_no_json_is_refused_so_that_no_form_of_another_page_can_post(client):
    for headers in ({"Content-Type": "text/plain"}, {}):
        response = client.post("/v1/completions", content=json.dumps(body()).encode(), headers=headers)
        assert "Content-Type: application/json" in error_of(response, 400)["message"]
    response = client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert "not valid JSON" in error_of(response, 400)["message"]


def test_requests_beyond_the_queue_are_told_to_come_back(serve):
    with serve(max_running=1, max_waiting=1) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        slow = slowed(running, 0.02)
        with client.stream("POST", "/v1/chat/completions", json=body(stream=True, n=2, **LONG)) as stream:
            lines = stream.iter_lines()  # kept, as an iterator that is thrown away hangs up
            next(lines)
            refused = httpx.post(running.url + "/v1/chat/completions", json=body())
            assert error_of(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(running.url + "/health").is_success
        slow.undo()
        running.settle()
        assert client.post("/v1/chat/completions", json=body(n=2)).is_success
        assert "at most 2" in error_of(client.post("/v1/chat/completions", json=body(n=3)), 400)["message"]


def slowed(running, seconds):
    """Each step of this server's engine takes longer from now on."""
    patch = pytest.MonkeyPatch()
    step = Engine.step

    def slow_step(engine):
        time.sleep(seconds)
        return step(engine)

    patch.setattr(Engine, "step", slow_step)
    return patch


@pytest.fixture
def slow_steps(server):
    patch = slowed(server, 0.02)
    yield
    patch.undo()


def test_a_reply_that_takes_too_long_is_given_up(serve):
    with serve(deadline_s=0.3) as running:
        slow = slowed(running, 0.06)
        url = running.url + "/v1/chat/completions"
        assert error_of(httpx.post(url, json=body(**LONG), timeout=30), 504)["code"] == "deadline_exceeded"
        running.settle(2)
        events = httpx.post(url, json=body(stream=True, **LONG), timeout=30).text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert len(events) > 2
        running.settle(2)
        slow.undo()
        slow = slowed(running, 0.5)
        assert error_of(httpx.post(url, json=body(stream=True, **LONG), timeout=30), 504)
        slow.undo()


# Hanging up


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_row_within_a_step(server, slow_steps, stream):
    async def ask_and_leave():
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body(stream=stream, n=4, **LONG)))
            while server.engine.stats.running < 4:
                await asyncio.sleep(0.005)
            asking.cancel()

    asyncio.run(ask_and_leave())
    steps = []
    patch = pytest.MonkeyPatch()
    step = Engine.step
    patch.setattr(Engine, "step", lambda engine: (steps.append(engine.running), step(engine))[1])
    try:
        wait_until(lambda: server.engine.load == 0, 2)
    finally:
        patch.undo()
    assert len(steps) <= 5  # noticing takes the event loop a moment; 64 steps would be needed to finish
    wait_until(lambda: server.engine.stats.running == 0)


# When something breaks


def test_health_says_so_when_the_engine_is_gone(serve, bundle, caplog):
    made = []

    def make_once():
        if made:
            raise RuntimeError("no memory for another engine")
        made.append(Engine(bundle.model, rows=2))
        made[0].step = lambda: 1 / 0
        return made[0]

    with serve(make_engine=make_once) as running:
        assert httpx.get(running.url + "/health").is_success
        error_of(httpx.post(running.url + "/v1/chat/completions", json=body()), 500)
        wait_until(lambda: not running.engine.is_alive)
        assert error_of(httpx.get(running.url + "/health"), 503)["code"] == "engine_stopped"
        error_of(httpx.post(running.url + "/v1/chat/completions", json=body()), 503)
    assert "no memory for another engine" in caplog.text


def test_a_fault_of_a_route_is_a_500_and_in_the_log(serve, capsys, monkeypatch):
    with serve() as running:
        monkeypatch.setattr(type(running.service), "check_name", lambda *_: 1 / 0)
        error_of(httpx.get(running.url + "/v1/models/x"), 500)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_server_that_stops_tells_those_whose_replies_it_cannot_finish(serve, monkeypatch):
    monkeypatch.setattr("nanollm.serve.server.GRACE_S", 0.3)
    with serve() as running, httpx.Client(base_url=running.url, timeout=30) as client:
        slow = slowed(running, 0.3)
        with client.stream("POST", "/v1/chat/completions", json=body(stream=True, **LONG)) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.server.should_exit = True
            last = [line for line in lines if line][-1]
        slow.undo()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"


# Numbers


def test_metrics_count_requests_tokens_and_times(serve):
    with serve() as running:
        for _ in range(2):
            assert httpx.post(running.url + "/v1/chat/completions", json=body(**LONG | {"max_tokens": 5}))
        httpx.get(running.url + "/made/up")
        response = httpx.get(running.url + "/metrics")
        numbers = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
        assert response.headers["content-type"].startswith("text/plain")
        assert numbers['nanollm_requests_total{route="/v1/chat/completions",status="200"}'] == "2.0"
        assert numbers['nanollm_requests_total{route="none",status="404"}'] == "1.0"
        assert numbers["nanollm_generated_tokens_total"] == "10.0"
        assert float(numbers["nanollm_reused_tokens_total"]) > 0
        assert numbers["nanollm_running_replies"] == numbers["nanollm_waiting_replies"] == "0.0"
        assert numbers["nanollm_time_to_first_token_seconds_count"] == "2.0"
        assert numbers["nanollm_time_per_output_token_seconds_count"] == "2.0"
        assert "/made/up" not in response.text
