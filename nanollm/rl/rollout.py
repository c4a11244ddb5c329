"""Rollouts: groups of replies to problems, sampled from the policy, and their metrics.

All prompts of a step are sampled together by the engine that users talk to, with the very weights that are trained. A
model that outgrows one device can be sampled by a vLLM server instead: rl/vllm.py.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal

from torch import Tensor

from nanollm.config import check_at_least
from nanollm.durable import make_folder, write_file
from nanollm.generate.engine import generate
from nanollm.generate.request import MakeTool
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.turns import Turns, outcome_of
from nanollm.model.transformer import Transformer
from nanollm.rl.loss import LossMetrics
from nanollm.rl.reward import Reward
from nanollm.sources.environments import MakeEnvironment, Verdict
from nanollm.sources.gsm8k import Problem
from nanollm.text.chat import Conversation, encode_prompt, reply_ends
from nanollm.text.tokenizer import Tokenizer

OWN = "own"
ADDRESS = re.compile(r"vllm://(?:(?P<name>[\w.-]+)|\[(?P<ipv6>[\da-fA-F:.]+)\]):(?P<port>\d{1,5})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How replies are sampled."""

    prompts: int = 32
    """Problems per step."""
    group_size: int = 8
    """Replies per problem, which grpo compares with each other."""
    max_tokens: int = 128
    """Maximum length of a reply in tokens, its end token included."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in training alike. There is no top_k or top_p: training takes the whole
    distribution, so sampling draws from all of it."""
    resample: int = 1
    """How often at most to replace problems whose replies all earned the same reward (dynamic sampling, DAPO,
    arXiv:2503.14476); 0: never, they are only left out."""
    tools: list[str] | None = None
    """Tools that the model may call while it replies, such as calculator. null: those the model was trained with; none:
    no tools. A tool's tokens are not trained."""
    engine: str = OWN
    """Inference engine. own: the engine of this process; vllm://HOST:PORT: a vLLM server that receives the weights
    before each step (docs/post-training.md), for models that outgrow one device."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "prompts", "group_size", "max_tokens", prefix="rollout.")
        check_at_least(0, self, "resample", prefix="rollout.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"rollout.temperature must be above 0 (at 0 all replies to a problem are equal), got {self.temperature}"
            )
        _ = self.server  # refuses what is no address

    @property
    def server(self) -> tuple[str, int] | None:
        """Host and port of the vLLM server that samples; None: our own engine does."""
        if self.engine == OWN:
            return None
        address = ADDRESS.fullmatch(self.engine)
        if address is None or not 0 < int(address["port"]) < 2**16:
            raise ValueError(
                f"rollout.engine must be {OWN} or vllm://HOST:PORT, such as vllm://localhost:8000, got {self.engine!r}"
            )
        return address["name"] or address["ipv6"], int(address["port"])


@dataclass(frozen=True)
class Rollout:
    """One reply, as it was drawn."""

    prompt_ids: list[int]
    reply_ids: list[int]  # with the end mark, if it was drawn: it is trained like every other token
    logprobs: list[float]  # of each of reply_ids, by the engine
    stop: Literal["end", "length"]
    is_sampled: list[bool]  # of each of reply_ids; a tool or an environment gave the others, which are not trained
    outcome: Verdict | None = None  # of a conversation with an environment


@dataclass(frozen=True)
class Group:
    """A problem and its rollouts. They belong together by their place, never by what the prompt says."""

    problem: Problem
    rollouts: list[Rollout]


def roll_out(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    c: RolloutConfig,
    seed: int,
    tool: MakeTool | None = None,
    environment: MakeEnvironment | None = None,
) -> list[Group]:
    """Ask each problem group_size times.  The context must have room for a reply, which with an environment is a whole
    conversation."""
    if not problems:
        return []
    prompts = [prompt_of(problem, tokenizer) for problem in problems]
    turns = list[Turns]()
    if environment is not None:
        turns = [Turns(environment(problem), tokenizer, tool) for problem in problems for _ in range(c.group_size)]
    completions = generate(
        model,
        prompts,
        SamplingConfig(temperature=c.temperature),
        max_tokens=c.max_tokens,
        stop_token_ids=reply_ends(tokenizer),
        seed=seed,
        tool=iter(turns).__next__ if turns else tool,
        samples=c.group_size,
    )
    rollouts = [
        Rollout(
            prompt_ids=prompts[row // c.group_size],
            reply_ids=completion.ids + ([] if completion.stop_token_id is None else [completion.stop_token_id]),
            logprobs=completion.logprobs,
            stop="length" if completion.finish == "length" else "end",
            is_sampled=completion.is_sampled + [True] * (completion.stop_token_id is not None),
            outcome=outcome_of(completion),
        )
        for row, completion in enumerate(completions)
    ]
    return [
        Group(problem, rollouts[number * c.group_size : (number + 1) * c.group_size])
        for number, problem in enumerate(problems)
    ]


def prompt_of(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the reply to a problem begins."""
    return encode_prompt(Conversation.of(problem.question), tokenizer)


@dataclass(frozen=True)
class Graded:
    """A group with what its replies earned."""

    group: Group
    texts: list[str]
    rewards: list[Reward]

    @property
    def totals(self) -> list[float]:
        return [reward.total for reward in self.rewards]

    @property
    def has_signal(self) -> bool:
        return len(set(self.totals)) > 1


def rollout_metrics(graded: Sequence[Graded]) -> dict[str, float]:
    """What the replies of a step were like, by TRL's names."""
    rollouts = [rollout for each in graded for rollout in each.group.rollouts]
    rewards = [reward for each in graded for reward in each.rewards]
    lengths = [len(rollout.reply_ids) for rollout in rollouts]
    parts = {f"rewards/{name}/mean": fmean(reward.parts[name] for reward in rewards) for name in rewards[0].parts}
    return {
        "reward_std": pstdev(reward.total for reward in rewards),
        **parts,
        "groups": len(graded),
        "frac_reward_zero_std": fmean(not each.has_signal for each in graded),
        "completions/mean_length": fmean(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": fmean(rollout.stop == "length" for rollout in rollouts),
    }


def policy_metrics(seen: Sequence[LossMetrics]) -> dict[str, float]:
    """Whether the numbers can be trusted: means over all trained tokens of a step's updates."""
    if not seen:
        return {}
    tokens = sum(each.tokens for each in seen)

    def mean(name: str) -> float:
        return sum(getattr(each, name).item() for each in seen) / tokens

    return {
        "entropy": mean("entropy"),
        "clip_fraction": mean("clipped"),
        "kl": mean("kl"),
        "sampling/sampling_logp_difference/mean": mean("engine_difference"),
        "sampling/sampling_logp_difference/max": max(each.engine_difference_max.item() for each in seen),
        "sampling/importance_sampling_ratio/mean": mean("importance"),
        "sampling/importance_sampling_ratio/capped": mean("truncated"),
    }


def save_rollouts(path: Path, graded: Sequence[Graded], compared: Tensor) -> None:
    """Every reply of a step with what became of it, one JSON object per line."""
    make_folder(path.parent)
    lines = []
    for each, row in zip(graded, compared.tolist(), strict=True):
        for text, rollout, reward, advantage in zip(each.texts, each.group.rollouts, each.rewards, row, strict=True):
            problem = each.group.problem
            record: dict[str, object] = {"question": problem.question, "answer": problem.answer, "reply": text}
            record |= {"reward": reward.total, "parts": reward.parts, "advantage": advantage}
            record |= {
                "tokens": len(rollout.reply_ids),
                "stop": rollout.stop,
                "trained": any(row),
            }
            record |= {} if rollout.outcome is None else {"turns": True}  # then the reply tells all of a conversation
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_file(path, "".join(lines).encode())
