"""Models and tokenizers as others make them: transformers' classes with random weights, SentencePiece's defaults."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

STORY = (Path(__file__).parents[1] / "story.txt").read_text(encoding="utf-8")
PIECES = 480
CLASSES = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
}
WORDS = {
    "vocab_size": PIECES,
    "max_position_embeddings": 96,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-6,
}


@cache
def sentencepiece_model(**settings: Any) -> bytes:
    """A tokenizer as Llama's: byte fallback, <unk> <s> </s> first, no <pad>; the rest is SentencePiece's default."""
    model = io.BytesIO()
    defaults = {"vocab_size": PIECES, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORY.split("\n")), model_writer=model, **defaults | settings
    )
    return model.getvalue()


def save_foreign(folder: Path, model_type: str = "deepseek_v3", dtype=torch.float32, shard_size="1GB", **words: Any):
    """Write a model and its tokenizer into a folder, and return the model."""
    config_class, model_class = CLASSES[model_type]
    first = {"first_k_dense_replace": 1} if model_type == "deepseek_v3" else {}
    torch.manual_seed(0)
    model = model_class(config_class(**WORDS | first | words)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor += (0.3 if tensor.dim() == 1 else 0.1) * torch.randn(tensor.shape)
    transformers.logging.disable_progress_bar()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return model
