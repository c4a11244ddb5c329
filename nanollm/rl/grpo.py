"""One step of group-relative policy optimization in pieces: problems, rollouts, rewards, micro-batches, updates.

Source: DeepSeekMath, arXiv:2402.03300, algorithm 1; stages/grpo.py has the step as a whole. A step depends on the
weights, the seed and its number alone, so a resumed run takes the same steps, and so does one on another number of
ranks: they share the asking and grading, tell each other all of it, and then share the training.
Letters: P prompts, G rollouts per prompt, B rows, T tokens, M trained tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice, pairwise

import torch
from torch import Tensor

from nanollm.data.order import epoch_seed, sample_indices
from nanollm.data.packing import PackedLayout, best_width, even_rows, pack, rows_cost
from nanollm.generate.request import MakeTool
from nanollm.generate.turns import said
from nanollm.model.lora import without_lora
from nanollm.model.transformer import Transformer
from nanollm.progress import say
from nanollm.rl.loss import (
    LossMetrics,
    ObjectiveConfig,
    RolloutBatch,
    count_of,
    grpo_loss,
    policy_logprobs,
    token_weights,
)
from nanollm.rl.reward import RewardInput, Rewards
from nanollm.rl.rollout import Graded, Group, Rollout, RolloutConfig, prompt_of, roll_out
from nanollm.rl.vllm import VllmServer
from nanollm.sources.environments import MakeEnvironment
from nanollm.sources.gsm8k import Problem
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import StepStats, train_step
from nanollm.world import World

MAX_ZERO_VARIANCE_STEPS, MAX_ZERO_VARIANCE_GROUPS = 10, 200
"""Steps in a row, and groups in them, without one to learn from, after which a run ends with advice."""
REPLACEMENTS = 4  # how often as many problems as a step needs are drawn to replace those that do not fit

Sampler = Callable[[Sequence[Problem], int], list[Group]]
"""Problems and the seed of the first reply to a group of rollouts for each; reply i draws from seed + i."""


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Draws the problems of a step, has them answered, and grades the replies."""

    problems: Sequence[Problem]
    tokenizer: Tokenizer
    rewards: Rewards
    c: RolloutConfig
    context_length: int
    seed: int
    world: World

    def collect(self, step: int, sample: Sampler) -> tuple[list[Graded], dict[str, float]]:
        """The graded groups of a step, and how many problems were too long or replaced.

        Groups without a signal are replaced as often as `resample` allows (dynamic sampling, DAPO, arXiv:2503.14476).
        """
        counts: Counter[str] = Counter(prompts_too_long=0, groups_replaced=0)
        problems, graded = self.draw(step, counts), list[Graded]()
        for attempt in range(self.c.resample + 1):
            kept = [each for each in graded if each.has_signal]
            new = list(islice(problems, self.c.prompts - len(kept)))
            if not new:
                break
            counts["groups_replaced"] += len(graded) - len(kept)
            graded = kept + self._ask(sample, new, reply_seed(self.seed, step, attempt))
        if not graded:
            raise ValueError(
                f"none of the problems of step {step + 1} leaves room for a reply of {self.c.max_tokens} tokens in the "
                f"context of {self.context_length}; take a smaller --rollout.max_tokens or shorter problems"
            )
        return graded, dict(counts)

    def draw(self, step: int, counts: Counter[str]) -> Iterator[Problem]:
        """The problems of a step, in a fresh random order each epoch, and behind them others that may replace some.

        None comes twice, and none that does not fit; those are counted.
        """
        seen = set[int]()
        for attempt in range(self.c.resample + REPLACEMENTS):
            seed = epoch_seed(self.seed, -attempt) if attempt else self.seed
            for number in sample_indices(step, self.c.prompts, len(self.problems), seed).tolist():
                if number in seen:
                    continue
                seen.add(number)
                if len(prompt_of(self.problems[number], self.tokenizer)) <= self.context_length - self.c.max_tokens:
                    yield self.problems[number]
                else:
                    counts["prompts_too_long"] += 1

    def _ask(self, sample: Sampler, problems: Sequence[Problem], seed: int) -> list[Graded]:
        """Graded groups, in the order of the problems. Each rank asks a stretch of them; all get all."""
        begin, end = (len(problems) * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
        # Every reply has the seed of its place among all, whichever rank samples it.
        own = self._grade(sample(problems[begin:end], seed + begin * self.c.group_size))
        return [each for of_rank in self.world.all_gather(own) for each in of_rank]

    def _grade(self, groups: Sequence[Group]) -> list[Graded]:
        def judged(each: Rollout) -> RewardInput:
            text = said(each.reply_ids, each.outcome, self.tokenizer)
            return RewardInput(text, len(each.reply_ids), each.stop == "end", each.outcome, each.reply_ids)

        replies = [(group.problem, judged(each)) for group in groups for each in group.rollouts]
        rewards, size = self.rewards(replies), self.c.group_size
        return [
            Graded(group, [reply.text for _, reply in replies[first : first + size]], rewards[first : first + size])
            for first, group in zip(range(0, len(replies), size), groups, strict=True)
        ]

    def take_faults(self) -> Counter[str]:
        """What went wrong with rewards on any rank since this was last asked, and how often."""
        faults = sum(self.world.all_gather(self.rewards.faults), Counter[str]())
        self.rewards.faults = Counter()
        return faults


def open_sampler(
    state: TrainState,
    tokenizer: Tokenizer,
    c: RolloutConfig,
    server: VllmServer | None,
    world: World,
    tool: MakeTool | None = None,
    environment: MakeEnvironment | None = None,
) -> Sampler:
    """What answers problems with the weights as they stand: our own engine, or the vLLM server."""
    if server is None:
        model = state.whole_model()
        return lambda problems, seed: roll_out(model, tokenizer, problems, c, seed, tool, environment)
    weights = state.bundle_weights(keep=world.is_main)
    if world.is_main:
        server.push(weights)
    world.barrier()  # nobody asks before the new weights are there
    return lambda problems, seed: server.roll_out(problems, c, seed)


class SignalWatch:
    """Ends a run whose replies to each problem all earn the same, step after step."""

    def __init__(self) -> None:
        self.steps = self.groups = 0  # in a row

    def see(self, step: int, graded: Sequence[Graded], faults: Counter[str]) -> None:
        """Say what went wrong with rewards. ValueError with advice where there is nothing to learn from."""
        if faults:
            fault, times = faults.most_common(1)[0]
            say(f"step {step + 1}: {faults.total()} parts of rewards are missing, {times} because {fault}")
        is_solved = all(reward.parts.get("correct") == 1 for each in graded for reward in each.rewards)
        if is_solved or any(each.has_signal for each in graded):
            self.steps = self.groups = 0
            return
        self.steps, self.groups = self.steps + 1, self.groups + len(graded)
        if self.steps >= MAX_ZERO_VARIANCE_STEPS and self.groups >= MAX_ZERO_VARIANCE_GROUPS:
            cause = f" ({faults.most_common(1)[0][0]})" if faults else ""
            raise ValueError(
                f"for {self.steps} steps all replies to each problem earned the same{cause}, so there is nothing to "
                f"learn from: train longer with nanollm sft first, or take easier problems or a larger "
                f"--rollout.group_size"
            )


def update_policy(
    state: TrainState,
    mini_batches: Sequence[Sequence[RolloutBatch]],
    c: ObjectiveConfig,
    temperature: float,
    lr: float,
    optim: OptimConfig,
    world: World,
    reference: Transformer | None = None,
    *,
    recompute: bool = False,
) -> tuple[StepStats | None, list[LossMetrics]]:
    """Pass over a step's rollouts `updates` times, with an optimizer update for each mini-batch; none: no update.

    mini_batches: the micro-batches of each, of all ranks; those without any are passed over. Returns the stats of the
    last update, and what every micro-batch of all ranks and updates showed.
    """
    device, seen, stats = world.device, list[LossMetrics](), None
    mini_batches = [batches for batches in mini_batches if batches]

    def prepared(batch: RolloutBatch) -> RolloutBatch:
        """With the log-probabilities of the models that stay as they are during the step."""
        here = batch.to(device)
        if reference is not None:
            batch = replace(batch, reference_logprobs=frozen_logprobs(reference, here, temperature))
        elif c.beta:
            batch = replace(batch, reference_logprobs=state.run(base_logprobs, here, temperature))
        if c.updates * len(mini_batches) > 1:
            batch = replace(batch, old_logprobs=state.run(frozen_logprobs, here, temperature))
        return batch

    own = [[prepared(batch) for batch in world.shard(batches)] for batches in mini_batches]

    def loss_of(model: Transformer, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        loss, report, shown = grpo_loss(model, batch, c, temperature, recompute=recompute)
        seen.append(shown)
        return loss, report

    for batches in own * c.updates:
        stats = train_step(state, batches, loss_of, lr, optim, world)
        if stats.skipped:
            break
    return stats, [each for of_rank in world.all_gather([each.cpu() for each in seen]) for each in of_rank]


def split_groups(
    graded: Sequence[Graded], advantages: Tensor, mini_batches: int
) -> Iterator[tuple[Sequence[Graded], Tensor]]:
    """A step's groups and their advantages (P, G) in mini-batches of whole groups, equally many in each."""
    bounds = [len(graded) * number // mini_batches for number in range(mini_batches + 1)]
    return ((graded[begin:end], advantages[begin:end]) for begin, end in pairwise(bounds))


def make_micro_batches(
    graded: Sequence[Graded],
    advantages: Tensor,
    c: ObjectiveConfig,
    max_tokens: int,
    max_places: int,
    *,
    is_masked: bool,
    ranks: int = 1,
) -> list[RolloutBatch]:
    """The groups that have an advantage, packed into rows, in micro-batches of at most `max_places` places.

    Every rank can take as many of them as the others; some may be empty then.

    advantages (P, G). A group whose advantages are all zero: unless it is kept near a reference, leaving it out saves
    work and, as it counts in the denominator, changes nothing.
    is_masked: whether attention will need a mask (T, T) for every row.
    """
    counted = [
        [
            (rollout, advantage)
            for rollout, advantage in zip(each.group.rollouts, row, strict=True)
            if not (c.mask_truncated and rollout.stop == "length")
        ]
        for each, row in zip(graded, advantages.tolist(), strict=True)
    ]
    is_trained = [any(row) or c.beta > 0 for row in advantages.tolist()]
    kept = [group for group, is_kept in zip(counted, is_trained, strict=True) if group and is_kept]
    if not kept:
        return []
    lengths = [sum(rollout.is_sampled) for group in counted for rollout, _ in group]
    count = count_of(len(lengths), sum(lengths), c.aggregation, max_tokens)
    width, texts = share_prompts(kept, max_places, is_masked=is_masked)
    rows = even_rows(-(-len(pack(places_of(texts), width)) // ranks), max_places // width)
    return in_rows(texts, width, rows * ranks, c.aggregation, count).split_micro_batches(rows)


Weighed = tuple[Rollout, float]  # a rollout with its advantage


def share_prompts(
    groups: Sequence[Sequence[Weighed]], max_places: int, *, is_masked: bool
) -> tuple[int, list[Sequence[Weighed]]]:
    """The width of rows, and the groups cut into texts: a prompt, read once, and the replies that stand behind it.

    More replies behind a prompt leave fewer prompts to read, and need wider rows, whose attention costs more: the
    cheapest is taken.
    """
    options = dict[float, tuple[int, list[Sequence[Weighed]]]]()
    most = max(map(len, groups))
    for replies in (*(2**power for power in range(most.bit_length()) if 2**power < most), most):
        texts = [group[first : first + replies] for group in groups for first in range(0, len(group), replies)]
        places = places_of(texts)
        if replies > 1 and max(places) > max_places:
            break
        width = best_width(places, max_places, is_masked=is_masked)
        options.setdefault(rows_cost(places, width, is_masked=is_masked), (width, texts))
    return options[min(options)]


def places_of(texts: Sequence[Sequence[Weighed]]) -> list[int]:
    """Places that each prompt takes with its replies, whose last tokens are only predicted."""
    return [len(text[0][0].prompt_ids) + sum(len(rollout.reply_ids) - 1 for rollout, _ in text) for text in texts]


def in_rows(texts: Sequence[Sequence[Weighed]], width: int, rows: int, aggregation: str, count: float) -> RolloutBatch:
    """Prompts with their replies, packed into a multiple of `rows` rows of `width` places."""
    layout = PackedLayout.of(places_of(texts), width, rows)
    ids, positions = list[Tensor](), list[Tensor]()
    for text in texts:
        prompt = text[0][0].prompt_ids
        ids.append(torch.tensor(prompt + [token for rollout, _ in text for token in rollout.reply_ids[:-1]]))
        behind = [torch.arange(len(rollout.reply_ids) - 1) + len(prompt) for rollout, _ in text]
        positions.append(torch.cat((torch.arange(len(prompt)), *behind)))
    ordered, token_indices = list[Weighed](), list[int]()  # as they stand in the rows
    for index in layout.starts.argsort().tolist():
        place = int(layout.starts[index]) + len(texts[index][0][0].prompt_ids)
        prompt_end = place - 1  # predicts the first token of every reply
        for rollout, advantage in texts[index]:
            token_indices += [prompt_end, *range(place, place + len(rollout.reply_ids) - 1)]
            place += len(rollout.reply_ids) - 1
            ordered.append((rollout, advantage))
    rollouts, advantages = [rollout for rollout, _ in ordered], torch.tensor([advantage for _, advantage in ordered])
    lengths = torch.tensor([len(rollout.reply_ids) for rollout in rollouts])  # (R,)
    is_sampled = torch.tensor([each for rollout in rollouts for each in rollout.is_sampled])  # (M,) with tools' tokens
    reply = torch.arange(len(rollouts)).repeat_interleave(lengths)[is_sampled]  # (M,)
    weights = token_weights(torch.tensor([sum(rollout.is_sampled) for rollout in rollouts]), aggregation)  # (R,)
    return RolloutBatch(
        tokens=layout.place(ids),
        positions=layout.place(positions),
        token_indices=torch.tensor(token_indices)[is_sampled],
        targets=torch.tensor([token for rollout in rollouts for token in rollout.reply_ids])[is_sampled],
        reply=reply,
        advantages=advantages[reply],
        weights=weights[reply],
        engine_logprobs=torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs])[is_sampled],
        old_logprobs=None,
        reference_logprobs=None,
        count=count,
    )


@torch.no_grad()
def frozen_logprobs(model: Transformer, batch: RolloutBatch, temperature: float) -> Tensor:
    """Log-probabilities (M,) of a model that is not trained by them."""
    with model.evaluating():
        return policy_logprobs(model, batch, temperature)[0]


def base_logprobs(model: Transformer, batch: RolloutBatch, temperature: float) -> Tensor:
    """Those of the model under an adapter: where nothing else is, the reference."""
    with without_lora(model):
        return frozen_logprobs(model, batch, temperature)


def reply_seed(seed: int, step: int, attempt: int) -> int:
    """Where the seeds of a step's replies begin: far from those of every other step."""
    text = f"replies of attempt {attempt} at step {step} of {seed}"
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
