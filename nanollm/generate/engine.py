"""How does a batch of prompts of different lengths become a batch of replies?

One padded pass over the prompts fills the latent cache, each prompt once for all of its samples; then each step
decodes one token per row. The engine knows ids only; a `stop` function looks at them from outside.
Letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nanollm.generate.sampling import SamplingConfig, sample, uniforms
from nanollm.model.cache import LatentCache
from nanollm.model.transformer import Transformer

KEPT_SHARE = 0.75
"""Rows that have ended are thrown out when no more than this share of the rows is still alive: throwing out copies the
cache, and on CPUs every new number of rows needs new kernels."""


@dataclass
class Completion:
    """What a prompt was answered with."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of every token drawn, at the sampling temperature: those of ids and, last, that of the end token
    if one was drawn."""
    finish: Literal["end", "length"] = "length"
    """end: an end token (left out of the ids) or the stop function; length: no room or tokens left."""
    end_id: int | None = None
    """The end token, if one was drawn."""


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    max_tokens: int,
    end_ids: frozenset[int],
    seed: int = 0,
    stop: Callable[[list[int]], bool] | None = None,
    samples: int = 1,
) -> list[Completion]:
    """Continue each prompt `samples` times by at most `max_tokens` ids, within the model's context.

    The samples of a prompt stand beside each other. Row i draws from seed + i alone, so that its reply does not depend
    on the other rows.
    """
    check_prompts(model, prompts)
    for name, value in (("max_tokens", max_tokens), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    completions = [Completion() for _ in range(len(prompts) * samples)]
    with model.evaluating():
        cache, logits = prefill(model, prompts, max_tokens)
        rows = np.arange(len(completions))  # the completion that each row of the cache belongs to
        if samples > 1:
            repeated = torch.from_numpy(rows // samples)
            cache, logits = cache.select(repeated), logits[repeated.to(logits.device)]
        live = np.ones(len(rows), dtype=bool)
        for drawn in range(max_tokens):
            ids, logprobs = sample(logits, sampling, uniforms(seed + rows, np.full(len(rows), drawn)))
            tokens, logprob_list, lengths = ids.tolist(), logprobs.tolist(), cache.lengths.numpy()
            for index in live.nonzero()[0].tolist():
                completion = completions[rows[index]]
                completion.logprobs.append(logprob_list[index])
                has_room = lengths[index] < cache.slots.shape[2]  # the newest token is not in it yet
                if not _take(completion, tokens[index], end_ids, stop) or not has_room:
                    live[index] = False
                    lengths[index] = 0  # a row that has ended runs along from the start again, unheard
            alive = int(live.sum())
            if alive == 0 or drawn + 1 == max_tokens:
                break
            if alive <= KEPT_SHARE * len(rows):
                keep = torch.from_numpy(live.nonzero()[0])
                cache, ids = cache.select(keep), ids[keep.to(ids.device)]
                rows, live = rows[live], live[live]
            logits = model(ids[:, None], cache=cache)[:, -1]
    return completions


def check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse what the model cannot continue: nothing, an empty prompt, one without room for a reply."""
    limit = model.config.context_length
    if not prompts or not all(prompts):
        raise ValueError("expected at least one prompt and no empty one (a document starts with the <s> token)")
    longest = max(map(len, prompts))
    if longest >= limit:
        raise ValueError(
            f"the prompt has {longest:,} tokens, the model's context is {limit:,} and a reply needs at least one; "
            f"shorten the prompt to {limit - 1:,} tokens"
        )


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[LatentCache, Tensor]:
    """Read all prompts in one pass; returns their cache and the logits (B, V) after each prompt's last token."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    weight = model.head.weight
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)  # padding goes right, where no real token looks
    room = min(longest + max_tokens, model.config.context_length)
    cache = LatentCache.empty(model.config, len(prompts), room, weight.dtype, weight.device)
    hidden = model.trunk(tokens.to(weight.device), cache=cache)  # (B, T, D)
    cache.lengths = lengths  # forget the padding
    last = hidden[torch.arange(len(prompts)), (lengths - 1).to(weight.device)]
    return cache, model.head(last)


def _take(
    completion: Completion, token: int, end_ids: frozenset[int], stop: Callable[[list[int]], bool] | None
) -> bool:
    """Add a token to a reply; false when the reply ends with it."""
    if token in end_ids:
        completion.finish, completion.end_id = "end", token
        return False
    completion.ids.append(token)
    if stop is not None and stop(completion.ids):
        completion.finish = "end"
        return False
    return True
