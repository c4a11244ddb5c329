"""The models of others, with our weights: what a comparison runs beside ours."""

from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, PreTrainedModel

from nanollm.model.transformer import Transformer
from tests.model.test_reference import reference_settings, reference_weights


def transformers_twin(model: Transformer) -> PreTrainedModel:
    """transformers' Glm4MoeLiteForCausalLM with the shape and a copy of the weights of ours (float32), and sdpa."""
    c = model.config
    kinds = ["sparse" if c.is_moe(block) else "dense" for block in range(c.n_blocks)]
    settings = reference_settings(c) | {"attn_implementation": "sdpa", "pad_token_id": 0}
    peer = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**settings, mlp_layer_types=kinds))
    peer.load_state_dict(reference_weights(model.state_dict(), c))
    return peer
