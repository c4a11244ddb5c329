"""A CUDA device computes what a CPU does, and what is fused for it computes what is not."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.data.batches import IGNORE, Batch
from nanollm.model.cache import LatentCache
from nanollm.model.transformer import Transformer
from nanollm.train import loss
from nanollm.train.compile import SpeedConfig, compile_blocks, fastest_attention
from nanollm.train.loss import cross_entropy_sum, next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World
from tests.model.conftest import TINY, randomised

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # of torch's own compiler
]

CUDA = torch.device("cuda")
SHAPE = dataclasses.replace(  # grouped products want rows of 16 bytes
    TINY,
    d_model=64,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    d_expert=32,
)


def some_batch(rng: torch.Generator, rows: int = 4, tokens: int = 48) -> Batch:
    ids = torch.randint(SHAPE.vocab_size, (rows, tokens + 1), generator=rng)
    return Batch(ids[:, :-1], ids[:, 1:])


def gradients(model: Transformer, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    with fastest_attention(next(model.parameters()).device):
        total, _ = next_token_loss(model, batch.to(next(model.parameters()).device))
    total.backward()
    return [part.float().cpu() for part in (total.detach(), *(p.grad for p in model.parameters()))]


def assert_near(got: list[Tensor], expected: list[Tensor], share: float) -> None:
    """The difference is at most this share of the norm."""
    for own, other in zip(got, expected, strict=True):
        assert (own - other).norm() <= share * other.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_float32_on_a_gpu_equals_float32_on_a_cpu(rng, packed):
    model, batch = randomised(Transformer(SHAPE).init(0)).train(), some_batch(rng)
    if packed:
        positions = torch.cat((torch.arange(20), torch.arange(28))).expand(4, -1)
        batch = dataclasses.replace(batch, positions=positions)
    assert_near(gradients(copy.deepcopy(model).to(CUDA), batch), gradients(model, batch), 1e-4)


def test_compiled_equals_eager(rng):
    eager, batch = randomised(Transformer(SHAPE).init(0)).train().to(CUDA), some_batch(rng)
    model = copy.deepcopy(eager)
    compile_blocks(model, SpeedConfig(compile="on"), CUDA)
    assert_near(gradients(model, batch), gradients(eager, batch), 1e-5)


def test_compiled_bfloat16_is_as_near_to_float32_as_eager_bfloat16(rng):
    exact, batch = randomised(Transformer(SHAPE).init(0)).train().to(CUDA), some_batch(rng)
    eager, model = (copy.deepcopy(exact).to(torch.bfloat16) for _ in range(2))
    compile_blocks(model, SpeedConfig(compile="on"), CUDA)
    truth, by_eager, by_compiled = (gradients(side, batch) for side in (exact, eager, model))
    # All together: in a single matrix the rounding of one token that changes its expert may decide.
    expected, *sides = (torch.cat([grad.flatten() for grad in grads]) for grads in (truth, by_eager, by_compiled))
    far, near = ((side - expected).norm() for side in sides)
    assert near <= 1.5 * far


@pytest.mark.parametrize("fuses", [False, True])
def test_chunks_of_logits_give_the_loss_of_all(rng, monkeypatch, fuses):
    monkeypatch.setattr(loss, "MAX_LOGITS_CUDA", 64 * 1000)  # three chunks, the last one smaller
    head = torch.nn.Linear(64, 1000, bias=False, device=CUDA)
    hidden = torch.randn(2, 80, 64, generator=rng).to(CUDA).requires_grad_()
    targets = torch.randint(1000, (2, 80), generator=rng).to(CUDA)
    targets[0, :9] = IGNORE
    whole = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    expected = [whole, *torch.autograd.grad(whole, [hidden, head.weight])]
    chunked = cross_entropy_sum(head, hidden, targets, fuses)
    assert_near([chunked, *torch.autograd.grad(chunked, [hidden, head.weight])], expected, 1e-5)


def test_grouped_experts_equal_one_by_one(rng):
    experts = next(randomised(Transformer(SHAPE).init(0)).moe_layers()).experts.to(CUDA, torch.bfloat16)
    counts = torch.tensor([40, 0, 7, 81, 64], device=CUDA)
    vectors = torch.randn(192, SHAPE.d_model, generator=rng).to(CUDA, torch.bfloat16).requires_grad_()
    assert experts.can_group(vectors)
    assert not experts.can_group(vectors.float())
    sides = []
    for answer in (experts.grouped, experts.one_by_one):
        answers = answer(vectors, counts)
        wanted = [vectors, *experts.parameters()]
        sides.append([answers, *torch.autograd.grad(answers.float().square().sum(), wanted)])
    assert_near(*([part.float() for part in side] for side in sides), 0.02)


def test_a_cache_and_absorbed_attention_agree_with_the_whole_pass(rng):
    model = randomised(Transformer(SHAPE).init(0)).eval().to(CUDA)
    ids = some_batch(rng).tokens.to(CUDA)
    with torch.no_grad():
        whole = model(ids)
        cache = LatentCache.empty(SHAPE, rows=len(ids), length=64, device=CUDA)
        parts = [model(ids[:, :30], cache=cache), *(model(ids[:, [at]], cache=cache) for at in range(30, 48))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_the_same_steps_give_the_same_bits(rng):
    """Of small texts: cuDNN promises it for no others."""
    batches, ends = [some_batch(rng) for _ in range(3)], []
    for _ in range(2):
        state = TrainState.start(
            Transformer(SHAPE).init(0).to(CUDA), OptimConfig(), World(device=CUDA, dtype=torch.bfloat16)
        )
        for batch in batches:
            train_step(state, [batch], next_token_loss, 1e-2, OptimConfig(), World(device=CUDA, dtype=torch.bfloat16))
        ends.append(state.weights())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
