"""The models of others with our weights: transformers' classes that compute what ours does."""

import torch
from torch import Tensor
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, PreTrainedModel

from nanollm.export import names
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer


def reference_settings(c: ModelConfig) -> dict[str, object]:
    """Our shape in the reference's words."""
    return names.to_hf_config(c) | {"attn_implementation": "eager"}


def reference_weights(weights: dict[str, Tensor], c: ModelConfig) -> dict[str, Tensor]:
    """Tensors by our names to those of the reference's modules, where the experts of a block lie together."""
    theirs = names.to_theirs(weights, c)
    for block in filter(c.is_moe, range(c.n_blocks)):
        prefix = f"model.layers.{block}.mlp.experts."
        gate, up, down = (
            torch.stack([theirs.pop(f"{prefix}{expert}.{name}.weight") for expert in range(c.n_routed_experts)])
            for name in names.PROJECTIONS
        )
        theirs[prefix + "gate_up_proj"], theirs[prefix + "down_proj"] = torch.cat((gate, up), dim=1), down
    return theirs


def transformers_twin(model: Transformer) -> PreTrainedModel:
    """transformers' Glm4MoeLiteForCausalLM with the shape and a copy of the weights of ours (float32), and sdpa."""
    c = model.config
    kinds = ["sparse" if c.is_moe(block) else "dense" for block in range(c.n_blocks)]
    settings = reference_settings(c) | {"attn_implementation": "sdpa", "pad_token_id": 0}
    peer = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**settings, mlp_layer_types=kinds))
    peer.load_state_dict(reference_weights(model.state_dict(), c))
    return peer
