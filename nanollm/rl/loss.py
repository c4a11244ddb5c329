"""GRPO and its variants: from rewards to advantages, ratios and the policy loss.

Every choice is a way to weigh the same terms, so the loss stays a sum that is divided once, by the step's count.
Letters: B rows, T tokens, M trained tokens of a micro-batch (all replies' tokens with their end marks), R replies.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nanollm.config import check_at_least
from nanollm.model.transformer import Transformer
from nanollm.train.loss import token_logprobs

AdvantageName = Literal["mean_only", "std", "batch_std", "reward"]

EPSILON = 1e-6  # keeps a division finite; a group whose rewards are all equal is never divided, it is left out


def group_advantages(rewards: Tensor, kind: AdvantageName) -> Tensor:
    """How much better each reply is than its group: rewards (P, G) to advantages (P, G).

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2.

    mean_only: reward - mean of the group; dividing by its deviation would favour very easy and very hard problems
    (Dr. GRPO, arXiv:2503.20783). std: divided by the group's standard deviation (GRPO, arXiv:2402.03300, equation 3).
    batch_std: divided by the standard deviation of all rewards of the step (arXiv:2508.08221). Each group of these sums
    to zero. reward: not compared at all, so that rewards of 0 and 1 imitate the right replies (RFT, arXiv:2308.01825).
    """
    differs = (rewards != rewards[:, :1]).any(1, keepdim=True)  # else a mean that is rounded would leave a rest
    centred = (rewards - rewards.mean(1, keepdim=True)) * differs
    match kind:
        case "mean_only":
            return centred
        case "std":
            return centred / (rewards.std(1, keepdim=True, correction=0) + EPSILON)
        case "batch_std":
            return centred / (rewards.std(correction=0) + EPSILON)
        case "reward":
            return rewards


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is maximised."""

    advantage: AdvantageName = "mean_only"
    """mean_only: reward - mean of the group (Dr. GRPO, arXiv:2503.20783); std: divided by the group's standard
    deviation (GRPO, arXiv:2402.03300); batch_std: divided by that of the whole step (arXiv:2508.08221); reward: the
    reward itself, which imitates right replies and learns nothing from wrong ones (RFT, arXiv:2308.01825)."""
    ratio: Literal["token", "sequence"] = "token"
    """New probability / old probability of each token (GRPO), or the geometric mean over the reply (GSPO,
    arXiv:2507.18071; it needs clips of about 3e-4)."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """token_mean: every token weighs the same (DAPO, arXiv:2503.14476); sequence_mean: every reply does, so tokens of
    long ones weigh less (GRPO); constant: sum / (replies x rollout.max_tokens) (Dr. GRPO)."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """clip: the pessimistic clipped ratio of PPO (arXiv:1707.06347); cispo: REINFORCE weighted by the truncated ratio,
    so that no token loses its gradient (arXiv:2506.13585)."""
    clip_low: float = 0.2
    """clip: the ratio counts down to 1 - clip_low."""
    clip_high: float = 0.28
    """clip: the ratio counts up to 1 + clip_high; higher than clip_low keeps rare tokens alive (DAPO)."""
    cispo_max: float = 5.0
    """cispo: the ratio counts up to this (arXiv:2510.13786)."""
    beta: float = 0.0
    """Weight of KL(policy, reference); 0: no reference model is loaded."""
    kl_estimator: Literal["unbiased", "k3"] = "unbiased"
    """unbiased: k3 times new probability / old probability, whose gradient is that of KL(policy, reference)
    (DeepSeek-V3.2, arXiv:2512.02556); k3: k3 alone (GRPO, arXiv:2402.03300, equation 4), whose gradient is that of
    KL(reference, policy)."""
    mini_batches: int = 1
    """Mini-batches that a step's rollouts are split into, by whole groups; each gets its own optimizer update."""
    updates: int = 1
    """Passes over each step's rollouts. With one pass and one mini-batch the ratio is exactly 1 and nothing is
    clipped."""
    mask_truncated: bool = False
    """Do not train on replies that were cut off at rollout.max_tokens (overlong filtering, DAPO, arXiv:2503.14476).
    They still count in the mean of their group."""
    importance_cap: float | None = None
    """Weight each token by trainer probability / engine probability, measured before the first update and capped at
    this value (truncated importance sampling, https://fengyao.notion.site/off-policy-rl); 0: off; null: 2 where
    rollout.engine is not our own, else off."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"objective.{name} must be at least 0, got {getattr(self, name)}")
        if not self.clip_low < 1:
            raise ValueError(f"objective.clip_low must be below 1, got {self.clip_low}")
        if not self.cispo_max >= 1:
            raise ValueError(f"objective.cispo_max must be at least 1, got {self.cispo_max}")
        check_at_least(1, self, "mini_batches", "updates", prefix="objective.")
        if self.importance_cap and not self.importance_cap >= 1:
            raise ValueError(f"objective.importance_cap must be at least 1, or 0 (off), got {self.importance_cap}")


@dataclass(frozen=True)
class RolloutBatch:
    """Replies packed into rows; what is known of each trained token is in vectors (M,), ordered as `token_indices`."""

    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, 0 where a prompt begins
    token_indices: Tensor  # (M,) int64: where in the flattened rows the trained tokens are predicted
    targets: Tensor  # (M,) int64: the trained tokens
    reply: Tensor  # (M,) int64: which of the micro-batch's R replies the token belongs to
    advantages: Tensor  # (M,) float32
    weights: Tensor  # (M,) float32: how much the token's term counts in the sum
    engine_logprobs: Tensor  # (M,) float32: at sampling
    old_logprobs: Tensor | None  # (M,) float32: the trainer's before the first update; None: this is the first
    reference_logprobs: Tensor | None  # (M,) float32, with beta only
    count: float  # this micro-batch's share of what the step's sum is divided by

    def to(self, device: torch.device) -> "RolloutBatch":
        """The same micro-batch on a device."""
        tensors: dict[str, Any] = {
            f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def split_micro_batches(self, rows: int) -> list["RolloutBatch"]:
        """The same in micro-batches of that many rows, into which they divide; replies stand in the order of the rows.

        The last may have no reply: there are as many for every rank.
        """
        parts, places = len(self.tokens) // rows, rows * self.tokens.shape[1]
        batches = []
        for part in range(parts):
            here = self.token_indices // places == part  # (M,)
            vectors = {
                f.name: value[here]
                for f in fields(self)
                if isinstance(value := getattr(self, f.name), Tensor) and value.dim() == 1
            }
            vectors["token_indices"] = vectors["token_indices"] - part * places
            vectors["reply"] = vectors["reply"] - vectors["reply"][:1]
            stretch = slice(part * rows, (part + 1) * rows)
            matrices: dict[str, Any] = {"tokens": self.tokens[stretch], "positions": self.positions[stretch]}
            batches.append(replace(self, **matrices, **vectors, count=self.count / parts))
        return batches


@dataclass(frozen=True)
class LossMetrics:
    """What a micro-batch showed, each a sum over its tokens (M of them) except the maximum."""

    tokens: int
    entropy: Tensor
    clipped: Tensor  # tokens whose ratio was outside the clips on the side that counts
    kl: Tensor  # k3 estimate of KL(policy, reference), with beta only
    engine_difference: Tensor  # |trainer - engine| log-probability, before the first update only
    engine_difference_max: Tensor
    importance: Tensor  # trainer / engine probability, at most the cap
    truncated: Tensor  # tokens where it is above the cap

    def cpu(self) -> "LossMetrics":
        """The same, to be told to other processes, whose devices are their own."""
        return replace(self, **{f.name: getattr(self, f.name).cpu() for f in fields(self) if f.name != "tokens"})


TRUNCATION = 2.0
"""The cap where none is set: then trainer / engine is only watched, because one model object samples and trains."""


def policy_logprobs(
    model: Transformer, batch: RolloutBatch, temperature: float, *, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of every trained token and the entropy where it was drawn: (M,), (M,) without gradient.

    The temperature is the one of sampling, so that the distribution that is trained is the one that was sampled.
    """
    hidden = hidden_at(model, batch.tokens, batch.positions, batch.token_indices, recompute=recompute)
    return token_logprobs(model.head, hidden, batch.targets, temperature)


def hidden_at(
    model: Transformer, tokens: Tensor, positions: Tensor | None, indices: Tensor, *, recompute: bool = False
) -> Tensor:
    """Hidden states (M, D) at `indices` (M,) of the flattened rows (B, T)."""
    hidden, _ = model.trunk.routed(tokens, positions=positions, recompute=recompute)
    return hidden.flatten(0, 1).index_select(0, indices)


def grpo_loss(
    model: Transformer, batch: RolloutBatch, c: ObjectiveConfig, temperature: float, *, recompute: bool = False
) -> tuple[Tensor, Tensor, LossMetrics]:
    """Loss of a micro-batch to train on, the same detached, and what was seen on the way."""
    logprobs, entropy = policy_logprobs(model, batch, temperature, recompute=recompute)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    terms, clipped = surrogate(logprobs, old, batch.advantages, batch.reply, c)
    kl = torch.zeros_like(terms)
    if batch.reference_logprobs is not None:
        kl = k3(logprobs, batch.reference_logprobs)
        # Fixed samples of the old policy: only weighted by the ratio does their mean change with the policy as KL does.
        weight = (logprobs - old).exp() if c.kl_estimator == "unbiased" else 1.0
        terms = terms + c.beta * weight * kl
    difference, cap = old - batch.engine_logprobs, c.importance_cap or TRUNCATION  # no gradient goes through these
    importance = difference.exp().clamp(max=cap)
    if c.importance_cap:
        terms = importance * terms  # the divergence too: its estimate is over tokens that the trainer would draw
    loss = (batch.weights * terms).sum()
    seen = LossMetrics(
        tokens=len(terms),
        entropy=entropy.sum(),
        clipped=clipped.sum(),
        kl=kl.detach().sum(),
        engine_difference=difference.abs().sum(),
        engine_difference_max=difference.abs().max() if len(terms) else terms.new_zeros(()),
        importance=importance.sum(),
        truncated=(difference.exp() > cap).sum(),
    )
    return loss, loss.detach(), seen


def surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, reply: Tensor, c: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """What each token adds to the loss, and whether its clip took the gradient away; all (M,)."""
    ratio = ratios(logprobs, old, reply, c.ratio)
    if c.surrogate == "cispo":
        weight = ratio.detach().clamp(max=c.cispo_max)
        return -weight * advantages * logprobs, ratio > c.cispo_max
    plain = ratio * advantages
    limited = ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * advantages
    return -torch.minimum(plain, limited), limited < plain


def ratios(logprobs: Tensor, old: Tensor, reply: Tensor, kind: Literal["token", "sequence"]) -> Tensor:
    """New probability / old probability, of each token or as the geometric mean over its reply (GSPO eq. 7): (M,)."""
    difference = logprobs - old
    if kind == "token":
        return difference.exp()
    lengths = reply.bincount()  # (R,)
    sums = difference.new_zeros(len(lengths)).index_add(0, reply, difference)
    return (sums / lengths).exp()[reply]


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, never negative estimate of KL(policy, reference) from tokens of the policy: (M,).

    Source: http://joschu.net/blog/kl-approx.html. Unbiased is its value; its gradient is that of KL(reference, policy).
    """
    difference = reference - logprobs
    return difference.exp() - difference - 1


def token_weights(lengths: Tensor, aggregation: str) -> Tensor:
    """How much a token of each reply counts: lengths (R,) to (R,) float32."""
    return 1 / lengths.float() if aggregation == "sequence_mean" else torch.ones(len(lengths))


def count_of(replies: int, tokens: int, aggregation: str, max_tokens: int) -> float:
    """What the sum over these replies, of so many tokens, is divided by."""
    return {"token_mean": tokens, "sequence_mean": replies, "constant": replies * max_tokens}[aggregation]
