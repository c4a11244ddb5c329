"""Optimizers against torch's own, and schedules at the steps where they turn."""

import pytest
import torch

from nanollm.model.transformer import Transformer
from nanollm.train import optim
from nanollm.train.optim import (
    NEWTON_SCHULZ,
    Muon,
    OptimConfig,
    build_optimizers,
    default_lr,
    is_hidden_matrix,
    lr_at,
    orthogonalise,
)


def test_muon_equals_torch_muon_on_matrices():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (16, 16), (8, 24)]
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = [
        Muon(ours, dtype=torch.bfloat16, **settings),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings),
    ]
    for _ in range(5):
        for parameter, other in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for parameter, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            parameter, other, atol=1e-3, rtol=1e-3
        )  # batched bfloat16 products round differently


def test_muon_treats_each_expert_as_a_matrix_of_its_own():
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 8, 12, generator=generator).requires_grad_()
    alone = [matrix.clone().requires_grad_() for matrix in stack.detach()]
    stack.grad = torch.randn(3, 8, 12, generator=generator)
    for matrix, grad in zip(alone, stack.grad, strict=True):
        matrix.grad = grad.clone()
    for parameters in ([stack], alone):
        Muon(parameters, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32).step()
    torch.testing.assert_close(stack, torch.stack([matrix.detach() for matrix in alone]))


@pytest.mark.parametrize("shape", [(2, 6, 30), (2, 30, 6), (1, 16, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack, torch.float32))
    assert values.min() > 0.3
    assert values.max() < 1.3


def newton_schulz(stack: torch.Tensor) -> torch.Tensor:
    """The iteration as it is written down, in float64."""
    a, b, c = NEWTON_SCHULZ
    x = stack.double() / stack.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 64, 170), (2, 64, 256)])
def test_short_cuts_of_the_iteration_change_only_the_rounding(shape, rank):
    """A few strong directions and faint noise, as gradients are: what is lost there explodes later."""
    generator = torch.Generator().manual_seed(0)
    k, m, n = shape
    strong = torch.randn(k, m, rank, generator=generator) @ torch.randn(k, rank, n, generator=generator)
    stack = strong + 0.01 * torch.randn(shape, generator=generator)
    expected = newton_schulz(stack)
    torch.testing.assert_close(orthogonalise(stack, torch.float32).double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(orthogonalise(stack.mT, torch.float32).mT.double(), expected, atol=1e-3, rtol=1e-3)
    rounded = orthogonalise(stack, torch.bfloat16).double()
    assert (rounded - expected).norm() < 0.35 * expected.norm()
    assert torch.linalg.svdvals(rounded).max() < 1.3


def test_tiny_gradients_keep_their_direction_in_float16():
    stack = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(1e-7 * stack, torch.float16), orthogonalise(stack, torch.float16))


def test_muon_gets_the_hidden_matrices_and_adamw_decays_no_norm(config):
    parameters = dict(Transformer(config).init(0).named_parameters())
    adamw, muon = build_optimizers(parameters, OptimConfig(name="muon"), torch.float32)
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    decayed, undecayed = ({id(p) for p in group["params"]} for group in adamw.param_groups)
    for name, parameter in parameters.items():
        assert (id(parameter) in in_muon) == is_hidden_matrix(name, parameter), name
        assert (id(parameter) in undecayed) == ("norm" in name), name
        assert (id(parameter) in decayed) == name.endswith(("embed.weight", "head.weight", "centroids")), name
    assert len(in_muon | decayed | undecayed) == len(parameters)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("linear", 0, 1 / 11),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5 + 0.5 * 0.1),
        ("linear", 100, 0.1),
        ("cosine", 55, 0.5 + 0.5 * 0.1),
        ("cosine", 100, 0.1),
        ("wsd", 10, 1.0),
        ("wsd", 79, 1.0),
        ("wsd", 90, 0.5 + 0.5 * 0.1),
        ("wsd", 100, 0.1),
    ],
)
def test_schedules_are_counted_in_steps(schedule, step, expected):
    c = OptimConfig(lr=2.0, warmup_steps=10, schedule=schedule, final_lr_fraction=0.1)
    assert lr_at(step, 100, c) == pytest.approx(2.0 * expected)


def test_the_last_step_of_a_linear_schedule_still_moves():
    assert 0 < lr_at(99, 100, OptimConfig(lr=1.0, warmup_steps=10)) < 0.02


@pytest.mark.parametrize(("eps", "moved"), [(1e-8, 0.01), (1e-2, 0.0001)])
def test_a_gradient_far_below_eps_moves_its_weight_little(eps, moved):
    weight = torch.zeros(2, 2, requires_grad=True)
    weight.grad = torch.full((2, 2), 1e-4)
    c = OptimConfig(name="adamw", lr=0.01, weight_decay=0.0, eps=eps)
    (optimizer,) = build_optimizers({"embed.weight": weight}, c, torch.float32)
    optimizer.step()
    torch.testing.assert_close(weight.detach().abs(), torch.full((2, 2), moved), rtol=0.02, atol=0)


def test_stacks_of_few_elements_equal_one_of_many(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (16, 16), (3, 8, 24), (8, 24), (8, 24)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    moved = []
    for limit in (2**24, 2 * 8 * 24, 1):
        monkeypatch.setattr(optim, "MAX_STACK", limit)
        parameters = [tensor.clone().requires_grad_() for tensor in start]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        Muon(parameters, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32).step()
        moved.append(parameters)
    for one, *others in zip(*moved, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def test_the_default_rate_falls_with_the_width_and_with_small_batches_and_is_lower_for_adamw():
    assert default_lr("muon", 128, 4096) == 0.02
    assert default_lr("muon", 128, 2**20) == 0.02
    assert default_lr("muon", 128, 1024) == default_lr("muon", 256, 4096) == 0.01
    assert default_lr("adamw", 128, 4096) == 0.0025
