"""Preferences: losses of DPO, IPO, SimPO and KTO, and their batches.

A reward is what a policy's log-probability of a reply says beside that of the reference, whose log-probabilities are
computed once, before training. A step's loss is a sum over its examples, pairs or with KTO replies, divided once.
Letters: S replies (of pairs chosen, rejected, chosen, ...), E examples, B rows, T places, M trained tokens.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.data.batches import IGNORE, Batch
from nanollm.data.packing import PackedLayout, best_width, even_rows, pack
from nanollm.model.transformer import Transformer
from nanollm.rl.loss import hidden_at
from nanollm.sources.datasets import Preference, Reply
from nanollm.text.chat import Conversation, Message, Shortened, Tool, encode_conversation
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.loss import token_logprobs
from nanollm.train.state import TrainState
from nanollm.world import World

TOGETHER = 512  # examples whose log-probabilities are computed at once, outside of training

Example = tuple[Shortened, ...]
"""What is compared: a chosen and a rejected reply, each behind its prompt, or with KTO one reply."""


Asked = tuple[tuple[Message, ...], Reply]
"""A prompt and a reply."""

Seen = tuple[Tensor, Tensor, Tensor]
"""Rewards, log-probabilities and sides of the replies of a micro-batch, (S,) each."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What is learned from preferences."""

    loss: Literal["dpo", "ipo", "simpo", "kto"] = "dpo"
    """dpo: -log sigmoid of the margin between the rewards of chosen and rejected (arXiv:2305.18290, equation 7); ipo:
    squared distance of the margin per token to 1/(2 beta) (arXiv:2310.12036, equation 17); simpo: DPO with the mean
    log-probability of a token as reward, and without a reference (arXiv:2405.14734, equation 6); kto: from replies that
    were judged one by one (arXiv:2402.01306, section 4)."""
    beta: float = 0.1
    """Factor of the rewards: the higher, the closer to the reference; of ipo, its tau. simpo needs about 2."""
    label_smoothing: float = 0.0
    """dpo: the share of the pairs that are believed to be the wrong way round (https://ericmitchell.ai/cdpo.pdf)."""
    sft_weight: float = 0.0
    """dpo: weight of the loss of plain training, the chosen reply's mean negative log-probability of a token, which is
    added (arXiv:2404.19733, equation 1). Without it chosen replies may become unlikely, too: only the margin counts."""
    gamma: float = 0.5
    """simpo: the margin to be reached."""
    desirable_weight: float = 1.0
    """kto: weight of replies with the label true."""
    undesirable_weight: float = 1.0
    """kto: weight of replies with the label false. Where one kind is rare, a larger weight of it evens them out."""

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"objective.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"objective.label_smoothing must be from 0 to below 0.5, got {self.label_smoothing}")
        for name in ("sft_weight", "gamma"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"objective.{name} must be at least 0, got {getattr(self, name)}")
        for loss, name, nothing in (
            *(("dpo", "label_smoothing", 0.0), ("dpo", "sft_weight", 0.0), ("simpo", "gamma", 0.5)),
            *(("kto", "desirable_weight", 1.0), ("kto", "undesirable_weight", 1.0)),
        ):
            if self.loss != loss and getattr(self, name) != nothing:
                raise ValueError(f"objective.{name} is for {loss}; {self.loss} has no use for it")

    @property
    def is_paired(self) -> bool:
        return self.loss != "kto"


@dataclass(frozen=True)
class PreferenceSet:
    """Preferences as ids."""

    examples: Sequence[Example]
    is_chosen: Tensor  # (S,) bool
    reference: Tensor  # (S,) float32: log-probabilities by the reference; 0 without one
    mismatched: "PreferenceSet | None" = None  # kto: of each example, its prompt with a reply to another
    notes: str = ""  # what was left out or cut

    @property
    def fingerprint(self) -> str:
        """sha256 of what is learned from."""
        seen = sha256(self.is_chosen.numpy().tobytes())
        for reply in (reply for example in self.examples for reply in example):
            seen.update(b"%d" % len(reply.ids) + reply.ids.tobytes() + reply.trained.tobytes())
        return seen.hexdigest()


def encode_preferences(
    given: Iterable[Preference], c: PreferenceConfig, tokenizer: Tokenizer, tools: Sequence[Tool], context_length: int
) -> PreferenceSet:
    """Encode what can be used, and count the rest.  What a tool writes into a reply is read and not trained.

    With kto, pairs are taken apart, as TRL does. The mismatched reply of an example is the nearest before it, in the
    order of the file, that answers another prompt.
    """
    examples, asked, sides = list[Example](), list[Asked](), list[bool]()
    notes = Counter[str]()

    def encode(prompt: tuple[Message, ...], reply: Reply) -> Shortened:
        whole = encode_conversation(Conversation((*prompt, Message("assistant", reply.text))), tokenizer, tools)
        length = len(whole.ids) - (not reply.ends)
        kept = slice(min(length, context_length + 1))
        notes["replies cut at the end of the context"] += length > context_length + 1
        return Shortened(np.array(whole.ids[kept]), np.array(whole.trained[kept]))

    for each in given:
        replies = {True: each.chosen, False: each.rejected}
        judged = {side: reply for side, reply in replies.items() if reply is not None}
        if c.is_paired and len(judged) < 2:
            raise ValueError(
                f"objective.loss {c.loss} compares pairs, and the data holds a completion with a label; give prompt, "
                f"chosen and rejected, or set --objective.loss kto"
            )
        if not all(reply.text for reply in judged.values()):
            notes["left out, as a reply is empty"] += 1
            continue
        encoded = [encode(each.prompt, reply) for reply in judged.values()]
        if not all(map(trained_tokens, encoded)):
            notes["left out, as the prompt fills the context"] += 1
        elif len(encoded) == 2 and np.array_equal(encoded[0].ids, encoded[1].ids):
            notes["left out, as chosen equals rejected"] += 1
        else:
            examples += [tuple(encoded)] if c.is_paired else [(reply,) for reply in encoded]
            asked += [(each.prompt, reply) for reply in judged.values()]
            sides += judged
    said = "; ".join(f"{what}: {number:,}" for what, number in notes.items() if number)
    if not examples:
        raise ValueError(f"the data holds no preference to learn from: {said or 'no two replies differ in reward'}")
    known = PreferenceSet(examples, torch.tensor(sides), torch.zeros(len(sides)), notes=said)
    if c.is_paired:
        return known
    if len({*sides}) < 2:
        raise ValueError(
            f"kto needs labels of both kinds, got {len(sides):,} replies with {str(sides[0]).lower()} alone"
        )
    return replace(known, mismatched=replace(known, examples=[(encode(*each),) for each in mismatched(asked)]))


def mismatched(asked: Sequence[Asked]) -> Iterator[Asked]:
    """Each prompt with the nearest reply before its own, from the end again at the first, that answers another one."""
    for number, (prompt, _) in enumerate(asked):
        others = (asked[place][1] for place in range(number - 1, number - len(asked), -1) if asked[place][0] != prompt)
        if (other := next(others, None)) is None:
            raise ValueError("kto needs replies to at least two prompts, got one")
        yield prompt, other


def trained_tokens(reply: Shortened) -> int:
    """How many tokens of it are predicted and trained."""
    return int(reply.trained[1:].sum())


@dataclass(frozen=True)
class PreferenceBatch:
    """Replies in rows, those of an example beside each other; vectors are in the order of the rows."""

    rows: Batch  # (B, T) each
    numbers: Tensor  # (S,) int64: which replies of the set these are
    tokens: Tensor  # (S,) int64: trained tokens of each
    is_chosen: Tensor  # (S,) bool
    reference: Tensor  # (S,) float32
    count: float  # examples

    def to(self, device: torch.device) -> "PreferenceBatch":
        """The same micro-batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("rows", "tokens", "is_chosen", "reference")}
        return replace(self, **moved)


def make_preference_batches(
    known: PreferenceSet, chosen: Sequence[int], max_places: int, *, is_masked: bool, ranks: int = 1
) -> list[PreferenceBatch]:
    """The chosen examples packed into rows, in micro-batches of at most `max_places` places, or of one example.

    An example is packed whole, so no micro-batch takes a pair apart. Every rank can take as many micro-batches as the
    others; some may be empty then. is_masked: whether attention will need a mask (T, T) for every row.
    """
    lengths = [sum(len(reply.ids) - 1 for reply in known.examples[number]) for number in chosen]
    most = max(max_places, *lengths)
    width = best_width(lengths, most, is_masked=is_masked)
    packed = pack(lengths, width)
    rows = even_rows(-(-len(packed) // ranks), most // width)
    packed += [[] for _ in range(-len(packed) % (rows * ranks))]
    order = [chosen[place] for row in packed for place in row]
    replies = [reply for number in order for reply in known.examples[number]]
    size = len(replies) // len(order)
    numbers = torch.tensor([size * number + place for number in order for place in range(size)])
    tokens = torch.tensor([trained_tokens(reply) for reply in replies])
    ends = [0, *accumulate(size * len(row) for row in packed)]  # of the rows, in replies
    layout = PackedLayout([len(reply.ids) - 1 for reply in replies], [range(*each) for each in pairwise(ends)], width)
    parts = Batch.of(replies, layout).split_micro_batches(rows)
    batches = []
    for part, (begin, end) in zip(parts, pairwise(ends[::rows]), strict=True):
        here = numbers[begin:end]
        vectors = here, tokens[begin:end], known.is_chosen[here], known.reference[here]
        batches.append(PreferenceBatch(part, *vectors, count=(end - begin) / size))
    return batches


def reply_logprobs(model: Transformer, batch: PreferenceBatch, *, recompute: bool = False) -> Tensor:
    """Log-probability of each reply, the sum over its trained tokens: (S,) float32."""
    rows = batch.rows
    targets = rows.targets.flatten()
    places = (targets != IGNORE).nonzero()[:, 0]  # (M,)
    hidden = hidden_at(model, rows.tokens, rows.positions, places, recompute=recompute)
    of_tokens, _ = token_logprobs(model.head, hidden, targets[places], 1.0)
    reply = torch.arange(len(batch.tokens), device=places.device).repeat_interleave(batch.tokens)  # (M,)
    return of_tokens.new_zeros(len(batch.tokens)).index_add(0, reply, of_tokens)


@torch.no_grad()
def frozen_reply_logprobs(model: Transformer, batch: PreferenceBatch) -> Tensor:
    """The same of a model that is not trained by them."""
    with model.evaluating():
        return reply_logprobs(model, batch)


def all_logprobs(model: Transformer, known: PreferenceSet, max_places: int, *, is_masked: bool, world: World) -> Tensor:
    """Log-probability of every reply of a set, (S,) on the CPU, by all ranks together."""
    own = list[tuple[Tensor, Tensor]]()
    for begin in range(0, len(known.examples), TOGETHER):
        chosen = range(begin, min(begin + TOGETHER, len(known.examples)))
        batches = make_preference_batches(known, chosen, max_places, is_masked=is_masked, ranks=world.size)
        for batch in world.shard(batches):
            own.append((batch.numbers, frozen_reply_logprobs(model, batch.to(world.device)).cpu()))
    parts = [part for of_rank in world.all_gather(own) for part in of_rank]
    numbers, logprobs = (torch.cat(each) for each in zip(*parts, strict=True))
    return logprobs[numbers.argsort()]


def rewards_of(logprobs: Tensor, reference: Tensor, tokens: Tensor, c: PreferenceConfig) -> Tensor:
    """What a policy's log-probabilities say of each reply, (S,) each and the result; simpo: reference is 0."""
    ratios = logprobs - reference
    return c.beta * (ratios / tokens if c.loss == "simpo" else ratios)


def preference_losses(
    rewards: Tensor, tokens: Tensor, is_chosen: Tensor, c: PreferenceConfig, kl: float = 0.0
) -> Tensor:
    """Loss of each example: of S replies (S,) each to (E,).

    ipo: the margin is one of means over the tokens, as in TRL, which asked the authors.
    kl: reference point of kto, see reference_point.
    """
    if c.loss == "kto":
        sign = torch.where(is_chosen, 1.0, -1.0).to(rewards)
        weight = torch.where(is_chosen, c.desirable_weight, c.undesirable_weight).to(rewards)
        return weight * torch.sigmoid(sign * (c.beta * kl - rewards))
    if c.loss == "ipo":
        rewards = rewards / (c.beta * tokens)
    margins = rewards[0::2] - rewards[1::2]  # (E,)
    match c.loss:
        case "dpo":
            smoothing = c.label_smoothing
            return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
        case "ipo":
            return (margins - 1 / (2 * c.beta)).square()
        case "simpo":
            return -F.logsigmoid(margins - c.gamma)


def preference_loss(
    model: Transformer, batch: PreferenceBatch, c: PreferenceConfig, kl: float, seen: list[Seen], *, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch to train on, and the same detached; what it shows is added to `seen`."""
    logprobs = reply_logprobs(model, batch, recompute=recompute)
    rewards = rewards_of(logprobs, batch.reference, batch.tokens, c)
    loss = preference_losses(rewards, batch.tokens, batch.is_chosen, c, kl).sum()
    if c.sft_weight:
        loss = loss - c.sft_weight * (logprobs / batch.tokens)[batch.is_chosen].sum()
    seen.append((rewards.detach(), logprobs.detach(), batch.is_chosen))
    return loss, loss.detach()


@torch.no_grad()
def reference_point(state: TrainState, batches: Sequence[PreferenceBatch], world: World) -> float:
    """An estimate of KL(policy, reference) from prompts with replies to others, at least 0: KTO measures rewards by it.

    It is the mean of log policy / reference over the mismatched replies of a step, of all micro-batches and ranks.
    TRL has that of a micro-batch of neighbours in the file, whose replies are passed on by one; here examples are drawn
    at random, so each has a mismatched reply of its own (see encode_preferences).
    """
    total = 0.0
    for batch in batches:
        here = batch.to(world.device)
        total += (state.run(frozen_reply_logprobs, here) - here.reference).sum().item()
    return max(0.0, world.all_reduce_sum(total) / world.all_reduce_sum(sum(batch.count for batch in batches)))


def preference_metrics(seen: Sequence[Seen], c: PreferenceConfig, world: World) -> dict[str, float]:
    """Means over the replies that all ranks saw, by TRL's names."""
    told = [tuple(each.cpu() for each in of_batch) for of_batch in seen]
    everything = [of_batch for of_rank in world.all_gather(told) for of_batch in of_rank]
    rewards, logprobs, is_chosen = (torch.cat(each) for each in zip(*everything, strict=True))
    metrics = {
        f"{name}/{side}": values[where].mean().item()
        for name, values in (("rewards", rewards), ("logps", logprobs))
        for side, where in (("chosen", is_chosen), ("rejected", ~is_chosen))
        if where.any()
    }
    if len(metrics) == 4:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if c.is_paired:
        metrics["rewards/accuracies"] = (rewards[0::2] > rewards[1::2]).float().mean().item()
    return metrics
