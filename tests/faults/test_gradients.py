"""Every gradient written by hand, or through code of ours, is the slope of its function (float64, by differences)."""

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

from nanollm.data.batches import IGNORE, Batch
from nanollm.model.attention import LatentAttention
from nanollm.model.layers import AttentionMetadata, RMSNorm, SwiGLU, rotary_table, rotate
from nanollm.model.moe import MoE, balance_loss, route
from nanollm.model.transformer import Transformer
from nanollm.rl.loss import ObjectiveConfig, k3, surrogate
from nanollm.train import loss
from nanollm.train.loss import cross_entropy_sum, next_token_loss, token_logprobs
from tests.model.conftest import TINY, randomised

SMALL = dataclasses.replace(
    TINY,
    vocab_size=11,
    d_model=6,
    n_blocks=2,
    n_heads=2,
    q_lora_rank=5,
    kv_lora_rank=4,
    qk_nope_head_dim=3,
    qk_rope_head_dim=2,
    v_head_dim=3,
    d_ff=7,
    n_routed_experts=3,
    n_shared_experts=1,
    d_expert=4,
)


@pytest.fixture(autouse=True)
def numbers_of_a_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Called(torch.nn.Module):
    """A function of a module and its inputs, as a module."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs):
        return self.function(self.module, *inputs)


def check(module, *inputs):
    """The gradient of a module's output for its inputs and for all of its parameters, drawn anew."""
    names = [name for name, _ in module.named_parameters()]
    parameters = [drawn(*parameter.shape) for _, parameter in module.named_parameters()]

    def function(*tensors):
        weights = dict(zip(names, tensors[len(inputs) :], strict=True))
        return functional_call(module, weights, tensors[: len(inputs)])

    assert gradcheck(function, [*inputs, *parameters])


def places(rows, length, texts=None):
    """Rows of one text, or of texts that begin where `texts` says."""
    positions = torch.arange(length).expand(rows, -1)
    mask = None
    if texts is not None:
        number = (torch.arange(length)[None] >= torch.tensor(texts)[:, None]).sum(0)  # (T,)
        positions = (torch.arange(length) - torch.tensor([0, *texts])[number]).expand(rows, -1)
        same = number[:, None] == number[None]
        mask = (same & torch.ones(length, length, dtype=torch.bool).tril()).expand(rows, -1, -1)
    cos, sin = rotary_table(positions, SMALL.qk_rope_head_dim, SMALL.rope_theta)
    return AttentionMetadata(positions, (cos.double(), sin.double()), mask, None)


def test_norms():
    check(RMSNorm(5, 1e-6), drawn(2, 3, 5))


def test_rotary_positions():
    table = tuple(part.double() for part in rotary_table(torch.arange(4), 6, 10_000.0))
    assert gradcheck(lambda x: rotate(x, table), [drawn(2, 4, 3, 6)])


def test_gated_networks():
    check(SwiGLU(4, 5), drawn(2, 3, 4))


@pytest.mark.parametrize("texts", [None, [2]], ids=["one text", "packed"])
def test_latent_attention(texts):
    where = places(2, 4, texts)
    attention = LatentAttention(SMALL).double()
    check(Called(attention, lambda module, x: module(x, where, None, 0)), drawn(2, 4, SMALL.d_model))


@pytest.mark.parametrize("normalise", [True, False])
def test_experts_and_their_weights(normalise):
    config = dataclasses.replace(SMALL, norm_topk_prob=normalise)
    experts = MoE(config).double().eval()
    check(Called(experts, lambda module, x: module(x)[0]), drawn(2, 3, SMALL.d_model))


def test_the_balance_loss():
    x, centroids, bias = drawn(6, 4), drawn(3, 4), torch.zeros(3)

    def function(x, centroids):
        experts, _, scores = route(x, centroids, bias, 2, True)
        return balance_loss(scores.view(2, 3, -1), experts.view(2, 3, -1))

    assert gradcheck(function, [x, centroids])


@pytest.mark.parametrize("in_chunks", [False, True])
def test_losses(monkeypatch, in_chunks):
    if in_chunks:  # of two rows
        monkeypatch.setattr(loss, "ROWS", 1)
        monkeypatch.setattr(loss, "chunk_rows", lambda *_: 2)
    head, hidden = torch.nn.Linear(4, 7, bias=False).double(), drawn(1, 5, 4)
    weight = drawn(7, 4)
    targets = torch.tensor([[3, IGNORE, 0, 6, 2]])

    def on_head(function):
        called = Called(head, function)
        return lambda hidden, weight: functional_call(called, {"module.weight": weight}, (hidden,))

    assert gradcheck(on_head(lambda head, hidden: cross_entropy_sum(head, hidden, targets)), [hidden, weight])
    wanted = targets.clamp(min=0).flatten()
    assert gradcheck(on_head(lambda head, hidden: token_logprobs(head, hidden[0], wanted, 0.7)[0]), [hidden, weight])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_policy_losses(ratio):
    logprobs, old, advantages = drawn(6), torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    reply, c = torch.tensor([0, 0, 1, 1, 1, 2]), ObjectiveConfig(ratio=ratio)
    assert gradcheck(lambda logprobs: surrogate(logprobs, old, advantages, reply, c)[0], [logprobs])
    assert gradcheck(lambda logprobs: k3(logprobs, old), [logprobs])


def test_a_whole_model(record_property):
    model = randomised(Transformer(SMALL).init(0)).double().eval()
    tokens = torch.randint(SMALL.vocab_size, (2, 5))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    names, parameters = zip(*model.named_parameters(), strict=True)
    called = Called(model, lambda module: next_token_loss(module, batch)[0])

    def function(*weights):
        named = {f"module.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return functional_call(called, named, ())

    weights = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    assert gradcheck(function, weights, fast_mode=True)
    count = sum(weight.numel() for weight in weights)
    record_property("figure", f"norms, rotary positions, MLA, MoE, losses, and a whole model of {count:,} weights")
