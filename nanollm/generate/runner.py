"""Runners: the forward pass over tokens of many requests, with a cache of rows, one request each.

The engine says which tokens to read. On CPUs decoding.cpp runs them, elsewhere the model itself.
"""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanollm.generate.cpu_runner import NativeRunner
from nanollm.generate.request import Draws, Ints, Kernels, ModelOutput, PromptChunk, Quantize, Runner, ScheduledBatch
from nanollm.generate.sampling import draw, uniforms
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
        return TorchRunner(model, rows, length, adapters)
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
    return TorchRunner(model, rows, length, adapters)


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


STEP_SLOTS = 256
"""The slots that a step of decoding reads are rounded up to a multiple of this: each number of them has its graph."""
CAPTURE_AFTER = 4  # steps of a bucket: to capture a graph takes about as long as these save
Columns = npt.NDArray[np.int32]
"""(5, B): row, newest token (-1: the one drawn in the step before), position, and the bits of two float32, temperature
and random number, of each row that is decoding."""


class TorchRunner:
    """The model's own forward pass, on any device. Rows that run together are rounded together.

    Those of another adapter run apart, each time with weights that are merged anew.
    """

    def __init__(self, model: Transformer, rows: int, length: int, adapters: Sequence[Pairs] = ()) -> None:
        self.model, self.adapters = model, adapters
        weight = model.head.weight
        self.cache = LatentCache.empty(model.config, rows, length, weight.dtype, weight.device)
        self.cache_bytes, self.weight_bytes = self.cache.slots.nbytes, float(weight.itemsize)
        self.cache_bytes_per_token = self.cache.slots[:, 0].nbytes
        self.rows = rows
        self.steps: dict[tuple[int, int, bool], DecodeStep] = {}
        self.newest = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)  # token drawn last, by row
        self.draws = self.runs_ahead = weight.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.draws and can_capture(model) else None
        self.ahead: Flight | None = None
        self.nothing = ModelOutput(weight.new_empty(0, len(weight), dtype=torch.float32), self.newest[:0])

    def run(self, batch: ScheduledBatch) -> ModelOutput:
        outputs = list[ModelOutput]()
        for number, chunks in groupby(batch.chunks, lambda chunk: chunk.adapter):
            with self._adapted(number):
                outputs += self._prefill([*chunks])
        drawn = None if batch.draws is None else self._draw(batch, batch.draws)
        columns = columns_of(batch.rows, batch.tokens, batch.positions)
        for number, indices in groupby(range(len(batch.rows)) if drawn is None else (), batch.adapters.__getitem__):
            with self._adapted(number):
                decoded, lines = self._decode(columns[:, [*indices]], is_adapted=number >= 0)
                outputs.append(ModelOutput(decoded.logits[lines], decoded.experts[lines]))
        return joined(outputs or [self.nothing], drawn)

    def copy(self, source: int, targets: Sequence[int], count: int) -> None:
        self._forget(targets)
        self.cache.rows[:, targets, :count] = self.cache.rows[:, source, None, :count]

    def _adapted(self, number: int) -> AbstractContextManager[None]:
        return with_pairs(self.model, self.adapters[number]) if number >= 0 else nullcontext()

    # --- prompts ---

    def _prefill(self, chunks: list[PromptChunk]) -> list[ModelOutput]:
        """The output after the wanted tokens of each chunk; those of like lengths are padded to the longest."""
        self._forget([chunk.row for chunk in chunks])
        outputs = dict[int, ModelOutput]()
        for group in group_by_length([len(chunk.ids) for chunk in chunks]):
            outputs |= zip(group, self._prefill_together([chunks[index] for index in group]), strict=True)
        return [outputs[index] for index in range(len(chunks))]

    def _prefill_together(self, chunks: list[PromptChunk]) -> list[ModelOutput]:
        longest, length = max(len(chunk.ids) for chunk in chunks), self.cache.length
        lines = np.zeros((len(chunks), 3 + longest), dtype=np.int64)
        for line, chunk in zip(lines, chunks, strict=True):
            line[: 3 + len(chunk.ids)] = chunk.row, chunk.start, len(chunk.ids), *chunk.ids
        wanted = [line * longest + column for line, chunk in enumerate(chunks) for column in chunk.wanted]
        device, in_use = self.newest.device, max(chunk.start + len(chunk.ids) for chunk in chunks)
        on_device = torch.from_numpy(lines).to(device)
        (rows, starts, counts), columns = on_device[:, :3, None].unbind(1), torch.arange(longest, device=device)
        # Padding goes right, where no real token looks, and is written where nobody reads.
        targets = torch.where(columns < counts, rows * length + starts + columns, self.rows * length)
        places = self.cache.places(starts + columns, targets, in_use, rows[:, 0])
        hidden, routings = self.model.trunk.routed(on_device[:, 3:], self.cache, places=places)  # (B, T, D)
        chosen, own = torch.tensor(wanted, dtype=torch.int64).to(device), [len(chunk.wanted) for chunk in chunks]
        logits = self._logits(hidden.flatten(0, 1)[chosen])
        experts = torch.stack([routing.experts.flatten(0, 1)[chosen] for routing in routings], dim=1)
        return [ModelOutput(*parts) for parts in zip(logits.split(own), experts.split(own), strict=True)]

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) to (N, V) float32: rounded to bfloat16, the likeliest tokens would tie."""
        head = self.model.head
        if hidden.is_cuda and hidden.dtype != torch.float32 and len(hidden):
            return torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
        return head(hidden).float()

    # --- decoding ---

    def _decode(self, columns: Columns, is_adapted: bool = False) -> tuple["Decoded", npt.NDArray[np.int64] | slice]:
        """Decode a token of each of these rows; what that gives, and the lines of it that are theirs."""
        bucket = self._bucket(columns.shape[1])
        is_whole = self._bucket(int(columns[0].max()) + 1) == bucket  # all rows run, or nearly all: none is gathered
        in_use = int(columns[2].max()) + 1
        key = bucket, min(in_use + -in_use % STEP_SLOTS, self.cache.length), is_whole
        if key not in self.steps:
            self.steps[key] = DecodeStep(self, *key)
        lines = columns[0].astype(np.int64) if is_whole else slice(0, columns.shape[1])
        return self.steps[key].run(columns, lines, is_adapted), lines

    def _bucket(self, count: int) -> int:
        return min(1 << (count - 1).bit_length(), self.rows)

    def _draw(self, batch: ScheduledBatch, draws: Draws) -> tuple[list[int], list[float]]:
        """The next token of each row, and its log-probability. The step after it is begun before they are known here:
        the device knows them, and works while the host sees to what they mean."""
        numbers = uniforms(draws.seeds, draws.counts)
        columns = columns_of(batch.rows, batch.tokens, batch.positions, draws.temperatures, numbers)
        flight, self.ahead = self.ahead, None
        at = None if flight is None else flight.find(columns)
        if flight is None or at is None:
            flight, at = self._launch(columns), np.arange(columns.shape[1])
        if self.runs_ahead and not any(chunk.is_last for chunk in batch.chunks):  # those join the next step
            later = columns_of(batch.rows, np.full_like(batch.rows, -1), batch.positions + 1)
            later[3], later[4] = columns[3], uniforms(draws.seeds, draws.counts + 1).numpy().view(np.int32)
            goes_on = later[2] < self.cache.length
            self.ahead = self._launch(later[:, goes_on]) if goes_on.any() else None
        ids, logprobs = flight.wait()[:, at]
        if self.ahead is not None:
            self.ahead.columns[1] = ids[goes_on]
        return ids.tolist(), logprobs.view(np.float32).tolist()

    def _launch(self, columns: Columns) -> "Flight":
        decoded, lines = self._decode(columns)
        is_cuda = decoded.drawn.is_cuda
        host = torch.empty(decoded.drawn.shape, dtype=torch.int32, pin_memory=is_cuda)
        host.copy_(decoded.drawn, non_blocking=is_cuda)
        event = torch.cuda.Event() if is_cuda else None
        if event is not None:
            event.record()
        return Flight(columns, lines, host, event)

    def _forget(self, rows: Sequence[int]) -> None:
        """What was decoded ahead of these rows is not theirs any more."""
        if self.ahead is not None:
            self.ahead.columns[1, np.isin(self.ahead.columns[0], rows)] = -1


class Flight(NamedTuple):
    """A step of decoding whose answer is on its way."""

    columns: Columns
    lines: npt.NDArray[np.int64] | slice
    host: Tensor  # (2, lines) int32: ids and the bits of their log-probabilities
    event: torch.cuda.Event | None

    def find(self, columns: Columns) -> Ints | None:
        """Where in its answer these stand; None where one was not asked just so."""
        at = np.full(1 + max(self.columns[0].max(), columns[0].max()), -1)
        at[self.columns[0]] = np.arange(self.columns.shape[1])
        own: Ints = at[columns[0]]
        return own if (own >= 0).all() and (self.columns[:, own] == columns).all() else None

    def wait(self) -> Columns:
        """(2, B): ids, and the bits of their log-probabilities."""
        if self.event is not None:
            self.event.synchronize()
        answer: Columns = self.host.numpy()[:, self.lines]
        return answer


class Decoded(NamedTuple):
    """What a step of decoding gives, line by line."""

    logits: Tensor  # (B, V) float32
    experts: Tensor  # (B, M, K)
    drawn: Tensor  # (2, B) int32: ids, and the bits of their log-probabilities; of no use where the runner draws none


class DecodeStep:
    """One token of each row of a bucket, in buffers that stay where they are, so that a CUDA graph can replay it.

    A line that no row takes is written where nobody reads.
    """

    def __init__(self, runner: TorchRunner, lines: int, in_use: int, is_whole: bool) -> None:
        """For rows that hold `in_use` tokens at most; is_whole: line i is row i."""
        self.runner = weakref.proxy(runner)  # a cycle would keep its cache until it is looked for
        self.in_use, self.is_whole = in_use, is_whole
        self.idle = np.zeros((5, lines), dtype=np.int32)
        self.idle[0] = runner.rows
        self.inputs = torch.from_numpy(self.idle).to(runner.newest.device, copy=True)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: Decoded | None = None  # what the graph writes
        self.runs = 0

    def run(self, columns: Columns, lines: npt.NDArray[np.int64] | slice, is_adapted: bool) -> "Decoded":
        """Fill the buffers and compute; an adapter's weights are in no graph."""
        filled = self.idle.copy()
        filled[:, lines] = columns
        host, is_cuda = torch.from_numpy(filled), self.inputs.is_cuda
        self.inputs.copy_(host.pin_memory() if is_cuda else host, non_blocking=is_cuda)
        self.runs += not is_adapted
        if is_adapted or self.runner.pool is None or self.runs <= CAPTURE_AFTER:
            return self.compute()
        if self.graph is None or self.captured is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.runner.pool, capture_error_mode="thread_local"):
                self.captured = self.compute()
        self.graph.replay()
        return self.captured

    def compute(self) -> "Decoded":
        """Trunk, head and plain sampling, without a word to the host."""
        runner = self.runner
        rows, tokens, positions = self.inputs[:3].long()  # (B,) each
        temperatures, numbers = self.inputs[3:].view(torch.float32)
        tokens = torch.where(tokens < 0, runner.newest[rows], tokens)
        targets = rows * runner.cache.length + positions
        held = None if self.is_whole else rows.clamp(max=runner.rows - 1)
        places = runner.cache.places(positions[:, None], targets, self.in_use, held)
        hidden, routings = runner.model.trunk.routed(tokens[:, None], runner.cache, places=places)  # (B, 1, D)
        logits = runner._logits(hidden[:, 0])
        experts = torch.stack([routing.experts[:, 0] for routing in routings], dim=1)
        if not runner.draws:
            return Decoded(logits, experts, self.inputs[:2])
        ids, logprobs = draw(logits, temperatures, numbers)
        runner.newest.index_copy_(0, rows, ids)
        return Decoded(logits, experts, torch.stack((ids.int(), logprobs.view(torch.int32))))


def can_capture(model: Transformer) -> bool:
    """Whether a CUDA graph can hold a pass: only Hopper's and Blackwell's grouped products do not ask the host for
    their sizes (https://github.com/pytorch/pytorch/issues/161407)."""
    weight = model.head.weight
    is_able = torch.cuda.get_device_capability(weight.device)[0] in (9, 10)
    return is_able and all(layer.experts.can_group(weight) for layer in model.moe_layers())


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of chunks in groups, each of which, padded to its longest, is half as large again as it is at most: few
    passes, and a long prompt alone."""
    groups, longest, real = list[list[int]](), 0, 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        real += lengths[index]
        if not groups or 2 * longest * (len(groups[-1]) + 1) > 3 * real:
            groups.append([])
            longest = real = lengths[index]
        groups[-1].append(index)
    return groups


def columns_of(rows: Ints, tokens: Ints, positions: Ints, *draws: npt.ArrayLike) -> Columns:
    """draws: temperatures and random numbers; where nothing is drawn, none."""
    floats = [np.asarray(each, dtype=np.float32).view(np.int32) for each in draws] or [np.zeros_like(rows)] * 2
    return np.stack((rows, tokens, positions, *floats)).astype(np.int32)


def joined(outputs: Sequence[ModelOutput], drawn: tuple[list[int], list[float]] | None = None) -> ModelOutput:
    """One below the other."""
    logits, experts = [output.logits for output in outputs], [output.experts for output in outputs]
    if len(outputs) == 1:
        return ModelOutput(logits[0], experts[0], drawn)
    return ModelOutput(torch.cat(logits), torch.cat(experts), drawn)
