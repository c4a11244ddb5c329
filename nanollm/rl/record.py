"""What did a step's replies earn, in numbers for the log and in lines for people who audit a run?

Letters: P prompts, G replies per prompt.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from torch import Tensor

from nanollm.durable import make_folder, write_file
from nanollm.rl.loss import Seen
from nanollm.rl.reward import Reward
from nanollm.rl.rollout import Group


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
    """What the replies of a step were like."""
    rollouts = [rollout for each in graded for rollout in each.group.rollouts]
    rewards = [reward for each in graded for reward in each.rewards]
    lengths = [len(rollout.reply_ids) for rollout in rollouts]
    parts = {f"reward_{name}": fmean(reward.parts[name] for reward in rewards) for name in rewards[0].parts}
    return {
        "reward_std": pstdev(reward.total for reward in rewards),
        **parts,
        "groups": len(graded),
        "groups_dropped": sum(not each.has_signal for each in graded),
        "reply_tokens": fmean(lengths),
        "reply_tokens_max": max(lengths),
        "finished": fmean(rollout.stop == "end" for rollout in rollouts),
    }


def policy_metrics(seen: Sequence[Seen]) -> dict[str, float]:
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
        "engine_logprob_difference": mean("engine_difference"),
        "engine_logprob_difference_max": max(each.engine_difference_max.item() for each in seen),
        "engine_ratio": mean("importance"),
        "engine_ratio_truncated": mean("truncated"),
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
            record |= {"tokens": len(rollout.reply_ids), "stop": rollout.stop, "trained": each.has_signal}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_file(path, "".join(lines).encode())
