"""What must hold of GRPO, as functions: tests call them, and tests of known bugs see them fail."""

import dataclasses
from itertools import product

import torch

from nanollm.data.batches import Batch
from nanollm.model.transformer import Transformer
from nanollm.rl import grpo, loss, rollout
from nanollm.rl.loss import ObjectiveConfig, group_advantages
from nanollm.rl.reward import Reward
from nanollm.rl.rollout import Group, Rollout, RolloutConfig
from nanollm.sources.gsm8k import Problem
from nanollm.text.tokenizer import END
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World
from tests.model.conftest import TINY, randomised
from tests.ranks.together import together

TEMPERATURE = 0.7
END_ID = 0  # of the tiny vocabularies here
MAX_TOKENS = 2


def tiny_policy(vocab_size: int, seed: int) -> Transformer:
    config = dataclasses.replace(TINY, vocab_size=vocab_size, n_blocks=2, context_length=16)
    return randomised(Transformer(config).init(seed)).double()


def all_replies(vocab_size: int) -> list[list[int]]:
    """Every reply of at most two tokens; it is over at the end mark."""
    others = [token for token in range(vocab_size) if token != END_ID]
    return [[END_ID], *([first, second] for first in others for second in range(vocab_size))]


def logprobs_of(model: Transformer, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Of each token of the reply, plainly: one text, one pass. (len(reply),)"""
    ids = [*prompt, *reply]
    logits = model(torch.tensor([ids[:-1]]))[0, len(prompt) - 1 :]
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, torch.tensor(reply)[:, None])[:, 0]


def reward_of(prompt: list[int], reply: list[int]) -> float:
    """Different for nearly all replies; two equal ones so that whole groups may be equal."""
    return {0: 0.0, 1: 1.0, 2: 0.25, 3: 1.0}[(sum(prompt) + 3 * reply[0] + 2 * len(reply) + reply[-1]) % 4]


def grads_of(model: Transformer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_enumeration(policy, old, reference, engine, prompts, replies, group_size, c: ObjectiveConfig) -> torch.Tensor:
    """The gradient of the expected objective, written from the papers: all outcomes, no packing, no batches."""
    new = {
        (p, r): logprobs_of(policy, prompt, reply)
        for p, prompt in enumerate(prompts)
        for r, reply in enumerate(replies)
    }
    with torch.no_grad():
        was = {(p, r): logprobs_of(old, prompts[p], replies[r]) for p, r in new}
        ref = {(p, r): logprobs_of(reference, prompts[p], replies[r]) for p, r in new}
        drawn = {(p, r): logprobs_of(engine, prompts[p], replies[r]) for p, r in new}
    expected = torch.zeros((), dtype=torch.float64)
    for outcome in product(range(len(replies)), repeat=len(prompts) * group_size):
        groups = [outcome[p * group_size : (p + 1) * group_size] for p in range(len(prompts))]
        probability = torch.stack([drawn[p, r].sum() for p, group in enumerate(groups) for r in group]).sum().exp()
        rewards = [[reward_of(prompts[p], replies[r]) for r in group] for p, group in enumerate(groups)]
        everything = torch.tensor(rewards, dtype=torch.float64)
        terms, lengths = [], []
        for p, group in enumerate(groups):
            own = everything[p]
            for g, r in enumerate(group):
                advantage = own[g] - own.mean()
                if c.advantage == "std":
                    advantage = advantage / (own.std(correction=0) + 1e-6)
                if c.advantage == "batch_std":
                    advantage = advantage / (everything.std(correction=0) + 1e-6)
                difference = new[p, r] - was[p, r]
                ratio = difference.exp() if c.ratio == "token" else difference.mean().exp().expand(len(difference))
                if c.surrogate == "cispo":
                    term = ratio.detach().clamp(max=c.cispo_max) * advantage * new[p, r]
                else:
                    term = torch.minimum(ratio * advantage, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * advantage)
                if c.beta:
                    away = ref[p, r] - new[p, r]
                    weight = difference.exp() if c.kl_estimator == "unbiased" else 1
                    term = term - c.beta * weight * (away.exp() - away - 1)
                if c.importance_cap:
                    term = term * (was[p, r].exp() / drawn[p, r].exp()).clamp(max=c.importance_cap)
                terms.append(term)
                lengths.append(len(term))
        if c.aggregation == "token_mean":
            objective = torch.cat(terms).sum() / sum(lengths)
        elif c.aggregation == "sequence_mean":
            objective = torch.stack([term.mean() for term in terms]).mean()
        else:
            objective = torch.cat(terms).sum() / (len(terms) * MAX_TOKENS)
        expected = expected + probability * -objective
    policy.zero_grad()
    expected.backward()
    return grads_of(policy)


def by_our_batches(
    policy, old, reference, engine, prompts, replies, group_size, c: ObjectiveConfig, rows=2, is_sampled=None
) -> torch.Tensor:
    """The same through what a step does with its rollouts, weighted by how likely each outcome is.

    old: the policy before its first update; None: this is the first. is_sampled: of the places of a reply; None: all.
    """
    policy.zero_grad()
    with torch.no_grad():
        said = {
            (p, r): logprobs_of(engine, prompt, reply)
            for p, prompt in enumerate(prompts)
            for r, reply in enumerate(replies)
        }
    for outcome in product(range(len(replies)), repeat=len(prompts) * group_size):
        drawn = [(p, outcome[p * group_size + g]) for p in range(len(prompts)) for g in range(group_size)]
        probability = torch.stack([said[each][is_sampled or slice(None)].sum() for each in drawn]).sum().exp()
        graded = []
        for p, prompt in enumerate(prompts):
            own = drawn[p * group_size : (p + 1) * group_size]
            rollouts = [
                Rollout(
                    prompt,
                    replies[r],
                    said[p, r].tolist(),
                    "end" if replies[r][-1] == END_ID else "length",
                    is_sampled or [True] * len(replies[r]),
                )
                for _, r in own
            ]
            rewards = [Reward(reward_of(prompt, replies[r]), {}) for _, r in own]
            graded.append(grpo.Graded(Group(Problem("", ""), rollouts), ["" for _ in own], rewards))
        totals = torch.tensor([each.totals for each in graded])
        batches = grpo.make_micro_batches(
            graded,
            group_advantages(totals, c.advantage),
            c,
            MAX_TOKENS,
            rows * policy.config.context_length,
            is_masked=True,
        )
        count = sum(batch.count for batch in batches)
        for batch in batches:
            frozen = batch
            if old is not None:
                was = batch.engine_logprobs if old is engine else grpo.frozen_logprobs(old, batch, TEMPERATURE)
                frozen = dataclasses.replace(batch, old_logprobs=was)
            if c.beta:
                known = grpo.frozen_logprobs(reference, batch, TEMPERATURE)
                frozen = dataclasses.replace(frozen, reference_logprobs=known)
            (grpo.grpo_loss(policy, frozen, c, TEMPERATURE)[0] * (probability / count)).backward()
    return grads_of(policy)


def the_expected_gradient_is_exact(c: ObjectiveConfig, engine: Transformer | None = None) -> None:
    """engine: what samples; None: the policy before its first update."""
    if c.advantage == "batch_std":  # needs several groups: two prompts, two tokens, three replies, 81 outcomes
        vocab_size, prompts = 2, [[1, 1], [1, 0, 1]]
    else:  # three tokens, seven replies, 49 outcomes
        vocab_size, prompts = 3, [[1, 2, 1]]
    policy, old, reference = (tiny_policy(vocab_size, seed) for seed in (0, 0, 5))
    with torch.no_grad():
        for parameter, earlier in zip(policy.parameters(), tiny_policy(vocab_size, 1).parameters(), strict=True):
            parameter += 0.05 * earlier  # so that ratios are not 1, and some are clipped
    replies, engine = all_replies(vocab_size), engine or old
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        got = by_our_batches(policy, old, reference, engine, prompts, replies, 2, c)
        expected = by_enumeration(policy, old, reference, engine, prompts, replies, 2, c)
    finally:
        torch.set_default_dtype(default)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def the_divergence_has_its_own_gradient(c: ObjectiveConfig) -> None:
    """What beta adds, over all replies, is the gradient of beta * KL(policy, reference) itself, token by token.

    The prefixes are those of the old policy, as the samples are.
    """
    prompt, replies = [1, 2, 1], all_replies(3)
    policy, old, reference = (tiny_policy(3, seed) for seed in (0, 0, 5))
    with torch.no_grad():
        for parameter, earlier in zip(policy.parameters(), tiny_policy(3, 1).parameters(), strict=True):
            parameter += 0.05 * earlier
        likely = [logprobs_of(old, prompt, reply).sum().exp() for reply in replies]
    for reply, probability in zip(replies, likely, strict=True):
        said = logprobs_of(old, prompt, reply).tolist()
        width = len(prompt) + len(reply) - 1
        rollout = Rollout(prompt, reply, said, "end", [True] * len(reply))
        batch = grpo.in_rows([[(rollout, 0.0)]], width, 1, c.aggregation, MAX_TOKENS)
        batch = dataclasses.replace(
            batch,
            old_logprobs=grpo.frozen_logprobs(old, batch, TEMPERATURE),
            reference_logprobs=grpo.frozen_logprobs(reference, batch, TEMPERATURE),
        )
        (grpo.grpo_loss(policy, batch, c, TEMPERATURE)[0] * (probability / batch.count)).backward()
    got = grads_of(policy)
    policy.zero_grad()
    divergence = torch.zeros((), dtype=torch.float64)
    for prefix in ([], [1], [2]):
        weight = logprobs_of(old, prompt, prefix).sum().exp().detach() if prefix else 1.0
        new, ref = (
            (m(torch.tensor([prompt + prefix]))[0, -1] / TEMPERATURE).log_softmax(-1) for m in (policy, reference)
        )
        divergence = divergence + weight * (new.exp() * (new - ref.detach())).sum()
    (c.beta * divergence / MAX_TOKENS).backward()
    torch.testing.assert_close(got, grads_of(policy), atol=1e-6, rtol=1e-6)


def truncated_replies_are_left_out(make_learner) -> None:
    """With mask_truncated the gradient is that of the finished replies, divided by what they are alone."""
    learner = make_learner(rollout=RolloutConfig(prompts=12, group_size=6, max_tokens=14))
    graded, _ = learner.sample(0)
    assert {"end", "length"} <= {each.stop for group in graded for each in group.group.rollouts}
    advantages = group_advantages(torch.tensor([each.totals for each in graded]), "mean_only")
    c = ObjectiveConfig(mask_truncated=True)
    (batch,) = grpo.make_micro_batches(graded, advantages, c, 14, 2**16, is_masked=True)
    finished = [
        (rollout, each.has_signal) for each in graded for rollout in each.group.rollouts if rollout.stop == "end"
    ]
    assert batch.count == sum(len(rollout.reply_ids) for rollout, _ in finished)
    assert len(batch.targets) == sum(len(rollout.reply_ids) for rollout, is_trained in finished if is_trained)


def engine_and_trainer_agree(make_learner) -> None:
    learner = make_learner(rollout=RolloutConfig(prompts=4, group_size=3, max_tokens=12, temperature=TEMPERATURE))
    numbers = learner.step(0).numbers
    assert numbers["sampling/sampling_logp_difference/max"] < 1e-5


def replies_are_drawn_from_the_trained_distribution(make_learner) -> None:
    """First tokens of many replies to one problem against the probabilities that training would give them."""
    n = 1000
    c = RolloutConfig(prompts=1, group_size=n, max_tokens=1, temperature=TEMPERATURE)
    learner = make_learner(rollout=c)
    model, problem = learner.state.model, learner.collector.problems[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.8  # flatter: many tokens have a chance
    (group,) = rollout.roll_out(model, learner.tokenizer, [problem], c, seed=11)
    prompt = rollout.prompt_of(problem, learner.tokenizer)
    with torch.no_grad():
        hidden = model.trunk(torch.tensor([prompt]))[0, -1:]
        vocab = model.config.vocab_size
        logprobs, _ = loss.token_logprobs(model.head, hidden.expand(vocab, -1), torch.arange(vocab), TEMPERATURE)
    probabilities = logprobs.exp()
    drawn = torch.tensor([each.reply_ids[0] for each in group.rollouts]).bincount(minlength=vocab) / n
    order = probabilities.argsort(descending=True)
    distance = (drawn[order].cumsum(0) - probabilities[order].cumsum(0)).abs().max()
    assert distance < 1.63 / n**0.5  # Kolmogorov-Smirnov, one in a hundred


def the_end_mark_is_trained(make_learner) -> None:
    learner = make_learner(rollout=RolloutConfig(prompts=12, group_size=6, max_tokens=40))
    graded, _ = learner.sample(0)
    finished = [r for each in graded for r in each.group.rollouts if r.stop == "end"]
    assert finished
    ends = {learner.tokenizer.mark_id(END), learner.tokenizer.eos_id}
    assert all(r.reply_ids[-1] in ends and len(r.reply_ids) == len(r.logprobs) for r in finished)


def gradient_of_a_step(learner, rows: int) -> torch.Tensor:
    """The gradient of the first update, whatever the number of rows per micro-batch."""
    graded, _ = learner.sample(0)
    compared = group_advantages(torch.tensor([each.totals for each in graded]), learner.objective.advantage)
    places = rows * learner.state.model.config.context_length
    batches = grpo.make_micro_batches(
        graded, compared, learner.objective, learner.collector.c.max_tokens, places, is_masked=True
    )
    assert rows > 1 or len(batches) > 2
    count = sum(batch.count for batch in batches)
    learner.state.model.zero_grad()
    for batch in batches:
        (grpo.grpo_loss(learner.state.model, batch, learner.objective, 1.0)[0] / count).backward()
    return grads_of(learner.state.model)


def micro_batches_change_nothing(make_learner, aggregation: str) -> None:
    learner = make_learner(objective=ObjectiveConfig(aggregation=aggregation))
    torch.testing.assert_close(gradient_of_a_step(learner, 1), gradient_of_a_step(learner, 16), atol=1e-6, rtol=1e-5)


def a_prompt_is_read_once_for_several_replies(make_learner) -> None:
    """The gradient is that of replies that each stand behind a prompt of their own, from fewer places."""
    learner = make_learner()
    graded, _ = learner.sample(0)
    compared = group_advantages(torch.tensor([each.totals for each in graded]), "mean_only")
    groups = [
        list(zip(each.group.rollouts, row, strict=True)) for each, row in zip(graded, compared.tolist(), strict=True)
    ]
    apart = [[each] for group in groups for each in group]
    gradients, model = [], learner.state.model.double()
    for texts in (groups, apart):
        batch = grpo.in_rows(texts, max(grpo.places_of(groups)), 1, "token_mean", 100.0)
        model.zero_grad()
        grpo.grpo_loss(model, batch, learner.objective, 1.0)[0].backward()
        gradients.append(grads_of(model))
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-6)
    assert sum(grpo.places_of(groups)) < sum(grpo.places_of(apart))
    assert len(grpo.share_prompts(groups, 4096, is_masked=False)[1]) < len(apart)


def advantages_compare_within_a_group() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0], [5.0, 5.0, 8.0]])
    for kind in ("mean_only", "std", "batch_std"):
        compared = group_advantages(rewards, kind)
        torch.testing.assert_close(compared.sum(1), torch.zeros(2), atol=1e-5, rtol=0)
        assert compared[0, 1] > 0 > compared[1, 0]


def two_ranks_are_one(add_up: bool = True) -> None:
    """Two processes with half of the rows each take the step that one process takes with all of them."""
    batches = [noise(step, rows) for step, rows in enumerate((3, 1))]  # of different size: a mean of means would differ
    alone = one_step(World(), batches)
    for got in together(2, _of_rank, batches, add_up, dtype="float32"):
        torch.testing.assert_close(got, alone, atol=1e-6, rtol=1e-5)


def noise(seed: int, rows: int) -> Batch:
    tokens = torch.randint(TINY.vocab_size, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def one_step(world: World, batches: list[Batch]) -> torch.Tensor:
    """All weights and router biases after one step."""
    optim = OptimConfig(name="adamw", lr=1e-2, warmup_steps=0, balance_rate=0.1)
    state = TrainState.start(Transformer(TINY).init(0), optim, world)
    stats = train_step(state, batches, next_token_loss, 1e-2, optim, world)
    weights = torch.cat([tensor.flatten() for tensor in state.bundle_weights().values()])
    return torch.cat((weights, torch.tensor([stats.loss, stats.grad_norm, float(stats.tokens)])))


def _of_rank(world: World, batches: list[Batch], add_up: bool) -> torch.Tensor:
    return one_step(world if add_up else World(), list(world.shard(batches)))


def what_a_tool_gives_is_read_and_not_trained():
    """Every reply is a token, another that depends on it and that nobody drew, and a third: the expected gradient is
    that of the expected reward over the drawn ones, as (G - 1) / G of it divided by the most tokens."""
    prompt, policy, drawn = [1, 2, 1], tiny_policy(3, 0), [True, False, True]
    replies = [[first, (first + 1) % 3, third] for first in range(3) for third in range(3)]
    c = ObjectiveConfig(advantage="mean_only", aggregation="constant")
    got = by_our_batches(policy, policy, policy, policy, [prompt], replies, 2, c, is_sampled=drawn)
    policy.zero_grad()
    probabilities = [logprobs_of(policy, prompt, reply)[drawn].sum().exp() for reply in replies]
    assert abs(sum(probabilities).item() - 1) < 1e-9
    expected = sum(p * reward_of(prompt, reply) for p, reply in zip(probabilities, replies, strict=True))
    (-expected / 2 / MAX_TOKENS).backward()
    torch.testing.assert_close(got, grads_of(policy), atol=1e-6, rtol=1e-6)
