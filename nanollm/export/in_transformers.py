"""Does transformers say what the bundle says, from the exported folder alone and without any code of ours?"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollm.bundle import Bundle
from nanollm.export import verify
from nanollm.export.hf import DTYPES, cast
from nanollm.export.verify import Check, Samples, Seen
from nanollm.progress import Progress

ROWS = 20
"""Replies at once."""


def compare(folder: Path, bundle: Bundle, dtype: str, prompts: int) -> Iterator[Check]:
    """The table for transformers, line by line. It computes in float32, as the bundle must, whose weights are rounded
    to `dtype`."""
    bundle.model.load_state_dict(cast(bundle.model.state_dict(), DTYPES[dtype]))  # back into its float32
    samples = Samples.of(bundle, prompts)
    with quiet():
        model, tokenizer, complaints = load(folder)
        yield Check("tensors of the class", "all, and no more", complaints or "all, and no more", not complaints)
        yield from compare_ids(tokenizer, bundle, samples)
        yield from compare_logits(model, bundle, samples)
        yield from compare_replies(model, bundle, samples)


def load(folder: Path) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what from_pretrained had to complain about."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    complaints = "; ".join(f"{what}: {', '.join(map(str, names))}" for what, names in info.items() if names)
    return model.eval(), AutoTokenizer.from_pretrained(folder), complaints


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and remarks of transformers: the table says what matters."""
    from transformers.utils import logging

    transformers_log: Any = logging  # without annotations
    level = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_log.set_verbosity(level)
        transformers_log.enable_progress_bar()


def compare_ids(tokenizer: Any, bundle: Bundle, samples: Samples) -> list[Check]:
    """Texts, whose marks are text, and conversations."""
    read = tokenizer(samples.texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    spoken = [
        tokenizer.apply_chat_template(
            asdict(conversation)["messages"],
            add_generation_prompt=conversation.messages[-1].role == "user",
            return_dict=False,
        )
        for conversation in samples.conversations
    ]
    ours = [verify.ids_of(conversation, bundle) for conversation in samples.conversations]
    return [
        verify.check_ids(
            "ids of texts", [bundle.tokenizer.encode(text) for text in samples.texts], read, bundle.tokenizer
        ),
        verify.check_ids("ids of conversations", ours, spoken, bundle.tokenizer),
    ]


@torch.inference_mode()
def compare_logits(model: Any, bundle: Bundle, samples: Samples) -> Iterator[Check]:
    """Every logit of every window."""
    greatest = 0.0
    ours: list[Seen] = []
    theirs: list[Seen] = []
    with Progress("comparing logits", len(samples.windows), "texts") as bar:
        for ids in samples.windows:
            mine, other = verify.our_logits(bundle, ids), model(torch.tensor([ids]), use_cache=False).logits[0]
            greatest = max(greatest, (mine - other).abs().max().item())
            ours.append(Seen.of(mine, ids))
            theirs.append(Seen.of(other, ids))
            bar.advance()
    yield verify.check_difference("greatest difference of a logit", greatest)
    yield verify.check_equal_tops(bundle, samples, ours, theirs)


@torch.inference_mode()
def compare_replies(model: Any, bundle: Bundle, samples: Samples) -> Iterator[Check]:
    """Greedy replies with transformers' cache, and ours read without it."""
    ours = verify.our_replies(bundle, samples)
    theirs: list[list[int]] = []
    with Progress("transformers replies", len(samples.prompts), "prompts") as bar:
        for start in range(0, len(samples.prompts), ROWS):
            some = samples.prompts[start : start + ROWS]
            theirs += continue_greedily(model, some, samples.reply_tokens, bundle.tokenizer.pad_id)
            bar.advance(len(some))
    yield verify.check_replies(bundle, samples, ours, theirs, must_equal=True)
    pairs = zip(samples.prompts, ours, strict=True)
    yield verify.check_likeliest(torch.cat([gaps(model, prompt, reply) for prompt, reply in pairs]))


def gaps(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    """(n,) how much likelier, in logits, another token is than each of the reply's; 0: none is."""
    logits = model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 : -1]  # (n, V), those that predict the reply
    return logits.amax(-1) - logits.gather(-1, torch.tensor(reply)[:, None])[:, 0]


def continue_greedily(model: Any, prompts: Sequence[Sequence[int]], count: int, pad_id: int) -> list[list[int]]:
    """`count` ids after each prompt, prompts padded on the left."""
    longest = max(map(len, prompts))
    rows = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(rows)
    for row, (line, prompt) in enumerate(zip(rows, prompts, strict=True)):
        line[longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids = model.generate(
        rows, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=[]
    )
    return [reply.tolist() for reply in ids[:, longest:]]
