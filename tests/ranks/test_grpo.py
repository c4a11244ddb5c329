"""Several processes learn from their replies as one does: the same replies, the same gradient."""

import dataclasses

import pytest
import torch

from nanollm.rl.loss import ObjectiveConfig
from nanollm.rl.rollout import RolloutConfig
from nanollm.world import World
from tests.ranks.test_training import MESHES, with_mesh
from tests.ranks.together import together
from tests.rl.conftest import learner_of

pytestmark = pytest.mark.long

OBJECTIVES = {
    "plain": ObjectiveConfig(),
    "twice": ObjectiveConfig(updates=2, aggregation="sequence_mean", advantage="batch_std"),
}
ROLLOUT = RolloutConfig(prompts=3, group_size=3, max_tokens=12, resample=1)  # not as many on every rank


def learn(world, tokenizer, folder):
    """Of each objective: numbers of two steps and the weights after them, in float64."""
    world, found = dataclasses.replace(world, dtype=torch.float64), {}
    for name, objective in OBJECTIVES.items():
        learner = learner_of(tokenizer, folder / name, world, rows=1, rollout=ROLLOUT, objective=objective)
        stats = [learner.step(step) for step in range(2)]
        values = [{k: torch.tensor(v, dtype=torch.float64) for k, v in each.values.items()} for each in stats]
        found[name] = values, learner.state.bundle_weights()
    return found


def learn_in_all_ways(world, tokenizer, folder):
    return {parallel: learn(with_mesh(world, parallel), tokenizer, folder / parallel) for parallel in MESHES}


@pytest.fixture(scope="module")
def both(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    alone = learn(World(), tokenizer, folder / "alone")
    return folder, alone, together(2, learn_in_all_ways, tokenizer, folder, dtype="float32")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("parallel", MESHES)
def test_grpo_on_two_ranks_is_grpo_on_one(both, parallel, objective):
    _, alone, ranks = both
    values, weights = alone[objective]
    assert all(each["grad_norm"] > 0 for each in values)
    for of_rank in ranks:
        got_values, got_weights = of_rank[parallel][objective]
        for got, expected in zip(got_values, values, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        for name, expected in weights.items():
            torch.testing.assert_close(got_weights[name], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("parallel", MESHES)
def test_the_replies_are_those_of_one_process_and_are_written_once(both, parallel):
    folder, _, _ = both
    for step in ("step-00000001.jsonl", "step-00000002.jsonl"):
        expected = (folder / "alone" / "plain" / step).read_bytes()
        assert (folder / parallel / "plain" / step).read_bytes() == expected
