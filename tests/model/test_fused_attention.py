"""attention.cpp computes what PyTorch's attention computes, forward and backward, and no text sees another."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.config import load_preset
from nanollm.kernels import attention as fused
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer, packed_mask, text_spans
from tests.model.conftest import randomised

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or fused.library() is None,
    reason="needs a compiler, and a processor that multiplies bfloat16",
)

C = dataclasses.replace(ModelConfig(**load_preset("model", "nano-1m")), context_length=80, vocab_size=300)
SCALE = 0.2


def inputs(rng, rows: int, tokens: int, heads: int, nope: int, rope: int, value: int) -> list[Tensor]:
    """q, kv, k_rope and the gradient of the answers."""
    widths = ((heads, nope + rope), (heads, nope + value), (rope,), (heads, value))
    return [torch.randn(rows, tokens, *width, generator=rng).bfloat16() for width in widths]


def random_positions(rng, tokens: int) -> Tensor:
    """Texts, each with up to three continuations of its first tokens: (T,) int64."""
    positions = list[int]()
    while len(positions) < tokens:
        shared, *lengths = torch.randint(
            1, 12, (int(torch.randint(1, 5, (1,), generator=rng)),), generator=rng
        ).tolist()
        positions += range(shared)
        for length in lengths:
            positions += range(shared, shared + length)
    return torch.tensor(positions[:tokens])


def plain(q: Tensor, kv: Tensor, k_rope: Tensor, positions: Tensor | None) -> Tensor:
    """The same from PyTorch's operations, keys and mask written out."""
    heads, nope = q.shape[2], q.shape[3] - k_rope.shape[2]
    k = torch.cat((kv[..., :nope], k_rope[:, :, None].expand(-1, -1, heads, -1)), dim=-1)
    mask = packed_mask(torch.arange(q.shape[1])[None] if positions is None else positions)
    q, k, v = (x.transpose(1, 2) for x in (q, k, kv[..., nope:]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=SCALE).transpose(1, 2)


def with_gradients(function, tensors: list[Tensor], grad: Tensor, positions: Tensor | None) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves, positions)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def ours(q, kv, k_rope, positions):
    spans = None if positions is None else text_spans(positions).int()
    return fused.attend(q, kv, k_rope, spans, SCALE)[0]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(2, 64, 2, 16, 16, 32), (2, 77, 3, 32, 32, 64), (1, 300, 2, 64, 64, 128), (3, 33, 1, 32, 32, 32)],
    ids=str,
)
def test_answers_and_gradients_are_as_near_to_exact_ones_as_pytorchs(sizes, is_packed, rng):
    *tensors, grad = inputs(rng, *sizes)
    positions = torch.stack([random_positions(rng, sizes[1]) for _ in range(sizes[0])]) if is_packed else None
    exact = with_gradients(plain, [tensor.double() for tensor in tensors], grad, positions)
    for right, got, theirs in zip(
        exact,
        with_gradients(ours, tensors, grad, positions),
        with_gradients(plain, tensors, grad, positions),
        strict=True,
    ):
        error, usual = ((x.double() - right).norm() / right.norm() for x in (got, theirs))
        assert error < max(1.5 * usual, 4e-3)


def test_a_token_alone_answers_with_its_value(rng):
    q, kv, k_rope, _ = inputs(rng, 2, 1, 2, 16, 16, 32)
    assert torch.equal(ours(q, kv, k_rope, None), kv[..., 16:])


def test_packed_texts_equal_texts_of_their_own(rng):
    *tensors, grad = inputs(rng, 1, 90, 2, 32, 32, 64)
    positions = torch.cat((torch.arange(37), torch.arange(53)))[None]
    together = with_gradients(ours, tensors, grad, positions)
    for part in (slice(0, 37), slice(37, 90)):
        alone = with_gradients(ours, [tensor[:, part] for tensor in tensors], grad[:, part], None)
        for whole, own in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[:, part], own, atol=2e-2, rtol=2e-2)


def test_threads_and_repetition_change_no_bit(rng):
    *tensors, grad = inputs(rng, 2, 100, 4, 32, 32, 32)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(with_gradients(ours, tensors, grad, None))
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(map(torch.equal, answers[0], other))


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_model_is_as_near_to_exact_with_it_as_without(is_packed, rng, monkeypatch):
    exact = randomised(Transformer(C).init(0))
    model = copy.deepcopy(exact).to(torch.bfloat16)
    tokens = torch.randint(C.vocab_size, (2, 80), generator=rng)
    parts = torch.arange(30), torch.arange(20), torch.arange(15, 30), torch.arange(15, 30)  # the last two fork a text
    positions = torch.cat(parts).expand(2, -1) if is_packed else None

    def gradients(model: Transformer) -> Tensor:
        model.zero_grad()
        model(tokens, positions=positions).float().logsumexp(-1).sum().backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])

    monkeypatch.setattr(fused, "is_slow_without", lambda: True)
    assert fused.serves(*C.head_widths, torch.bfloat16, torch.device("cpu"))
    right, got = gradients(exact), gradients(model)
    monkeypatch.setattr(fused, "serves", lambda *_: False)
    error, usual = ((x - right).norm() / right.norm() for x in (got, gradients(model)))
    assert error < 1.3 * usual < 0.1


def test_torch_knows_its_shapes_and_gradients(rng):
    q, kv, k_rope, _ = inputs(rng, 1, 40, 2, 16, 16, 32)
    arguments = (q.requires_grad_(), kv.requires_grad_(), k_rope.requires_grad_(), None, SCALE)
    torch.library.opcheck(
        fused.attend, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_it_serves_bfloat16_on_cpus_with_whole_panels_only(monkeypatch):
    monkeypatch.setattr(fused, "is_slow_without", lambda: True)
    cpu = torch.device("cpu")
    assert fused.serves(*C.head_widths, torch.bfloat16, cpu)
    assert not fused.serves(*C.head_widths, torch.float32, cpu)
    assert not fused.serves(*C.head_widths, torch.bfloat16, torch.device("meta"))
    assert not fused.serves(*dataclasses.replace(C, v_head_dim=24).head_widths, torch.bfloat16, cpu)


def test_without_a_compiler_pytorch_serves_and_it_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fused, "is_slow_without", lambda: True)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    fused.library.cache_clear()
    try:
        assert not fused.serves(*C.head_widths, torch.bfloat16, torch.device("cpu"))
    finally:
        fused.library.cache_clear()
    assert "attention runs on PyTorch's operations" in capsys.readouterr().err


def test_positions_that_make_no_sense_reach_nothing_outside_a_row(monkeypatch):
    monkeypatch.setattr(fused, "is_slow_without", lambda: True)
    model = Transformer(C).init(0).to(torch.bfloat16)
    positions = torch.randint(200, (2, 80), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(model(torch.ones(2, 80, dtype=torch.int64), positions=positions)).all()
