"""What leaves under the names of others comes back under ours."""

import torch

from nanollm.export import names
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised


def test_tensors_come_back_under_our_names():
    weights = randomised(Transformer(TINY).init(0)).state_dict()
    back = names.to_ours(names.to_theirs(weights, TINY), TINY)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
