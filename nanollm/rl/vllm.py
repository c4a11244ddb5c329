"""Rollouts from a vLLM server that is given the policy's weights before each step.

The trainer writes its weights as `nanollm export --format deepseek-v3` does, into the folder from which the server was
started, and has the server read them again. No code of ours runs there; the two share nothing but the folder and HTTP.

Routes, as they stand in the source of vLLM 0.33.0:
    GET  /version, /v1/models   `root` is the folder as it was typed after `vllm serve`; `max_model_len`
    POST /tokenize              ids of a text, to compare with ours
    POST /v1/completions        a prompt of ids; reply i of `n` draws from seed + i; with return_token_ids the exact
                                ids, the end mark among them; `logprobs` 0 is of the drawn tokens alone, before the
                                temperature unless the server was started with --logprobs-mode processed_logprobs
    POST /collective_rpc        {"method": "reload_weights"}: the folder's weights, in the place of the old ones; it and
    POST /reset_prefix_cache    (what older weights read of prompts is forgotten) need VLLM_SERVER_DEV_MODE=1
Before 0.27 a reload left latent attention's absorbed matrices behind: the CUDA graphs kept reading the old ones
(`W_UK_T` in model_executor/layers/attention/mla_attention.py).
"""

import json
import math
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from torch import Tensor

from nanollm.durable import new_folder, sync
from nanollm.model.config import ModelConfig
from nanollm.rl.rollout import Group, Rollout, RolloutConfig, prompt_of
from nanollm.sources.gsm8k import Problem
from nanollm.text.chat import reply_ends
from nanollm.text.tokenizer import Tokenizer

OLDEST = (0, 27)
MAX_REQUESTS = 256
"""Requests under way at once; vLLM's own default for what it runs at once is about that (--max-num-seqs)."""
BUSY = (502, 503, 504)
DEVELOPER_ROUTES = ("/collective_rpc", "/reset_prefix_cache")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_S = 10.0
ROUNDING = 1e-3
TEXT = "Ann has 3 apples,  Bob 1,250.\nHow many is that?"


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    """A server, and the model that it is given. Every fault is an OSError or a ValueError of one line."""

    host: str
    port: int
    folder: Path
    """Read by the server, written by us: at the same path on both machines."""
    config: ModelConfig
    tokenizer: Tokenizer
    export: Callable[[Path, Mapping[str, Tensor]], None]
    """Writes weights, by the names of Transformer's state_dict, into an empty folder as a model that vLLM reads."""
    timeout_s: float = 1800.0
    """Longest wait for an answer; the replies to a prompt come together, when the last has ended."""
    waits_s: Sequence[float] = (1.0, 4.0, 15.0)
    """Before each new try where a connection broke or the server was busy."""

    def __str__(self) -> str:
        return f"vllm://[{self.host}]:{self.port}" if ":" in self.host else f"vllm://{self.host}:{self.port}"

    @property
    def command(self) -> str:
        """What starts such a server. In developer mode whoever reaches it may do anything, so only this machine should
        where that is enough."""
        host = f"--host {self.host} " if self.host in LOOPBACK else ""
        return (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.quote(str(self.folder.resolve()))} {host}--port {self.port} "
            f"--max-model-len {self.config.context_length} --logprobs-mode processed_logprobs"
        )

    def connect(self, weights: Mapping[str, Tensor], c: RolloutConfig) -> None:
        """Write the folder, from which a server can be started then, and refuse one that could not serve the run."""
        self._write(weights)
        version = str(self._ask("GET", "/version", waits_s=()).get("version"))
        numbers = re.match(r"(\d+)\.(\d+)", version)  # a build from source may be called dev
        if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
            raise ValueError(
                f"{self} is vLLM {version}, which does not take over all new weights of latent attention; "
                f"update it to {OLDEST[0]}.{OLDEST[1]} or newer"
            )
        self._check_model(self._ask("GET", "/v1/models"))
        self._check_ids(self._ask("POST", "/tokenize", {"prompt": TEXT, "add_special_tokens": False}))
        if c.temperature != 1:
            self._check_logprobs(c.temperature)

    def push(self, weights: Mapping[str, Tensor]) -> None:
        """Let the server go on with these weights, by the names of Transformer's state_dict, whole and of any float
        type; its requests must have been answered."""
        self._write(weights)
        self._ask("POST", "/collective_rpc", {"method": "reload_weights"})
        answer = self._ask("POST", "/reset_prefix_cache")
        if answer.get("success") is not True:
            raise ValueError(
                f"{self} could not forget what the old weights read (/reset_prefix_cache answered {answer}): something "
                f"else is asking it; a run needs a server of its own"
            )

    def roll_out(self, problems: Sequence[Problem], c: RolloutConfig, seed: int) -> list[Group]:
        """As rollout.roll_out, whose replies have these seeds too; the context must have room for a reply."""
        if not problems:
            return []
        prompts = [prompt_of(problem, self.tokenizer) for problem in problems]
        pool = ThreadPoolExecutor(min(len(prompts), MAX_REQUESTS))
        try:
            seeds = range(seed, seed + len(prompts) * c.group_size, c.group_size)
            drawn = list(pool.map(lambda prompt, first: self._sample(prompt, c, first), prompts, seeds))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after a fault nobody waits for the rest
        return [Group(problem, rollouts) for problem, rollouts in zip(problems, drawn, strict=True)]

    # --- what is wrong with a server ---

    def _check_model(self, answer: Mapping[str, Any]) -> None:
        """That it serves the folder that is written here, with the context that is needed."""
        try:
            root, length = str(answer["data"][0]["root"]), int(answer["data"][0]["max_model_len"])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self} does not say what it serves ({short(answer)}); is it vLLM?") from error
        if Path(root).resolve() != self.folder.resolve():
            raise ValueError(
                f"{self} serves {root}, this run writes its weights to {self.folder.resolve()}; start the server with: "
                f"{self.command}"
            )
        if length < self.config.context_length:
            raise ValueError(
                f"{self} reads {length:,} tokens at most, the model {self.config.context_length:,}; start the server "
                f"with: {self.command}"
            )

    def _check_ids(self, answer: Mapping[str, Any]) -> None:
        """That a text is the same ids there and here."""
        ours, theirs = self.tokenizer.encode(TEXT), answer.get("tokens")
        if theirs != ours:
            raise ValueError(
                f"{self} reads {TEXT[:8]!r}... as the ids {short(theirs)}, the tokenizer of this run as {short(ours)}; "
                f"start the server anew, so that it takes the tokenizer of its folder: {self.command}"
            )

    def _check_logprobs(self, temperature: float) -> None:
        """That log-probabilities are of the distribution that is drawn from.

        At half the temperature the two likeliest tokens lie twice as far apart, unless log-probabilities are those
        before it. If both are equally likely this tells nothing, and the numbers of the first step do.
        """
        at_one, at_half = self._gap(1.0), self._gap(0.5)
        if abs(at_half - at_one) < abs(at_half - 2 * at_one):
            raise ValueError(
                f"{self} gives log-probabilities before the temperature, rollout.temperature {temperature} needs those "
                f"after it; start the server with: {self.command}"
            )

    def _gap(self, temperature: float) -> float:
        """Between the log-probabilities of the two tokens that are likeliest to begin a text."""
        asked = body_of([self.tokenizer.bos_id], temperature, seed=0, n=1, max_tokens=1, ends=[]) | {"logprobs": 2}
        answer = self._ask("POST", "/v1/completions", asked)
        try:
            top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            second, first = sorted(map(float, top.values()))[-2:]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self} does not say how likely tokens are ({short(answer)}); is it vLLM?") from error
        return first - second

    # --- what passes between both ---

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        """Put an export into the folder. The folder itself stays, a container may have it mounted; each file in it is
        replaced whole, and the server reads only when it is told to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder.with_name(f"{self.folder.name}.next")
        with new_folder(beside) as draft:
            self.export(draft, weights)
        new = [file.name for file in beside.iterdir()]
        for name in new:
            (beside / name).replace(self.folder / name)
        for file in self.folder.glob("*.safetensors"):  # shards of an earlier export in another type
            if file.name not in new:
                file.unlink()
        sync(self.folder)
        beside.rmdir()

    def _sample(self, prompt: list[int], c: RolloutConfig, seed: int) -> list[Rollout]:
        """The replies to one prompt; reply i draws from seed + i."""
        ends = sorted(reply_ends(self.tokenizer))
        asked = body_of(prompt, c.temperature, seed=seed, n=c.group_size, max_tokens=c.max_tokens, ends=ends)
        choices = self._ask("POST", "/v1/completions", asked).get("choices")
        if not isinstance(choices, list) or len(choices) != c.group_size:
            raise ValueError(f"{self} was asked for {c.group_size} replies and answered {short(choices)}")
        for number, choice in enumerate(choices):
            if fault := fault_in(choice, number, prompt, c.max_tokens, ends, self.config.vocab_size):
                raise ValueError(
                    f"{self} answered what is no reply: {fault}; is it vLLM {OLDEST[0]}.{OLDEST[1]} or newer?"
                )
        return [
            Rollout(
                prompt_ids=prompt,
                reply_ids=choice["token_ids"],
                is_sampled=[True] * len(choice["token_ids"]),
                logprobs=choice["logprobs"]["token_logprobs"],
                stop="length" if choice["finish_reason"] == "length" else "end",
            )
            for choice in choices
        ]

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, waits_s: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """The JSON object that a route answers with. Asking twice changes nothing, so a broken connection is tried
        again."""
        for wait_s in (*(self.waits_s if waits_s is None else waits_s), None):
            try:
                status, content = self._exchange(method, path, body)
            except TimeoutError as error:
                raise TimeoutError(
                    f"{self} did not answer {path} within {self.timeout_s:g} s; look into its log"
                ) from error
            except (OSError, HTTPException) as error:
                fault = str(error) or type(error).__name__
            else:
                if status not in BUSY:
                    return self._read(path, status, content)
                fault = f"it answered {path} with {status}"
            if wait_s is not None:
                time.sleep(wait_s)
        raise ConnectionError(
            f"there is no answer from {self} ({fault}); start the server, wait until it says that it is up, and give "
            f"this command again: {self.command}"
        )

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Status and content of one answer. No proxy is asked, whatever the environment names."""
        connection = HTTPConnection(self.host, self.port, timeout=min(CONNECT_S, self.timeout_s))
        try:
            try:
                connection.connect()
            except TimeoutError as error:
                raise ConnectionError(f"no connection within {connection.timeout:g} s") from error
            connection.sock.settimeout(self.timeout_s)
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _read(self, path: str, status: int, content: bytes) -> dict[str, Any]:
        if status == 404 and path in DEVELOPER_ROUTES:
            raise ValueError(
                f"{self} has no {path}, without which it cannot take new weights; start the server with "
                f"VLLM_SERVER_DEV_MODE=1: {self.command}"
            )
        try:
            answer = json.loads(content or b"{}")
        except ValueError:
            answer = None
        if status != 200 or not isinstance(answer, dict):
            raise ValueError(f"{self} answered {path} with {status}: {short(content.decode(errors='replace'))}")
        return answer


def body_of(
    prompt: Sequence[int], temperature: float, *, seed: int, n: int, max_tokens: int, ends: Sequence[int]
) -> dict[str, Any]:
    """What /v1/completions is asked. All that shapes the distribution is said, because generation_config.json in the
    folder would fill in what is not."""
    return {
        "prompt": list(prompt),
        "n": n,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop_token_ids": list(ends),
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # else tokens of the same text would be one in top_logprobs
    }


def fault_in(
    choice: Any, number: int, prompt: Sequence[int], max_tokens: int, ends: Sequence[int], vocab_size: int
) -> str | None:
    """What is wrong with the answer to one of n replies; None: nothing."""
    if not isinstance(choice, dict) or choice.get("index") != number:
        return f"expected reply {number}, got {short(choice)}"
    if choice.get("prompt_token_ids") != prompt:
        return f"expected a reply to the ids {short(prompt)}, got one to {short(choice.get('prompt_token_ids'))}"
    ids, finish = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        return f"expected ids below {vocab_size:,} in token_ids, got {short(ids)}"
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        return f"expected a log-probability for each of {len(ids)} ids, got {short(logprobs)}"
    if not all(isinstance(value, float | int) and -math.inf < value <= ROUNDING for value in logprobs):
        return f"expected log-probabilities of at most 0, got {short(logprobs)}"
    is_over = bool(ids) and ids[-1] in ends
    if any(token in ends for token in ids[:-1]) or (finish, is_over) not in {("stop", True), ("length", False)}:
        return f"expected a reply that stops at {' or '.join(map(str, ends))}, got {short(ids)}, finished by {finish!r}"
    if len(ids) > max_tokens or (finish == "length" and len(ids) < max_tokens):
        return f"expected at most {max_tokens} ids, fewer only before an end mark, got {len(ids)}"
    return None


def short(value: object) -> str:
    """A value for one line of text."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
