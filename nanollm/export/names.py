"""Names of weights and keys of configs in transformers, vLLM and SGLang, there and back.

Source: transformers 5.23, modeling_deepseek_v3.py and modeling_glm4_moe_lite.py: the two classes share these names.
Both directions are written here, so that what leaves by export comes back by import.
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
FIXED = {  # what their configs may say and we can only do in one way; a word that is absent means the same
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
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
        **FIXED,
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


def from_hf_config(words: Mapping[str, Any]) -> ModelConfig:
    """The shape that a config.json of one of the classes describes; ValueError naming what we cannot express."""
    check_expressible(words)
    moe_every, n_dense_first = pattern_of(moe_blocks(words))
    return ModelConfig(
        **{our: word(words, their, int) for our, their in SIZES.items()},
        routed_scaling_factor=float(word(words, "routed_scaling_factor", float)),
        rms_norm_eps=float(word(words, "rms_norm_eps", float)),
        moe_every=moe_every,
        n_dense_first=n_dense_first,
        norm_topk_prob=word(words, "norm_topk_prob", bool),
        rope_theta=rope_theta(words),
    )


def word(words: Mapping[str, Any], name: str, kind: type[int] | type[float] | type[bool]) -> Any:
    """A value of a config.json; ValueError if it is missing or of another kind. A whole number is a number, too."""
    value = words.get(name)
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ValueError(f"config.json: {name} must be {wanted}, got {value!r}; NanoLLM cannot express it")
    return value


def check_expressible(words: Mapping[str, Any]) -> None:
    """Refuse what a Transformer of ours does not do."""
    for name, value in FIXED.items():
        if words.get(name, value) != value:
            raise ValueError(f"config.json: {name} must be {value!r}, got {words[name]!r}; NanoLLM cannot express it")
    heads, groups = word(words, "num_attention_heads", int), words.get("n_group") or 1
    if words.get("num_key_value_heads", heads) != heads:
        got = words["num_key_value_heads"]
        raise ValueError(f"config.json: num_key_value_heads must be num_attention_heads ({heads}), got {got}")
    if (words.get("topk_group") or 1) != groups:
        raise ValueError(
            f"config.json: topk_group must be n_group ({groups}: a choice among all experts), "
            f"got {words.get('topk_group')}; NanoLLM cannot express it"
        )


def rope_theta(words: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies; ValueError for positions that are stretched (yarn, linear, ...)."""
    rope = words.get("rope_parameters") or words.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: the rotary type must be default, got {kind}; NanoLLM cannot express it")
    if (part := rope.get("partial_rotary_factor", words.get("partial_rotary_factor", 1))) != 1:
        raise ValueError(f"config.json: partial_rotary_factor must be 1, got {part!r}; NanoLLM cannot express it")
    return float(word({**words, **rope}, "rope_theta", float))


def moe_blocks(words: Mapping[str, Any]) -> list[bool]:
    """For each block, whether it is a Mixture of Experts."""
    count = word(words, "num_hidden_layers", int)
    if (kinds := words.get("mlp_layer_types")) is not None:
        if len(kinds) != count or not {*kinds} <= {"dense", "sparse"}:
            raise ValueError(f"config.json: mlp_layer_types must name {count} blocks dense or sparse, got {kinds}")
        return [kind == "sparse" for kind in kinds]
    first = word(words, "first_k_dense_replace", int)
    every = words.get("moe_layer_freq", 1)
    if every != 1:
        raise ValueError(f"config.json: moe_layer_freq must be 1, got {every!r}; NanoLLM cannot express it")
    return [block >= first for block in range(count)]


def pattern_of(is_moe: list[bool]) -> tuple[int, int]:
    """moe_every and n_dense_first of these blocks; ValueError if no two numbers tell them."""
    places = [block for block, moe in enumerate(is_moe) if moe]
    if places:
        every = places[1] - places[0] if len(places) > 1 else places[0] + 1
        first = max(0, places[0] + 1 - every)
        if is_moe == [(block + 1) % every == 0 and block >= first for block in range(len(is_moe))]:
            return every, first
    raise ValueError(
        f"config.json: Mixtures of Experts in blocks {[place + 1 for place in places]} of {len(is_moe)}; NanoLLM can "
        f"express every n-th block, after some dense ones"
    )
