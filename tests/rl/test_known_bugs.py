"""Mistakes that others made in GRPO and training on replies, put back one at a time: a promise breaks for each.

Most were found in public projects (sources beside them). A test that passed with the mistake would be worth nothing.
Without a mistake the promises are tested here or, where that takes long, in test_exact.py.
"""

import dataclasses

import pytest
import torch

from nanollm.generate.sampling import SamplingConfig
from nanollm.model import transformer
from nanollm.rl import grpo, loss, rollout
from nanollm.rl.loss import ObjectiveConfig
from nanollm.sources import gsm8k
from tests.rl import promises


def broken(*exceptions):
    return pytest.raises((AssertionError, *exceptions))


def test_sampling_at_a_temperature_and_training_at_one(make_learner, monkeypatch):
    """huggingface/trl #4159."""
    promises.engine_and_trainer_agree(make_learner)
    right = grpo.grpo_loss
    monkeypatch.setattr(grpo, "grpo_loss", lambda model, batch, c, temperature, **options: right(model, batch, c, 1.0))
    with broken():
        promises.engine_and_trainer_agree(make_learner)


def test_sampling_from_the_most_likely_and_training_on_all(make_learner, monkeypatch):
    """nanochat samples with top_k = 50; huggingface/trl #6789."""
    promises.replies_are_drawn_from_the_trained_distribution(make_learner)
    monkeypatch.setattr(rollout, "SamplingConfig", lambda temperature: SamplingConfig(temperature=temperature, top_k=5))
    with broken():
        promises.replies_are_drawn_from_the_trained_distribution(make_learner)


def test_the_end_mark_left_out_of_the_reply(make_learner, monkeypatch):
    """nanochat's generate_batch drops it; huggingface/trl #1623, #2059."""
    promises.the_end_mark_is_trained(make_learner)
    right = grpo.roll_out

    def without_end(*arguments):
        groups = right(*arguments)
        for each in (each for group in groups for each in group.rollouts if each.stop == "end"):
            each.reply_ids.pop()
        return groups

    monkeypatch.setattr(grpo, "roll_out", without_end)
    with broken():
        promises.the_end_mark_is_trained(make_learner)


def test_a_solution_without_an_answer_scoring_one(monkeypatch):
    """huggingface/open-r1 #293: what could not be parsed was rewarded."""

    def promise():
        with pytest.raises(ValueError, match="a solution must end in"):
            gsm8k.grade("#### 3", "nobody knows")

    promise()
    monkeypatch.setattr(gsm8k, "number_of", lambda text: None)
    monkeypatch.setattr(gsm8k, "grade", lambda reply, answer: gsm8k.number_of(reply) == gsm8k.number_of(answer))
    with pytest.raises(pytest.fail.Exception):
        promise()


def change_batches(monkeypatch, change):
    right = grpo.make_micro_batches
    monkeypatch.setattr(
        grpo, "make_micro_batches", lambda *given, **options: list(map(change, right(*given, **options)))
    )


def with_padding(batch):
    """Every empty place predicts token 0, like padding that nobody masked."""
    empty = torch.ones(batch.tokens.numel(), dtype=torch.bool)
    empty[batch.token_indices] = False
    places = empty.nonzero()[:, 0]
    known = {
        "token_indices": places,
        "targets": torch.zeros_like(places),
        "reply": torch.zeros_like(places),
        "advantages": batch.advantages[0].expand(len(places)),
        "weights": batch.weights[0].expand(len(places)),
        "engine_logprobs": torch.full((len(places),), -1.0),
    }
    return dataclasses.replace(batch, **{name: torch.cat((getattr(batch, name), more)) for name, more in known.items()})


def test_padding_in_the_loss(monkeypatch):
    """The original of this project; minimind trains on padding where <eos> is the padding."""
    c = ObjectiveConfig()
    change_batches(monkeypatch, with_padding)
    with broken():
        promises.the_expected_gradient_is_exact(c)


def test_labels_unshifted(monkeypatch):
    """The original of this project: logits at a token compared with that token."""
    c = ObjectiveConfig()
    change_batches(monkeypatch, lambda batch: dataclasses.replace(batch, token_indices=batch.token_indices + 1))
    with broken():
        promises.the_expected_gradient_is_exact(c)


def test_each_micro_batch_divided_by_its_own_tokens(make_learner, monkeypatch):
    """nanochat's token mean over the micro-batch; huggingface/transformers' gradient accumulation (2024)."""
    promises.micro_batches_change_nothing(make_learner, "token_mean")
    change_batches(monkeypatch, lambda b: dataclasses.replace(b, weights=b.weights / len(b.weights), count=1.0))
    with broken():
        promises.micro_batches_change_nothing(make_learner, "token_mean")


def test_the_mean_of_each_reply_where_the_mean_of_tokens_was_asked(monkeypatch):
    """Length bias: huggingface/trl #3138, #3256; arXiv:2503.20783."""
    c = ObjectiveConfig(aggregation="token_mean")
    monkeypatch.setattr(grpo, "token_weights", lambda lengths, aggregation: 1 / lengths.float())
    with broken():
        promises.the_expected_gradient_is_exact(c)


def test_advantages_of_the_wrong_group(monkeypatch):
    """Samples of a prompt interleaved instead of beside each other."""
    promises.advantages_compare_within_a_group()
    right = promises.group_advantages
    monkeypatch.setattr(
        promises, "group_advantages", lambda r, kind: right(r.reshape(r.shape[::-1]), kind).reshape(r.shape)
    )
    with broken():
        promises.advantages_compare_within_a_group()


def test_log_probabilities_without_a_gradient(monkeypatch):
    """minimind #750: the loss moves and nothing is learned."""
    c = ObjectiveConfig()
    right = loss.token_logprobs
    monkeypatch.setattr(loss, "token_logprobs", lambda *arguments: tuple(each.detach() for each in right(*arguments)))
    with broken(RuntimeError):
        promises.the_expected_gradient_is_exact(c)


def test_a_divergence_whose_gradient_is_that_of_the_other_direction():
    """k3 alone, as in huggingface/trl and verl until DeepSeek-V3.2."""
    with broken():
        promises.the_divergence_has_its_own_gradient(ObjectiveConfig(beta=0.3, kl_estimator="k3"))


def test_truncated_replies_left_in_the_denominator(make_learner, monkeypatch):
    """Masked, and counted all the same: the others weigh less the more replies are cut off."""
    right = grpo.count_of
    monkeypatch.setattr(grpo, "count_of", lambda replies, tokens, *others: right(replies, tokens + 14, *others))
    with broken():
        promises.truncated_replies_are_left_out(make_learner)


def test_a_tools_words_trained_as_if_the_model_had_chosen_them(monkeypatch):
    """THUDM/slime #1418 mends such a mask."""
    promises.what_a_tool_gives_is_read_and_not_trained()
    right = grpo.make_micro_batches

    def all_sampled(graded, *others, **options):
        for each in (each for group in graded for each in group.group.rollouts):
            each.is_sampled[:] = [True] * len(each.is_sampled)
        return right(graded, *others, **options)

    monkeypatch.setattr(grpo, "make_micro_batches", all_sampled)
    with broken():
        promises.what_a_tool_gives_is_read_and_not_trained()


def test_replies_tokenised_again_from_their_text(make_learner, monkeypatch):
    """The text of an untrained model's reply has other ids than those it drew."""
    right = grpo.roll_out

    def again(model, tokenizer, *others):
        groups = right(model, tokenizer, *others)
        for each in (each for group in groups for each in group.rollouts):
            ids = tokenizer.encode(tokenizer.decode_drawn(each.reply_ids))[: len(each.reply_ids)]
            each.reply_ids[: len(ids)] = ids
        return groups

    monkeypatch.setattr(grpo, "roll_out", again)
    with broken():
        promises.engine_and_trainer_agree(make_learner)


def test_packed_conversations_that_see_each_other(monkeypatch):
    """Prompt and reply of a neighbour in the same row leak into the loss."""
    c = ObjectiveConfig()
    change_batches(
        monkeypatch,
        lambda b: dataclasses.replace(b, positions=torch.arange(b.positions.shape[1]).expand_as(b.positions)),
    )
    with broken():
        promises.the_expected_gradient_is_exact(c)


@pytest.mark.long
@pytest.mark.parametrize("with_the_bug", [False, True])
def test_gradients_not_added_up_over_ranks(with_the_bug):
    """minimind #853: RL gradients were never all-reduced."""
    if with_the_bug:
        with broken():
            promises.two_ranks_are_one(add_up=False)
    else:
        promises.two_ranks_are_one()


def test_replies_behind_one_prompt_that_see_each_other(make_learner, monkeypatch):
    """A mask of whole texts, as packing without forks needs it."""
    promises.a_prompt_is_read_once_for_several_replies(make_learner)

    def whole_texts(positions):
        text = (positions == 0).cumsum(1)
        return (text[:, :, None] == text[:, None, :]).tril()

    monkeypatch.setattr(transformer, "packed_mask", whole_texts)
    with broken():
        promises.a_prompt_is_read_once_for_several_replies(make_learner)
