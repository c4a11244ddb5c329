"""Runners: the forward pass over tokens of many requests, with a cache of rows, one request each.

The engine says which tokens to read. On CPUs decoding.cpp runs them, elsewhere the model itself.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import groupby

import numpy as np
import torch

from nanollm.generate.cpu_runner import NativeRunner
from nanollm.generate.request import Ints, Kernels, ModelOutput, PromptChunk, Quantize, Runner, ScheduledBatch
from nanollm.kernels.build import NoCompilerError
from nanollm.model.cache import LatentCache
from nanollm.model.int4 import check_widths
from nanollm.model.lora import Pairs, with_pairs
from nanollm.model.transformer import Transformer
from nanollm.progress import say


def open_runner(
    model: Transformer,
    rows: int,
    length: int,
    chunk: int,
    quantize: Quantize = "none",
    kernels: Kernels = "auto",
    adapters: Sequence[Pairs] = (),
) -> Runner:
    """The fastest runner of this machine for the model as it is; ValueError for what it cannot do.

    A pass has at most `chunk` tokens of prompts, and one of each row.
    """
    if kernels == "torch":
        if quantize != "none":
            raise ValueError(f"quantize {quantize} needs kernels native, got torch")
        return TorchRunner(model, rows, length, chunk, adapters)
    if quantize == "int4":
        check_widths(model.config)
    reason = why_not_native(model)
    if reason is None:
        try:
            return NativeRunner(model, rows, length, chunk + rows, quantize, adapters)
        except NoCompilerError as error:
            reason = str(error)
    if kernels == "native" or quantize != "none":
        raise ValueError(f"quantize {quantize} and kernels native need the compiled forward pass: {reason}")
    if model.head.weight.device.type == "cpu":
        tell_once(f"decoding runs on PyTorch's operations, several times slower: {reason}")
    return TorchRunner(model, rows, length, chunk, adapters)


def why_not_native(model: Transformer) -> str | None:
    """What keeps this model from running through decoding.cpp; None: nothing."""
    weight, c = model.head.weight, model.config
    if weight.device.type != "cpu":
        return f"it is for CPUs, the model is on {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 or bfloat16, the model in {str(weight.dtype).removeprefix('torch.')}"
    ranks, hidden = (c.q_lora_rank, c.kv_lora_rank, c.qk_nope_head_dim), (c.n_heads * c.v_head_dim, c.d_ff, c.d_expert)
    inputs = (c.d_model, *ranks, *hidden)
    return None if all(size % 2 == 0 for size in inputs) else f"it needs even sizes, got {inputs}"


tell_once = cache(say)


class TorchRunner:
    """The model's own forward pass, on any device. Rows that run together are rounded together.

    Those of another adapter run apart, each time with weights that are merged anew.
    """

    def __init__(
        self, model: Transformer, rows: int, length: int, max_chunk: int, adapters: Sequence[Pairs] = ()
    ) -> None:
        self.model, self.adapters = model, adapters
        weight = model.head.weight
        # Chunks of different lengths are padded to the longest: behind the last slot there is room for that.
        self.cache = LatentCache.empty(model.config, rows, length + max_chunk, weight.dtype, weight.device)
        self.cache_bytes, self.weight_bytes = self.cache.slots.nbytes, float(weight.itemsize)
        self.cache_bytes_per_token = self.cache.slots[:, 0, 0].nbytes

    def run(self, batch: ScheduledBatch) -> ModelOutput:
        outputs = []
        for number, chunks in groupby(batch.chunks, lambda chunk: chunk.adapter):
            with self._adapted(number):
                outputs.append(self._prefill([*chunks]))
        for number, indices in groupby(range(len(batch.rows)), lambda index: int(batch.adapters[index])):
            own = np.array([*indices])
            at = np.arange(len(own)), np.zeros(len(own), dtype=np.int64)
            with self._adapted(number):
                outputs.append(self._forward(batch.tokens[own, None], batch.rows[own], batch.positions[own], *at))
        logits, experts = [output.logits for output in outputs], [output.experts for output in outputs]
        return ModelOutput(torch.cat(logits), np.concatenate(experts))

    def copy(self, source: int, target: int, count: int) -> None:
        self.cache.slots[:, target, :count] = self.cache.slots[:, source, :count]

    def _adapted(self, number: int) -> AbstractContextManager[None]:
        return with_pairs(self.model, self.adapters[number]) if number >= 0 else nullcontext()

    def _prefill(self, chunks: list[PromptChunk]) -> ModelOutput:
        tokens = np.zeros((len(chunks), max(len(chunk.ids) for chunk in chunks)), dtype=np.int64)
        for line, chunk in zip(tokens, chunks, strict=True):
            line[: len(chunk.ids)] = chunk.ids  # padding goes right, where no real token looks
        rows, starts = np.array([chunk.row for chunk in chunks]), np.array([chunk.start for chunk in chunks])
        wanted = [(line, column) for line, chunk in enumerate(chunks) for column in chunk.wanted]
        lines, columns = np.array(wanted, dtype=np.int64).reshape(-1, 2).T
        return self._forward(tokens, rows, starts, lines, columns)

    def _forward(self, tokens: Ints, rows: Ints, starts: Ints, lines: Ints, columns: Ints) -> ModelOutput:
        """Read tokens (B, T) of rows (B,) from positions starts (B,) on; the output after (lines, columns) (W,)."""
        device = self.cache.slots.device
        cache = LatentCache(self.cache.slots, torch.from_numpy(starts).clone(), torch.from_numpy(rows).to(device))
        with self.model.evaluating():
            hidden, routings = self.model.trunk.routed(torch.from_numpy(tokens).to(device), cache)  # (B, T, D)
        chosen = [routing.experts[lines, columns] for routing in routings]
        return ModelOutput(self.model.head(hidden[lines, columns]).float(), torch.stack(chosen, dim=1).cpu().numpy())
