"""Asks vLLM or mlx-lm about the folder of an export. Another Python may run it: it imports nothing of ours.

Run as `python ask.py ENGINE FOLDER ANSWER`: JSON of {texts, conversations, scored, prompts, count} comes from stdin,
and the answers go into the file ANSWER: {version, settings, ids, spoken, scores, replies}.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
Scores = list[tuple[int, float, float]]  # most likely token, its log-probability, that of the token that follows

MLA_ON_CPU = 576
"""The width that vLLM's kernel for CPUs is compiled for (csrc/cpu/mla_decode.cpp); for others it says "Unsupported
block size"."""
NO_ROTARY_KERNEL = {"custom_ops": ["-rotary_embedding"]}
"""vLLM's rotary kernel for CPUs reads (tokens, heads, width) as if each head were a token. Compiled models do not use
it, eager ones do."""


def ask_vllm(folder: str, asked: dict[str, Any]) -> Answer:
    """In float32 and eagerly: to compile takes longer than all answers."""
    words = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no second process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is a share of all memory
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "compilation_config": NO_ROTARY_KERNEL}
    told = "float32, eager, custom_ops -rotary_embedding"
    if words["kv_lora_rank"] + words["qk_rope_head_dim"] != MLA_ON_CPU:
        os.environ["VLLM_MLA_DISABLE"] = "1"
        told += ", VLLM_MLA_DISABLE=1"
    vllm: Any = import_module("vllm")  # reads the environment
    if "VLLM_MLA_DISABLE" not in os.environ and import_module("vllm.platforms").current_platform.is_cpu():
        settings["attention_backend"] = "CPU_MLA"  # with AMX vLLM would take a kernel of bfloat16
        told += ", attention_backend CPU_MLA"
    llm = vllm.LLM(folder, **settings)
    greedy = {"temperature": 0, "ignore_eos": True, "logprobs": None}

    def run(prompts: list[list[int]], **settings: Any) -> Any:
        given = [{"prompt_token_ids": ids} for ids in prompts]
        return llm.generate(given, vllm.SamplingParams(**greedy, **settings), use_tqdm=False)

    scored = run(asked["scored"], max_tokens=1, prompt_logprobs=1)
    scores = [
        list(map(score_vllm, each.prompt_logprobs[1:], ids[1:]))
        for each, ids in zip(scored, asked["scored"], strict=True)
    ]
    replies = [list(each.outputs[0].token_ids) for each in run(asked["prompts"], max_tokens=asked["count"])]
    return {"version": vllm.__version__, "settings": told, "scores": scores, "replies": replies}


def score_vllm(found: Any, following: int) -> tuple[int, float, float]:
    """Of one position: vLLM gives the most likely token and the one that follows, by id."""
    top = min(found, key=lambda token: found[token].rank)
    return top, found[top].logprob, found[following].logprob


def ask_mlx(folder: str, asked: dict[str, Any]) -> Answer:
    """In float32, on whatever MLX calls its default device."""
    mx: Any = import_module("mlx.core")
    mlx_lm: Any = import_module("mlx_lm")
    generate_step = import_module("mlx_lm.generate").generate_step

    model = mlx_lm.load(folder)[0]
    model.set_dtype(mx.float32)

    def score(ids: list[int]) -> Scores:
        logits = model(mx.array([ids]))[0, :-1]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        following = mx.take_along_axis(logprobs, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
        return list(zip(logits.argmax(-1).tolist(), logprobs.max(-1).tolist(), following.tolist(), strict=True))

    def reply(ids: list[int]) -> list[int]:
        steps = generate_step(mx.array(ids), model, max_tokens=asked["count"])  # greedy where no sampler is given
        return [int(token) for token, _ in steps]

    return {
        "version": mlx_lm.__version__,
        "settings": f"float32, mlx {mx.__version__} on {mx.default_device()}",
        "scores": list(map(score, asked["scored"])),
        "replies": list(map(reply, asked["prompts"])),
    }


def ask_tokenizer(folder: str, asked: dict[str, Any]) -> Answer:
    """Both engines tokenize with transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(asked["texts"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    spoken = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] == "user", return_dict=False)
        for messages in asked["conversations"]
    ]
    return {"ids": texts, "spoken": spoken}


if __name__ == "__main__":
    engine, folder, file = sys.argv[1:]
    asked = json.load(sys.stdin)
    answer = ask_tokenizer(folder, asked) | {"vllm": ask_vllm, "mlx": ask_mlx}[engine](folder, asked)
    Path(file).write_text(json.dumps(answer), encoding="utf-8")
