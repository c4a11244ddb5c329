"""Renames weights and the keys of configs for transformers, vLLM and SGLang, and weights back.

Source: transformers 5.23, modeling_deepseek_v3.py and modeling_glm4_moe_lite.py: the two classes share these names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer

OUTSIDE = {
    "trunk.embed.weight": "model.embed_tokens.weight",
    "trunk.norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
IN_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_a_proj.weight": "self_attn.q_a_proj.weight",
    "attention.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_b_proj.weight": "self_attn.q_b_proj.weight",
    "attention.kv_a_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b_proj.weight": "self_attn.kv_b_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
IN_DENSE = {f"ffn.{name}.weight": f"mlp.{name}.weight" for name in PROJECTIONS}
IN_MOE = {
    "ffn.centroids": "mlp.gate.weight",
    "ffn.balance_bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn.shared.{name}.weight": f"mlp.shared_experts.{name}.weight" for name in PROJECTIONS},
}
EXPERTS = {f"ffn.experts.{name}": name for name in PROJECTIONS}  # ours: one tensor of E experts; theirs: E tensors

SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "d_ff": "intermediate_size",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "experts_per_token": "num_experts_per_tok",
    "d_expert": "moe_intermediate_size",
}


# --- weights ---


def names(config: ModelConfig) -> Iterator[tuple[str, str | list[str]]]:
    """(our name, their name) of every tensor; their names, one per expert, where ours holds all experts of a block."""
    yield from OUTSIDE.items()
    for block in range(config.n_blocks):
        our, their = f"trunk.blocks.{block}.", f"model.layers.{block}."
        inside = IN_BLOCK | (IN_MOE if config.is_moe(block) else IN_DENSE)
        yield from ((our + mine, their + other) for mine, other in inside.items())
        if config.is_moe(block):
            for mine, other in EXPERTS.items():
                experts = range(config.n_routed_experts)
                yield our + mine, [f"{their}mlp.experts.{expert}.{other}.weight" for expert in experts]


def to_theirs(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by the names of our state_dict to tensors by the names of their checkpoints, experts one by one."""
    renamed: dict[str, Tensor] = {}
    for our, their in names(config):
        if isinstance(their, str):
            renamed[their] = weights[our]
        else:
            renamed |= zip(their, weights[our].unbind(0), strict=True)
    return renamed


def to_ours(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """And back. ValueError for tensors that are missing, left over or of another shape."""
    with torch.device("meta"):  # nothing of it has memory: the config may lie about its sizes
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    left_over = set(weights)
    renamed: dict[str, Tensor] = {}
    for our, their in names(config):
        wanted = [their] if isinstance(their, str) else their
        for name in wanted:
            if name not in weights:
                raise ValueError(f"the tensor {name} is missing; config.json asks for it")
            shape = shapes[our] if isinstance(their, str) else shapes[our][1:]
            if weights[name].shape != shape:
                raise ValueError(f"{name} has the shape {[*weights[name].shape]}, config.json asks for {[*shape]}")
        left_over -= {*wanted}
        renamed[our] = weights[their] if isinstance(their, str) else torch.stack([weights[name] for name in their])
    if left_over:
        some = ", ".join(sorted(left_over)[:3])
        raise ValueError(f"config.json knows nothing of {len(left_over)} tensors, such as {some}")
    return renamed


# --- config.json ---


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Our shape in the words of both classes, without the one that says which blocks are dense."""
    return {
        **{their: getattr(config, our) for our, their in SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_key_value_heads": config.n_heads,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
        "rms_norm_eps": config.rms_norm_eps,
        "n_group": 1,
        "topk_group": 1,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
    }
