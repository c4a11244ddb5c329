"""How does a batch of prompts of different lengths become a batch of replies?

One padded pass fills the latent cache, then each step decodes one token per unfinished row. The engine knows ids only;
a `stop` function looks at them from outside.
Letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nanollm.generate.sampling import SamplingConfig, sample
from nanollm.model.cache import LatentCache
from nanollm.model.transformer import Transformer


@dataclass
class Completion:
    """What a prompt was answered with."""

    ids: list[int] = field(default_factory=list)
    finish: Literal["end", "length"] = "length"
    """end: an end token (left out of the ids) or the stop function; length: no room or tokens left."""


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
) -> list[Completion]:
    """Continue each prompt by at most `max_tokens` ids, within the model's context.

    Row i draws from seed + i alone, so that its reply does not depend on the other rows.
    """
    check_prompts(model, prompts)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    completions = [Completion() for _ in prompts]
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    live = list(range(len(prompts)))
    with model.evaluating():
        cache, logits = prefill(model, prompts, max_tokens)
        while True:
            ids = sample(logits, sampling, [generators[row] for row in live])
            drawn = zip(live, ids.tolist(), strict=True)
            still = [_take(completions[row], token, end_ids, stop) for row, token in drawn]
            for index, row in enumerate(live):
                used = int(cache.lengths[index])  # tokens in the cache; the newest is not among them yet
                if len(completions[row].ids) == max_tokens or used == cache.slots.shape[2]:
                    still[index] = False
            if not any(still):
                break
            if not all(still):
                keep = torch.tensor(still)
                cache, ids = cache.select(keep), ids[keep.to(ids.device)]
                live = [row for row, stays in zip(live, still, strict=True) if stays]
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
        completion.finish = "end"
        return False
    completion.ids.append(token)
    if stop is not None and stop(completion.ids):
        completion.finish = "end"
        return False
    return True
