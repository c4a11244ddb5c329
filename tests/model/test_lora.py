"""An adapter learns and the model under it does not; merged it is the same model. Known bugs are put back."""

import re

import pytest
import torch

from nanollm.model import lora
from nanollm.model.lora import LoraConfig, add_lora, merged, plain_name, targeted, without_lora
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised

C = LoraConfig(rank=3, alpha=7.0)
TOKENS = torch.randint(TINY.vocab_size, (2, 33), generator=torch.Generator().manual_seed(5))


def base() -> Transformer:
    return randomised(Transformer(TINY).init(0)).eval()


def adapted(c: LoraConfig = C) -> Transformer:
    """A model with an adapter that has learnt something."""
    model, rng = base(), torch.Generator().manual_seed(2)
    add_lora(model, c, seed=0)
    for each in lora.adapters(model):
        torch.nn.init.normal_(each.lora_B, std=0.1, generator=rng)
    return model


def plain(model: Transformer) -> Transformer:
    """The model without adapters that its merged weights make."""
    weights = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    other = Transformer(TINY).eval()
    other.load_state_dict(merged(weights, C.scale))
    return other


def loss_of(model: Transformer) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())


# What holds.


def it_begins_at_the_base() -> None:
    model = base()
    add_lora(model, C, seed=0)
    assert torch.equal(model(TOKENS), base()(TOKENS))


def merged_is_adapted() -> None:
    model = adapted()
    torch.testing.assert_close(plain(model)(TOKENS), model(TOKENS), atol=1e-5, rtol=0)
    weights = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    moved = {name for name, tensor in plain(model).state_dict().items() if not torch.equal(tensor, weights[name])}
    assert {name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")} == moved
    for name in moved:  # the equation itself, in float64, expert by expert
        w, a, b = (weights[name + end].double() for end in ("", ".lora_A", ".lora_B"))
        each = zip(*(t if t.dim() == 3 else t[None] for t in (w, a, b)), strict=True)
        expected = torch.stack([own + 7 / 3 * up @ down for own, down, up in each]).view_as(w)
        torch.testing.assert_close(plain(model).state_dict()[name].double(), expected, atol=1e-6, rtol=1e-5)


def every_pair_learns_by_the_chain_rule_and_nothing_else_does() -> None:
    model = adapted()
    loss_of(model).backward()
    got = {plain_name(name): parameter.grad for name, parameter in model.named_parameters()}
    assert all((grad is None) != (".lora_" in name) for name, grad in got.items())
    full = plain(model)
    loss_of(full).backward()
    grads = {name: parameter.grad for name, parameter in full.named_parameters()}
    pairs = {plain_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    names = {name for name in grads if grads[name].dim() > 1 and not name.endswith(("embed.weight", "head.weight"))}
    for name in {name for name in names if "centroids" not in name}:
        a, b, scale = pairs[f"{name}.lora_A"], pairs[f"{name}.lora_B"], C.alpha / C.rank
        torch.testing.assert_close(got[f"{name}.lora_B"], scale * grads[name] @ a.mT, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(got[f"{name}.lora_A"], scale * b.mT @ grads[name], atol=1e-6, rtol=1e-4)
    experts = [got[name] for name in got if ".experts." in name and ".lora_" in name]
    assert len(experts) == 2 * 3 * TINY.n_moe_blocks
    assert all(grad.flatten(1).norm(dim=1).min() > 0 for grad in experts)  # of every routed expert


def without_it_there_is_the_base() -> None:
    model = adapted()
    with without_lora(model):
        assert torch.equal(model(TOKENS), base()(TOKENS))
    assert not torch.allclose(model(TOKENS), base()(TOKENS), atol=0.1)


PROMISES = [
    it_begins_at_the_base,
    merged_is_adapted,
    every_pair_learns_by_the_chain_rule_and_nothing_else_does,
    without_it_there_is_the_base,
]


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    promise()


def broken(promise):
    with pytest.raises((AssertionError, KeyError)):
        promise()


def test_bug_alpha_ignored_in_a_merge(monkeypatch):
    """verl-project/verl#6380: what is served counts the product once, whatever alpha says."""
    right = merged
    monkeypatch.setitem(globals(), "merged", lambda weights, scale: right(weights, 1.0))
    broken(merged_is_adapted)


def test_bug_a_delta_lost_in_a_merge(monkeypatch):
    """unslothai/unsloth-zoo#812: stacks of experts keep the base's weights."""
    right = merged

    def loses(weights, scale):
        return right(weights, scale) | {name: w for name, w in weights.items() if name.endswith("experts.down_proj")}

    monkeypatch.setitem(globals(), "merged", loses)
    broken(merged_is_adapted)


def test_bug_experts_that_stay_frozen(monkeypatch):
    """unslothai/unsloth-zoo#779: adapters reach the shared experts only."""
    right = lora.targeted
    monkeypatch.setattr(
        lora, "targeted", lambda model, targets: [name for name in right(model, targets) if ".experts." not in name]
    )
    broken(every_pair_learns_by_the_chain_rule_and_nothing_else_does)


def test_bug_the_base_trained_as_well(monkeypatch):
    monkeypatch.setattr(Transformer, "requires_grad_", lambda self, requires: self)
    broken(every_pair_learns_by_the_chain_rule_and_nothing_else_does)


def test_bug_a_reference_with_the_trained_weights(monkeypatch):
    """huggingface/trl#5222: the adapter is switched off, and still counts."""
    monkeypatch.setattr(lora.Lora, "forward", lambda self, w: lora.adapted(w, self.lora_A, self.lora_B, self.scale))
    broken(without_it_there_is_the_base)


# Which matrices.


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["experts.gate_proj"], ["ffn.experts.gate_proj"]),
        (["shared.up_proj", "centroids"], ["ffn.centroids", "ffn.shared.up_proj.weight"]),
        (["head"], ["head.weight"]),
    ],
)
def test_targets_are_the_ends_of_names(targets, found):
    names = {re.sub(r"trunk\.blocks\.\d+\.", "", name) for name in targeted(base(), targets)}
    assert sorted(names) == found


def test_routers_embeddings_and_norms_have_no_adapter_by_default():
    left = {name for name, _ in base().named_parameters()} - {*targeted(base(), C.targets)}
    assert all(name.endswith(("norm.weight", "embed.weight", "head.weight", "centroids")) for name in left)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, or null to train every weight, got 0"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha must be above 0, got 0.0"),
        ({"alpha": 16.0}, "need an adapter; set --lora.rank"),
        ({"rank": 2, "targets": ["o_proj", "w1"]}, "no matrix of this model is called w1; it has centroids, down_proj"),
        ({"rank": 2, "targets": []}, "lora.targets must name at least one matrix"),
        ({"rank": 2, "targets": ["proj"]}, "no matrix of this model is called proj"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        add_lora(base(), LoraConfig(**options), seed=0)


def test_without_a_rank_nothing_is_put_on_and_a_seed_gives_the_same_adapter():
    model = base()
    add_lora(model, LoraConfig(), seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(AssertionError), without_lora(model):
        pass
    first, same, other = ([each.lora_A for each in lora.adapters(adapted_by(seed))] for seed in (1, 1, 2))
    assert all(map(torch.equal, first, same))
    assert not any(map(torch.equal, first, other))


def adapted_by(seed: int) -> Transformer:
    model = base()
    add_lora(model, C, seed)
    return model
