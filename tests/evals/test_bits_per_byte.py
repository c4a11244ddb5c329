"""Bits per byte are the text's negative log2-probability over its bytes, whatever the tokens."""

import math

import numpy as np
import pytest
import torch

from nanollm.data.batches import IGNORE, Batch
from nanollm.evals.bits_per_byte import bits_per_byte
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY

SIZES = np.array([0] * 4 + [1 + i % 3 for i in range(TINY.vocab_size - 4)], dtype=np.int32)


def test_it_equals_the_sum_by_hand():
    model = Transformer(TINY).init(0)
    tokens = torch.tensor([[1, 10, 20, 30], [40, 50, 2, 60]])
    targets = torch.tensor([[10, 20, 30, 2], [50, 2, 60, IGNORE]])  # 2 is a mark: it has no bytes
    score = bits_per_byte(model, [Batch(tokens[:1], targets[:1]), Batch(tokens[1:], targets[1:])], SIZES)
    log_probabilities = model(tokens).log_softmax(-1)
    pairs = [(0, 0, 10), (0, 1, 20), (0, 2, 30), (1, 0, 50), (1, 2, 60)]
    nats = -sum(log_probabilities[row, at, token].item() for row, at, token in pairs)
    n_bytes = sum(SIZES[token] for _, _, token in pairs)
    assert (score.tokens, score.bytes) == (5, n_bytes)
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.value == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert model.training


def test_texts_that_share_a_row_are_measured_as_if_each_were_alone():
    model = Transformer(TINY).init(0)
    together = torch.tensor([[1, 10, 20, 1, 30, 40, 50]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    targets = torch.tensor([[10, 20, IGNORE, 30, 40, 50, 60]])
    alone = [Batch(together[:, :3], targets[:, :3]), Batch(together[:, 3:], targets[:, 3:])]
    packed = bits_per_byte(model, [Batch(together, targets, positions)], SIZES)
    apart = bits_per_byte(model, alone, SIZES)
    assert (packed.bytes, packed.tokens) == (apart.bytes, apart.tokens)
    assert packed.nats == pytest.approx(apart.nats, rel=1e-5)


def test_text_without_bytes_is_refused():
    with pytest.raises(ValueError, match="no text to measure"):
        bits_per_byte(Transformer(TINY).init(0), [Batch(torch.tensor([[1]]), torch.tensor([[2]]))], SIZES)
