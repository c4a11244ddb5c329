"""Writes config.json and weights of a folder that transformers, vLLM and SGLang load without any code of ours.

compact: transformers' Glm4MoeLiteForCausalLM, whose mlp_layer_types say which blocks are dense: no parameter is added.
deepseek-v3: DeepseekV3ForCausalLM, dense blocks first and Mixtures of Experts after them (see export/dense_to_moe.py),
in a width (see export/widen.py) that vLLM and SGLang run with their own kernels. Both read the same names of tensors.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanollm.bundle import CONFIG, Bundle, write_tensors
from nanollm.durable import write_json
from nanollm.export.dense_to_moe import Placement, dense_to_moe, exported_shape
from nanollm.export.names import to_hf_config, to_theirs
from nanollm.export.widen import Widen, to_wide, widened_shape
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.config import ModelConfig
from nanollm.text.chat import reply_ends
from nanollm.text.tokenizer import Tokenizer

HfFormat = Literal["compact", "deepseek-v3"]
ORIGIN = "nanollm"
"""The word of config.json that keeps the shape of the bundle, for the way back; engines ignore it."""
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def write_model(folder: Path, bundle: Bundle, form: HfFormat, dtype: torch.dtype, widen: Widen = "auto") -> None:
    """config.json and the weights: model.safetensors, or several of at most SHARD_BYTES with an index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    write_json(folder / CONFIG, hf_config(bundle.model.config, bundle.tokenizer, form, dtype, widen))
    weights = exported_weights(bundle, form, dtype, widen)
    split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: weights[name] for name in names})
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def exported_weights(bundle: Bundle, form: HfFormat, dtype: torch.dtype, widen: Widen = "auto") -> dict[str, Tensor]:
    """All tensors by their checkpoint names. The router's bias stays in float32, as the classes keep it."""
    weights, config = cast(bundle.model.state_dict(), dtype), bundle.model.config
    if form == "deepseek-v3":
        wide = widened_shape(config) if widen == "auto" else config
        weights, placement = to_wide(weights, config, wide), Placement.of(wide)
        weights, config = dense_to_moe(weights, placement), placement.after
    theirs = to_theirs(weights, config)
    for name, tensor in theirs.items():
        check_finite(name, tensor)
    return theirs


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another type."""
    return {name: tensor if name.endswith("balance_bias") else tensor.to(dtype) for name, tensor in weights.items()}


def check_finite(name: str, tensor: Tensor) -> None:
    """ValueError for numbers that are none, or too great for their type."""
    if not tensor.isfinite().all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} holds numbers that are not finite in {kind}; if they are in the bundle, --dtype f32")


def hf_config(
    config: ModelConfig, tokenizer: Tokenizer, form: HfFormat, dtype: torch.dtype, widen: Widen = "auto"
) -> dict[str, Any]:
    """config.json."""
    shape = exported_shape(config, form, widen)
    words = to_hf_config(shape) | special_ids(tokenizer)
    if form == "compact":
        kinds = ["sparse" if shape.is_moe(block) else "dense" for block in range(shape.n_blocks)]
        words |= {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "mlp_layer_types": kinds}
    else:
        words |= {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "first_k_dense_replace": shape.n_dense_before_moe,
            "moe_layer_freq": 1,
            "moe_router_dtype": "float32",
            "num_nextn_predict_layers": 0,
        }
    return words | {"dtype": str(dtype).removeprefix("torch."), ORIGIN: asdict(config)}


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: what our own commands do when nothing is said."""
    sampling = SamplingConfig()
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return special_ids(tokenizer) | drawn


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids that begin a text, end a reply, and fill."""
    ends = sorted(reply_ends(tokenizer))
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
