"""Writes an adapter for PEFT, on the compact export of the bundle it was trained on.

PEFT 0.21 adapts the experts of transformers as stacks, in which gate and up are one matrix: their two pairs become one
of twice the rank. All targets are named as parameters: PEFT would take a module gate_proj, dense or shared, for that of
the experts of older versions of transformers, and lose it. Letters: E experts, R rank, M outputs, N inputs.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanollm.bundle import write_tensors
from nanollm.durable import write_json
from nanollm.export.names import names
from nanollm.model.config import ModelConfig
from nanollm.model.lora import LoraConfig

ADAPTER = "adapter"  # the folder, within that of the export
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
INNER = "base_layer."  # what PEFT puts around gate and up lies within what it puts around down


def write_peft(folder: Path, config: ModelConfig, lora: LoraConfig, weights: Mapping[str, Tensor]) -> None:
    """adapter_config.json and adapter_model.safetensors into a new folder; weights as in adapter.safetensors."""
    folder.mkdir()
    assert lora.rank is not None
    theirs, targets = dict[str, Tensor](), list[str]()
    with_experts = any(".experts." in name for name in weights)
    for our, their in names(config):
        if isinstance(their, str) and f"{our}.lora_A" in weights:
            targets.append(their)
            theirs |= _named(their.removesuffix("weight"), weights[f"{our}.lora_A"], weights[f"{our}.lora_B"])
    for block in filter(config.is_moe, range(config.n_blocks) if with_experts else ()):
        (a, b), (a_up, b_up), (a_down, b_down) = (
            _pairs(weights, f"trunk.blocks.{block}.ffn.experts.{name}", config, lora.rank)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        both = torch.stack([torch.block_diag(gate, up) for gate, up in zip(b, b_up, strict=True)])  # (E, 2 M, 2 R)
        stem = f"model.layers.{block}.mlp.experts."
        theirs |= _named(stem + INNER, *_flat(torch.cat((a, a_up), dim=1), both)) | _named(stem, *_flat(a_down, b_down))
    write_tensors(folder / "adapter_model.safetensors", theirs)
    words = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none"}
    words |= {"target_modules": [], "target_parameters": targets + ([GATE_UP, DOWN] if with_experts else [])}
    twice = {"rank_pattern": {GATE_UP: 2 * lora.rank}, "alpha_pattern": {GATE_UP: 2 * lora.alpha}}
    write_json(folder / "adapter_config.json", words | (twice if with_experts else {}))


def _pairs(weights: Mapping[str, Tensor], name: str, config: ModelConfig, rank: int) -> tuple[Tensor, Tensor]:
    """A (E, R, N) and B (E, M, R) of a stack; zeros where it has no adapter: PEFT wants all of them or none."""
    sizes = (config.d_model, config.d_expert)
    inputs, outputs = sizes[::-1] if name.endswith("down_proj") else sizes
    experts = config.n_routed_experts
    none = torch.zeros(experts, rank, inputs), torch.zeros(experts, outputs, rank)
    return (weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]) if f"{name}.lora_A" in weights else none


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (E, R, N) and B (E, M, R) of a stack as PEFT has them: (E R, N) and (M, R E)."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _named(stem: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"base_model.model.{stem}lora_A.weight": a, f"base_model.model.{stem}lora_B.weight": b}
