"""Rollouts from a vLLM server that is given the policy's weights before each step.

The trainer writes its weights as `nanollm export --format deepseek-v3` does, into the folder from which the server was
started, and has the server read them again. No code of ours runs there; the two share nothing but the folder and HTTP.

Routes, as they stand in the source of vLLM 0.33.0:
    GET  /version, /v1/models   `root` is the folder as it was typed after `vllm serve`; `max_model_len`
    POST /v1/completions        a prompt of ids; reply i of `n` draws from seed + i; with return_token_ids the exact
                                ids, the end mark among them; `logprobs` 0 is of the drawn tokens alone, before the
                                temperature unless the server was started with --logprobs-mode processed_logprobs
    POST /collective_rpc        {"method": "reload_weights"}: the folder's weights, in the place of the old ones; it and
    POST /reset_prefix_cache    (what older weights read of prompts is forgotten) need VLLM_SERVER_DEV_MODE=1
Before 0.27 a reload left latent attention's absorbed matrices behind: the CUDA graphs kept reading the old ones
(`W_UK_T` in model_executor/layers/attention/mla_attention.py).
"""

import json
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from nanollm.bundle import build_model
from nanollm.durable import new_folder, sync
from nanollm.model.config import ModelConfig
from nanollm.rl.rollout import Group, Rollout, RolloutConfig, prompt_of
from nanollm.sources.gsm8k import Problem
from nanollm.text.chat import reply_ends
from nanollm.text.tokenizer import Tokenizer

OLDEST = (0, 27)
MAX_REQUESTS = 256
"""Requests under way at once; vLLM's own default for what it runs at once is about that (--max-num-seqs)."""
FAR = 0.03
"""Mean difference of log-probabilities that rounding to bfloat16 does not explain."""
BUSY = (502, 503, 504)
STOPS: Mapping[str, Literal["end", "length"]] = {"stop": "end", "length": "length"}  # by vLLM's finish_reason
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    """A server, and the model that it is given. Every fault is an OSError or a ValueError of one line."""

    host: str
    port: int
    folder: Path  # read by the server, written by us: at the same path on both machines
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: str  # of the weights, in vLLM's words: what it chooses for float32 by itself is bfloat16
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
            f"--dtype {self.dtype} --max-model-len {self.config.context_length} --logprobs-mode processed_logprobs"
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
        answer = self._ask("GET", "/v1/models")
        try:
            root, length = str(answer["data"][0]["root"]), int(answer["data"][0]["max_model_len"])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self} does not say what it serves ({short(answer)}); is it vLLM?") from error
        if Path(root).resolve() != self.folder.resolve() or length < self.config.context_length:
            raise ValueError(
                f"{self} serves {root} with a context of {length:,} tokens, this run needs {self.folder.resolve()} "
                f"with {self.config.context_length:,}; start the server with: {self.command}"
            )
        self._check_logprobs(weights, c)

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

    @torch.inference_mode()
    def _check_logprobs(self, weights: Mapping[str, Tensor], c: RolloutConfig) -> None:
        """Give the server the weights, and refuse one whose log-probabilities are not those of the weights."""
        self.push(weights)
        model = build_model(self.config)
        model.load_state_dict({name: tensor.cpu().float() for name, tensor in weights.items()}, assign=True)
        model.eval()
        apart: list[float] = []
        for rollout in self._sample([self.tokenizer.bos_id], replace(c, group_size=8, max_tokens=16), seed=0):
            ids = torch.tensor([*rollout.prompt_ids, *rollout.reply_ids])
            logprobs = (model(ids[None, :-1])[0] / c.temperature).log_softmax(-1)  # (T, V)
            ours = logprobs.gather(-1, ids[1:, None])[:, 0]
            apart += (ours - torch.tensor(rollout.logprobs)).abs().tolist()
        if fmean(apart) > FAR:
            raise ValueError(
                f"{self} gives log-probabilities that are {fmean(apart):.2g} from ours on average: it computes in "
                f"another type, gives them before the temperature, or did not take the new weights; start the server "
                f"with: {self.command}"
            )

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
        answer = self._ask("POST", "/v1/completions", self._body(prompt, c, seed))
        try:
            rollouts = [
                Rollout(
                    prompt_ids=prompt,
                    reply_ids=[int(token) for token in choice["token_ids"]],
                    logprobs=[float(logprob) for logprob in choice["logprobs"]["token_logprobs"]],
                    stop=STOPS[choice["finish_reason"]],
                    is_sampled=[True] * len(choice["token_ids"]),
                )
                for choice in answer["choices"]
            ]
            vocab_size = self.config.vocab_size
            is_sound = all(
                len(each.reply_ids) == len(each.logprobs) > 0
                and 0 <= min(each.reply_ids) <= max(each.reply_ids) < vocab_size
                for each in rollouts
            )
        except (LookupError, TypeError, ValueError):
            rollouts, is_sound = [], False
        if not is_sound or len(rollouts) != c.group_size:
            raise ValueError(
                f"{self} was asked for {c.group_size} replies with ids and log-probabilities and answered "
                f"{short(answer)}; is it vLLM {OLDEST[0]}.{OLDEST[1]} or newer?"
            )
        return rollouts

    def _body(self, prompt: list[int], c: RolloutConfig, seed: int) -> dict[str, Any]:
        """What /v1/completions is asked. All that shapes the distribution is said, because generation_config.json in
        the folder would fill in what is not."""
        return {
            "prompt": prompt,
            "n": c.group_size,
            "seed": seed,
            "max_tokens": c.max_tokens,
            "stop_token_ids": sorted(reply_ends(self.tokenizer)),
            "temperature": c.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, waits_s: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """The JSON object that a route answers with. Asking twice changes nothing, so a broken connection is tried
        again."""
        for wait_s in (*(self.waits_s if waits_s is None else waits_s), None):
            try:
                status, content = self._exchange(method, path, body)
            except TimeoutError as error:
                raise TimeoutError(f"{self} did not answer {path} in time ({error}); look into its log") from error
            except (OSError, HTTPException) as error:
                fault = str(error) or type(error).__name__
            else:
                if status not in BUSY:
                    break
                fault = f"it answered {path} with {status}"
            if wait_s is None:
                raise ConnectionError(
                    f"there is no answer from {self} ({fault}); start the server, wait until it says that it is up, "
                    f"and give this command again: {self.command}"
                )
            time.sleep(wait_s)
        try:
            answer = json.loads(content or b"{}")
        except ValueError:
            answer = None
        if status != 200 or not isinstance(answer, dict):
            advice = f"; start the server with: {self.command}" if status == 404 else ""
            raise ValueError(f"{self} answered {path} with {status}: {short(content.decode(errors='replace'))}{advice}")
        return answer

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Status and content of one answer. No proxy is asked, whatever the environment names."""
        connection = HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def short(value: object) -> str:
    """A value for one line of text."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
