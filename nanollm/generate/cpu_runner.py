"""A runner for CPUs: binds kernels/decoding.cpp, the forward pass in C++, and packs the weights for it.

The file is compiled on this machine when it is needed for the first time. Weights are copied into the panels that it
reads from the first byte to the last; with int8 every output of a matrix has its own scale, with int4 (model/int4.py)
every 32 inputs of it. Adapters lie beside them, as pairs of thin matrices that are never quantized.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int64, c_void_p
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.generate.request import ModelOutput, Quantize, ScheduledBatch
from nanollm.generate.sampling import Bits
from nanollm.kernels import build
from nanollm.kernels.build import OPTIONS
from nanollm.model import int4
from nanollm.model.attention import LatentAttention
from nanollm.model.layers import rotary_table
from nanollm.model.lora import Pair, Pairs, per_head, stacked
from nanollm.model.moe import MoE
from nanollm.model.transformer import Transformer

SOURCE = Path(build.__file__).with_name("decoding.cpp")
PANEL = 32


class PairWeights(ctypes.Structure):
    _fields_ = (("a", c_void_p), ("b", c_void_p), ("rank", c_int64), ("a_step", c_int64), ("b_step", c_int64))


class Matrix(ctypes.Structure):
    _fields_ = (
        *(("panels", c_void_p), ("scales", c_void_p), ("outputs", c_int64), ("inputs", c_int64)),
        *(("is_int4", c_int64), ("pairs", c_void_p)),
    )


class BlockWeights(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "q_norm", "kv_norm", "ffn_norm")),
        *((name, Matrix) for name in ("low", "q_up", "key_up", "key_down", "value_up", "out", "gate", "up", "down")),
        ("is_moe", c_int64),
        *((name, c_void_p) for name in ("centroids", "balance_bias", "experts")),
    )


class Model(ctypes.Structure):
    """decoding.cpp's model; the names of ModelConfig where it has them."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in (
                *("d_model", "n_blocks", "n_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
                *("qk_rope_head_dim", "v_head_dim", "widest", "n_routed_experts", "experts_per_token", "vocab_size"),
                *("rows", "slots", "max_tokens", "rank", "norm_topk_prob"),
            )
        ),
        *((name, c_float) for name in ("rms_norm_eps", "scale", "routed_scaling_factor")),
        *((name, c_void_p) for name in ("embed", "cosine", "sine", "norm")),
        ("head", Matrix),
        ("blocks", c_void_p),
        ("cache", c_void_p),
    )


class Pass(ctypes.Structure):
    _fields_ = (
        ("count", c_int64),
        *((name, c_void_p) for name in ("tokens", "rows", "positions", "adapters")),
        ("pieces", c_int64),
        ("lengths", c_void_p),
        ("wanted", c_int64),
        *((name, c_void_p) for name in ("wanted_at", "logits", "experts")),
        ("threads", c_int64),
    )


class NativeRunner:
    """Runs passes through decoding.cpp: float32 and bfloat16 weights, int8 and int4 ones."""

    draws = False

    def __init__(
        self,
        model: Transformer,
        rows: int,
        length: int,
        longest: int,
        quantize: Quantize = "none",
        adapters: Sequence[Pairs] = (),
    ) -> None:
        """`longest`: most tokens of a pass. NoCompilerError where the library cannot be made."""
        self.library = library()
        c = self.config = model.config
        dtype = model.head.weight.dtype
        assert dtype in (torch.float32, torch.bfloat16), dtype
        self.kept: list[Any] = []  # what the library points at
        own = dict(model.named_parameters())
        self.adapters = [{id(own[name]): pair for name, pair in each.items()} for each in adapters]
        self.rank = 0  # the greatest of a pair, padded
        self.quantize, self.dtype = quantize, dtype if quantize == "none" else torch.bfloat16
        self.kind, self.together = ("float", 1) if self.dtype == torch.float32 else ("bf16", 2)
        self.slots = torch.empty(c.n_blocks, rows, length, c.cache_width, dtype=self.dtype)
        self.cache_bytes, self.cache_bytes_per_token = self.slots.nbytes, self.slots[:, 0, 0].nbytes
        self.bytes_of_matrices: list[tuple[int, int]] = []  # and how many weights they have
        self.handle = getattr(self.library, f"open_{self.kind}")(byref(self._describe(model, rows, length, longest)))
        if not self.handle:
            raise MemoryError(f"no room for passes of {longest:,} tokens; fewer rows or a shorter length need less")
        n_bytes, n_weights = map(sum, zip(*self.bytes_of_matrices, strict=True))
        self.weight_bytes = n_bytes / n_weights

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            getattr(self.library, f"close_{self.kind}")(self.handle)

    def run(self, batch: ScheduledBatch) -> ModelOutput:
        chunks, c = batch.chunks, self.config
        lengths = np.array([len(chunk.ids) for chunk in chunks], dtype=np.int64)
        tokens = np.concatenate([*(chunk.ids for chunk in chunks), batch.tokens])  # (N,), chunks first
        rows = np.concatenate([np.repeat([chunk.row for chunk in chunks], lengths), batch.rows])
        ranges = [np.arange(chunk.start, chunk.start + len(chunk.ids)) for chunk in chunks]
        positions = np.concatenate([*ranges, batch.positions])
        adapters = np.concatenate([np.repeat([chunk.adapter for chunk in chunks], lengths), batch.adapters])
        begins = lengths.cumsum() - lengths
        own = [begin + np.array(chunk.wanted, np.int64) for begin, chunk in zip(begins, chunks, strict=True)]
        wanted = np.concatenate([*own, np.arange(lengths.sum(), len(tokens))])  # (W,) whose logits are asked for
        logits = torch.empty(len(wanted), c.vocab_size)
        experts = np.empty((len(tokens), c.n_moe_blocks, c.experts_per_token), dtype=np.int64)
        each_token = (tokens, rows, positions, adapters)
        tokens, rows, positions, adapters = (np.ascontiguousarray(each, dtype=np.int64) for each in each_token)
        call = Pass(
            count=len(tokens),
            tokens=tokens.ctypes.data,
            rows=rows.ctypes.data,
            positions=positions.ctypes.data,
            adapters=adapters.ctypes.data if (adapters >= 0).any() else None,
            pieces=len(lengths),
            lengths=lengths.ctypes.data,
            wanted=len(wanted),
            wanted_at=wanted.ctypes.data,
            logits=logits.data_ptr(),
            experts=experts.ctypes.data,
            threads=torch.get_num_threads(),
        )
        getattr(self.library, f"run_{self.kind}")(self.handle, byref(call))
        return ModelOutput(logits, torch.from_numpy(experts[wanted]))

    def copy(self, source: int, targets: Sequence[int], count: int) -> None:
        self.slots[:, targets, :count] = self.slots[:, source, None, :count]

    # --- the model as the library wants it ---

    def _describe(self, model: Transformer, rows: int, length: int, longest: int) -> Model:
        c = self.config
        cosine, sine = rotary_table(torch.arange(length), c.qk_rope_head_dim, c.rope_theta)
        blocks = self._array(BlockWeights, [self._block(block) for block in model.trunk.blocks])
        embed = model.trunk.embed.weight.detach().to(self.dtype, copy=True)
        head = self._matrix(model.head.weight)
        return Model(
            **{name: value for name, value in asdict(c).items() if hasattr(Model, name)},
            widest=max(c.d_ff, c.n_shared_experts * c.d_expert),
            rows=rows,
            slots=length,
            max_tokens=longest,
            rank=self.rank,
            scale=c.qk_head_dim**-0.5,
            embed=self._at(embed),
            cosine=self._at(cosine),
            sine=self._at(sine),
            norm=self._numbers(model.trunk.norm.weight),
            head=head,
            blocks=blocks,
            cache=self.slots.data_ptr(),
        )

    def _block(self, block: Any) -> BlockWeights:
        attention, ffn = block.attention, block.ffn
        lows = attention.q_a_proj.weight, attention.kv_a_proj.weight
        low_pairs = [stacked(both, lows) for both in zip(*map(self._pairs, lows), strict=True)]
        dense = ffn.shared if isinstance(ffn, MoE) else ffn
        record = BlockWeights(
            attention_norm=self._numbers(block.attention_norm.weight),
            q_norm=self._numbers(attention.q_a_norm.weight),
            kv_norm=self._numbers(attention.kv_a_norm.weight),
            ffn_norm=self._numbers(block.ffn_norm.weight),
            low=self._matrix(torch.cat(lows), low_pairs, is_wide=True),
            q_up=self._matrix(attention.q_b_proj.weight),
            **self._per_head(attention),
            out=self._matrix(attention.o_proj.weight),
            gate=self._matrix(dense.gate_proj.weight),
            up=self._matrix(dense.up_proj.weight),
            down=self._matrix(dense.down_proj.weight),
        )
        if isinstance(ffn, MoE):
            stacks = ffn.experts.gate_proj, ffn.experts.up_proj, ffn.experts.down_proj
            matrices = [  # gate, up, down of each expert
                self._matrix(stack[expert], self._pairs(stack, expert))
                for expert in range(self.config.n_routed_experts)
                for stack in stacks
            ]
            record.is_moe, record.experts = 1, self._array(Matrix, matrices)
            record.centroids = self._numbers(ffn.centroids)
            record.balance_bias = self._numbers(ffn.balance_bias)
        return record

    def _per_head(self, attention: LatentAttention) -> dict[str, Matrix]:
        """W_uk both ways and W_uv, head after head; each head begins a panel of its own."""
        c = self.config
        up = attention.kv_b_proj.weight.unflatten(0, (c.n_heads, -1))  # (H, N + V, C)
        w_uk, w_uv = up.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        heads = {"key_up": w_uk.transpose(1, 2), "key_down": w_uk, "value_up": w_uv}  # (H, outputs, inputs)
        pairs = [per_head(pair, c) for pair in self._pairs(attention.kv_b_proj.weight)]
        return {
            name: self._matrix(
                F.pad(part, (0, 0, 0, -part.shape[1] % PANEL)).flatten(0, 1),
                [each.get(name) for each in pairs],
                is_wide=True,
            )
            for name, part in heads.items()
        }

    def _pairs(self, weight: Tensor, expert: int | None = None) -> list[Pair | None]:
        """What each adapter has for this parameter, or for one expert of it."""
        own = [each.get(id(weight)) for each in self.adapters]
        return own if expert is None else [pair and (pair[0][expert], pair[1][expert]) for pair in own]

    def _matrix(self, weight: Tensor, pairs: Sequence[Pair | None] | None = None, *, is_wide: bool = False) -> Matrix:
        """A weight (outputs, inputs) in panels, with these pairs (None: those of this parameter). is_wide: not int4."""
        outputs, inputs = weight.shape
        pairs = self._pairs(weight) if pairs is None else pairs
        records = [self._pair(*pair) if pair else PairWeights() for pair in pairs] if any(pairs) else None
        beside = records and self._array(PairWeights, records)
        padded, scales, is_int4 = F.pad(weight.detach(), (0, 0, 0, -outputs % PANEL)), None, False
        if self.quantize == "int8":
            scale = padded.float().abs().amax(1).clamp(min=1e-12) / 127
            packed = panels((padded.float() / scale[:, None]).round().to(torch.int8), 2)
            scales = self._at(scale)
        elif is_int4 := self.quantize == "int4" and not is_wide:
            packed = int4_panels(padded)
        else:
            packed = panels(padded.to(self.dtype), self.together)
        self.bytes_of_matrices.append((packed.nbytes, padded.numel()))
        return Matrix(self._at(packed), scales, outputs, inputs, is_int4, beside)

    def _pair(self, a: Tensor, b: Tensor) -> PairWeights:
        """A and B in panels, of one matrix or of heads."""
        a, b = (each if each.dim() == 3 else each[None] for each in (a, b))
        b = F.pad(b, (0, a.shape[1] % 2, 0, -b.shape[1] % PANEL))
        a = F.pad(a, (0, 0, 0, -a.shape[1] % PANEL))
        self.rank = max(self.rank, a.shape[1])
        places = [self._at(panels(each.to(self.dtype).flatten(0, 1), self.together)) for each in (a, b)]
        return PairWeights(*places, b.shape[2], *(each[0].numel() if len(each) > 1 else 0 for each in (a, b)))

    def _array(self, kind: type[ctypes.Structure], records: Sequence[ctypes.Structure]) -> int:
        self.kept.append((kind * len(records))(*records))
        return ctypes.addressof(self.kept[-1])

    def _numbers(self, values: Tensor) -> int:
        return self._at(values.detach().to(torch.float32, copy=True))

    def _at(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as this runner."""
        self.kept.append(tensor.clone() if tensor.data_ptr() % 64 else tensor)
        return int(self.kept[-1].data_ptr())


def panels(weight: Tensor, together: int) -> Tensor:
    """(outputs, inputs) to (outputs / 32, inputs / together, 32, together): neighbouring inputs stay together."""
    outputs, inputs = weight.shape
    return weight.view(outputs // PANEL, PANEL, inputs // together, together).transpose(1, 2).contiguous()


def int4_panels(weight: Tensor) -> Tensor:
    """(outputs, inputs) to (outputs / 32, inputs / 32, 576) bytes: pairs of numbers, then the scales of the outputs."""
    numbers, scales = int4.quantize(weight)
    outputs, inputs = numbers.shape
    low, high = numbers.view(outputs // PANEL, 2, PANEL // 2, inputs // 2, 2).transpose(2, 3).unbind(1)
    both = (low | high << 4).reshape(outputs // PANEL, inputs // int4.GROUP, -1)
    scales = scales.view(outputs // PANEL, PANEL, -1).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat((both, scales), dim=-1)


@cache
def library() -> ctypes.CDLL:
    """decoding.cpp, compiled for this processor; NoCompilerError with the reason where that fails."""
    loaded = build.load(SOURCE, OPTIONS)
    for kind in ("float", "bf16"):
        getattr(loaded, f"open_{kind}").restype, getattr(loaded, f"open_{kind}").argtypes = c_void_p, [POINTER(Model)]
        getattr(loaded, f"run_{kind}").argtypes = [c_void_p, POINTER(Pass)]
        getattr(loaded, f"close_{kind}").argtypes = [c_void_p]
    loaded.draw.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_float, *[c_void_p] * 4, c_int64]
    return loaded


@cache
def can_draw() -> bool:
    """Whether `draw` can be compiled."""
    try:
        library()
    except build.NoCompilerError:
        return False
    return True


def draw(
    logits: Tensor, temperature: float, numbers: Tensor, places: Sequence[int], allowed: Bits | None = None
) -> tuple[Tensor, Tensor]:
    """What `sampling.sample` gives without filters and shifts, in one pass instead of six.

    logits (W, V) float32 on the CPU, places: B of its rows; numbers (B,) float32 in [0, 1), allowed (B, V / 8 rounded
    up to 8 bytes). Returns ids (B,) int64 and their log-probabilities (B,) float32. A row's answer depends on that row
    alone. ValueError for logits that are no numbers.
    """
    logits, numbers = logits.contiguous(), numbers.contiguous()
    rows, vocab_size, numbered = len(places), logits.shape[1], np.array(places, dtype=np.int64)
    ids, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    library().draw(
        logits.data_ptr(),
        numbered.ctypes.data,
        rows,
        vocab_size,
        temperature,
        numbers.data_ptr(),
        None if allowed is None else allowed.ctypes.data,
        ids.data_ptr(),
        logprobs.data_ptr(),
        min(rows, torch.get_num_threads()),
    )
    if (ids < 0).any():
        raise ValueError(
            "the model's logits are not numbers; its weights may have run away in training, take an older one"
        )
    return ids, logprobs
