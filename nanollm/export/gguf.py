"""Writes a model as one GGUF file for llama.cpp, Ollama and programs built on them, and Ollama's Modelfile.

Architecture `deepseek2`, tokenizer `llama`. llama.cpp runs latent attention in its absorbed form, so kv_b_proj is split
into the matrices that go into the query (attn_k_b) and behind the attention (attn_v_b). It knows dense blocks only
before the Mixtures of Experts: see export/dense_to_moe.py. Ollama renders TEMPLATE, a text/template of Go, with
.Messages (each with .Role and .Content, the system's among them); <s> is not in it: llama.cpp puts it in front
(tokenizer.ggml.add_bos_token).

An adapter is a second file. llama.cpp adds it where it multiplies with build_lora_mm, build_lora_mm_id or looks up the
embedding; elsewhere it ignores an adapter without a word, so check_adapter refuses that.

Sources: llama.cpp, src/llama-model.cpp and gguf-py (loader and names of deepseek2), src/models/deepseek2.cpp,
src/llama-adapter.cpp; ollama/ollama, docs/modelfile.mdx, template/template.go, parser/parser.go.
Letters: H heads, C key-value latent, N width without position, V width of values.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollm.bundle import Bundle
from nanollm.export.dense_to_moe import Dtype, Placement, dense_to_moe, moe_to_dense, pairs_to_moe
from nanollm.export.hf import check_finite
from nanollm.export.names import names
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.config import ModelConfig
from nanollm.model.lora import LoraConfig
from nanollm.text.chat import template_for
from nanollm.text.tokenizer import END, Tokenizer

KIND_NUMBERS = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "unused": 5, "byte": 6}
ALWAYS_F32 = ("ffn_gate_inp.weight", "exp_probs_b.bias")  # a rounded router chooses other experts
LATENTS = ("attn_q_a.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight")
IN_F16: dict[Dtype, tuple[str, ...]] = {"q8_0": (*LATENTS, "output.weight"), "q5_0": LATENTS, "q4_0": LATENTS}
"""What everything passes through: in q8_0 these few change up to half a percent of the greedy tokens (docs/log.md)."""
BLOCK = 32  # numbers that share a scale in these
STEPS = {"F16": 1, "Q8_0": 127, "Q5_0": 16, "Q4_0": 8}  # from 0 to the greatest number, in scales, which are float16
LITE = (26, 27)
"""With these numbers of blocks llama.cpp takes a model for DeepSeek-V2-Lite and does not read q_a_proj."""
ADAPTER = "adapter.gguf"
WITHOUT_ADAPTER = ("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "head")
"""Matrices that llama.cpp's deepseek2 multiplies with plain ggml_mul_mat."""


def file_name(name: str, dtype: Dtype) -> str:
    """The file of a model that is called `name`, or USER/NAME, as llama.cpp's own converter names it."""
    plain = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2])
    return f"{plain}-{dtype.upper()}.gguf"


def check_fits(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """ValueError for what llama.cpp would read in another way."""
    if tokenizer.model_type not in ("bpe", "char"):
        raise ValueError(
            f"gguf: llama.cpp's tokenizer needs pieces of the type bpe, this bundle's are {tokenizer.model_type}; "
            f"export with --format compact, or train with a tokenizer of --model_type bpe"
        )
    if config.n_blocks in LITE:
        raise ValueError(
            f"gguf: llama.cpp takes a model of {config.n_blocks} blocks for DeepSeek-V2-Lite, which has no query "
            f"latent; export with --format compact, or train with another number of blocks"
        )


def write_gguf(path: Path, bundle: Bundle, dtype: Dtype, name: str = "nanollm") -> None:
    """The whole model, its tokenizer and its chat template in one file; ValueError for what llama.cpp cannot run."""
    from gguf import GGUFWriter, LlamaFileType

    check_fits(bundle.model.config, bundle.tokenizer)
    placement = Placement.of(bundle.model.config)
    writer = GGUFWriter(path, "deepseek2")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(2)
    add_shape(writer, placement.after)
    add_tokenizer(writer, bundle.tokenizer, placement.after.vocab_size)
    for tensor_name, tensor in tensors(dense_to_moe(bundle.model.state_dict(), placement), placement.after):
        add_tensor(writer, tensor_name, tensor, dtype)
    finish(writer, path)


def read_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The numbers in a file that `write_gguf` made of a model of this shape, by the names of its state_dict."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(path).tensors}
    placement, weights = Placement.of(config), dict[str, Tensor]()
    for ours, theirs in their_names(placement.after):
        if "kv_b" in theirs:
            w_uk, w_uv = (found[theirs.replace("kv_b", part)] for part in ("k_b", "v_b"))  # (H, C, N), (H, V, C)
            weights[ours] = torch.cat((w_uk.transpose(1, 2), w_uv), dim=1).flatten(0, 1)
        else:
            weights[ours] = found[theirs]
    return moe_to_dense(weights, placement)


def check_adapter(names: Iterable[str]) -> None:
    """ValueError if llama.cpp would ignore some of an adapter's tensors, called as in adapter.safetensors."""
    found = {name.split(".")[-3] for name in names}  # ... q_a_proj.weight.lora_A
    if ignored := [target for target in WITHOUT_ADAPTER if target in found]:
        raise ValueError(
            f"gguf: llama.cpp ignores the adapter of {', '.join(ignored)}; train one with --lora.targets o_proj "
            f"gate_proj up_proj down_proj, or export the merged bundle"
        )


def write_adapter(path: Path, config: ModelConfig, lora: LoraConfig, weights: Mapping[str, Tensor]) -> None:
    """A LoRA adapter of the GGUF of its base, in float32; weights as in adapter.safetensors."""
    from gguf import GGUFType, GGUFWriter, Keys

    check_adapter(weights)
    placement, ends = Placement.of(config), (".lora_A", ".lora_B")
    adapted = {name.removesuffix(ends[0]) for name in weights if name.endswith(ends[0])}
    pairs = pairs_to_moe({name: (weights[name + ends[0]], weights[name + ends[1]]) for name in adapted}, placement)
    writer = GGUFWriter(path, "deepseek2")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, lora.alpha)
    for ours, theirs in their_names(placement.after):
        if ours in pairs:
            a, b = pairs[ours]
            if theirs == "token_embd.weight":  # its rows are looked up, not multiplied with
                a, b = b, a.T
            add_tensor(writer, f"{theirs}.lora_a", a, "f32")
            add_tensor(writer, f"{theirs}.lora_b", b, "f32")
    finish(writer, path)


def finish(writer: Any, path: Path) -> None:
    """Write the file."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}); is the disk full?") from error


def add_shape(writer: Any, c: ModelConfig) -> None:
    """The keys `deepseek2.*`."""
    from gguf import ExpertGatingFuncType

    writer.add_block_count(c.n_blocks)
    writer.add_context_length(c.context_length)
    writer.add_vocab_size(c.vocab_size)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(1)  # all heads share the latent
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.cache_width)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_leading_dense_block_count(c.n_dense_before_moe)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.experts_per_token)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_feed_forward_length(c.d_expert)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """The pieces, their scores and kinds; ids that the tokenizer lacks are unused pieces."""
    spare = range(tokenizer.vocab_size, vocab_size)
    pieces = tokenizer.pieces
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in pieces] + [f"<unused {token}>" for token in spare])
    writer.add_token_scores([piece.score for piece in pieces] + [0.0 for _ in spare])
    kinds = [KIND_NUMBERS[piece.kind] for piece in pieces] + [KIND_NUMBERS["unused"] for _ in spare]
    writer.add_token_types(kinds)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_eot_token_id(tokenizer.mark_id(END))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    writer.add_chat_template(template_for(tokenizer.symbols.values()))


def their_names(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """(our name, llama.cpp's) of every tensor; the package gguf knows its names by those of transformers."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, c.n_blocks)
    for ours, theirs in names(c):
        name = theirs if isinstance(theirs, str) else theirs[0].replace(".experts.0.", ".experts.")
        yield ours, str(known.get_name(name.replace("_correction_bias", "_correction.bias"), (".weight", ".bias")))


def tensors(weights: Mapping[str, Tensor], c: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, tensor) of every tensor."""
    for ours, theirs in their_names(c):
        if "kv_b" in theirs:
            up = weights[ours].unflatten(0, (c.n_heads, -1))  # (H, N + V, C)
            w_uk, w_uv = up.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
            yield theirs.replace("kv_b", "k_b"), w_uk.transpose(1, 2)  # (H, C, N)
            yield theirs.replace("kv_b", "v_b"), w_uv
        else:
            yield theirs, weights[ours]


def add_tensor(writer: Any, name: str, tensor: Tensor, dtype: Dtype) -> None:
    """A tensor in the type of the file, or in a wider one where that type does not do."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType[type_of(name, tensor, dtype).upper()]
    if kind.name in STEPS:
        check_finite(name, (tensor / STEPS[kind.name]).half())
    numbers = quantize(tensor.detach().to(torch.float32).contiguous().numpy(), kind)
    writer.add_tensor(name, numbers, raw_dtype=kind)


def type_of(name: str, tensor: Tensor, dtype: Dtype) -> Dtype:
    """Vectors and the router stay in float32, and with 8 bits or fewer some matrices in float16."""
    if tensor.dim() == 1 or name.endswith(ALWAYS_F32):
        return "f32"
    if dtype in IN_F16 and (name.endswith(IN_F16[dtype]) or tensor.shape[-1] % BLOCK):
        return "f16"
    return dtype


# --- Ollama ---

# A chat that ends with the assistant's words asks for more of them: no <|end|> comes after these.
OLLAMA_CHAT = """
{{- range $i, $message := .Messages }}
{{- $is_last := eq (len (slice $.Messages $i)) 1 -}}
<|{{ .Role }}|>{{ .Content }}
{{- if not (and $is_last (eq .Role "assistant")) }}<|end|>{{ end }}
{{- if and $is_last (ne .Role "assistant") }}<|assistant|>{{ end }}
{{- end }}"""
OLLAMA_BASE = "{{ .Prompt }}"  # a text to be continued


def modelfile(gguf: str, context_length: int, *, is_base: bool) -> str:
    """The Modelfile for the GGUF of this name in the same folder. It says how to draw: Ollama would do it otherwise."""
    sampling = SamplingConfig()
    parameters: dict[str, object] = {
        "num_ctx": context_length,
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")},
        "repeat_penalty": sampling.repetition_penalty,
    }
    if not is_base:
        parameters["stop"] = f'"{END}"'
    lines = [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join([f"FROM ./{gguf}", f'TEMPLATE """{OLLAMA_BASE if is_base else OLLAMA_CHAT}"""', *lines, ""])
