"""Ranks, device, compute type and device mesh of this process, and the collectives over them.

Ranks and devices are a value that is passed down; nothing below asks the environment. The work is done by PyTorch:
torchrun starts the processes, gloo and NCCL carry their messages, FSDP2 (`fully_shard`) keeps the model in parts. How
it does that is the shape of a mesh of ranks, (copies of the model, parts of each copy):

    ddp   (N, 1)        every rank holds everything
    fsdp  (N,)          every rank holds 1/N
    hsdp  (hosts, N/hosts)   every host holds everything, each of its ranks a part
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import DistError, ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from nanollm.heartbeat import FAR_S, MEETING_AGAIN_S, MEETING_S, Heartbeat, meet
from nanollm.progress import set_quiet
from nanollm.threads import watch_cores

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
ParallelName = Literal["ddp", "fsdp", "hsdp"]

LOST = r"Connection (closed|reset)|timed out connecting|Broken pipe|gloo.*(Timed out|failed)"
"""How gloo says, in a RuntimeError, that another process is not there any more."""

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    """What the model computes in; master weights are always float32."""
    mesh: DeviceMesh | None = None
    """All ranks, as (copies of the model, parts of each) or (parts,); None: one process."""
    saving: ProcessGroup | None = None
    """All ranks once more, for what happens beside training."""

    @classmethod
    def start(cls, device: DeviceName = "auto", dtype: DtypeName = "auto") -> "World":
        """Choose device and compute type for one process. Raises ValueError for what this machine does not have."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise ValueError(
                f"this works in one process, got {processes} from torchrun; run the command without torchrun"
            )
        watch_cores()
        chosen = _choose_device(device)
        return cls(device=chosen, dtype=choose_dtype(dtype, chosen))

    @classmethod
    @contextmanager
    def join(
        cls, device: DeviceName = "auto", dtype: DtypeName = "auto", parallel: ParallelName = "ddp"
    ) -> Iterator["World"]:
        """The processes that torchrun started, if it did; else one process, as `start` makes it.

        Raises ConnectionError where another process went away, and ends this one where another has fallen silent.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls.start(device, dtype)
            return
        chosen = _device_of_this_rank(device)
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=MEETING_S)))
        set_quiet(rank > 0)
        is_first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        namespace = meet(store, rank, size, limit_s=MEETING_S if is_first_attempt else MEETING_AGAIN_S)
        heartbeat = Heartbeat(PrefixStore("heartbeat", namespace.clone()), rank, size)  # type: ignore[attr-defined]
        with _in_one_line(rank, size), heartbeat:
            # Time limits are the heartbeat's matter: a rank may be slow, but not silent.
            no_limit = timedelta(seconds=FAR_S)
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                store=PrefixStore("groups", namespace),
                rank=rank,
                world_size=size,
                timeout=no_limit,
                device_id=chosen if chosen.type == "cuda" else None,
            )
            world = cls(rank=rank, size=size, device=chosen, dtype=choose_dtype(dtype, chosen))
            shape, dimensions = _mesh_shape(size, parallel)
            world.check_same("device, dtype and mesh", f"{world.names} --parallel {parallel} {shape}")
            mesh = init_device_mesh(chosen.type, shape, mesh_dim_names=dimensions)
            for group in mesh.get_all_groups():
                _set_pg_timeout(no_limit, group)
            yield replace(world, mesh=mesh, saving=distributed.new_group(backend="gloo", timeout=no_limit))
            world.barrier()
            heartbeat.stop()
            distributed.destroy_process_group()

    @property
    def names(self) -> dict[str, str]:
        """What is really used, as the words of a configuration."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """How often the model is held, in whole or in parts, by all ranks together."""
        return self.mesh.size(0) if self.mesh is not None and self.mesh.ndim == 2 else 1

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all of the model."""
        return self.replicas == self.size

    def all_reduce_sum(self, number: float) -> float:
        """The sum of a number over all ranks."""
        return self._all_reduce(number, distributed.ReduceOp.SUM)

    def all_reduce_max(self, number: float) -> float:
        """The largest of all ranks' numbers."""
        return self._all_reduce(number, distributed.ReduceOp.MAX)

    def _all_reduce(self, number: float, how: distributed.ReduceOp.RedOpType) -> float:
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)  # on the CPU: no wait for a GPU
        distributed.all_reduce(tensor, how)
        return tensor.item()

    def all_reduce_(self, tensors: Iterable[Tensor]) -> None:
        """Put in place of each tensor its sum over all ranks."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def global_norm(self, of_own_part: Tensor) -> Tensor:
        """The norm () of a vector of which each rank knows that of its part; all ranks get the same bits."""
        if self.size == 1:
            return of_own_part
        squares = of_own_part.double().square()
        distributed.all_reduce(squares)
        return (squares / self.replicas).sqrt().to(of_own_part.dtype)

    def all_gather(self, value: Value) -> list[Value]:
        """Everybody's value, by rank, on every rank. It is pickled on the way between processes of one job."""
        if self.size == 1:
            return [value]
        values: list[Value | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast(self, value: Value) -> Value:
        """The main rank's value, on every rank; the others' are ignored."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def shard(self, values: Iterable[Value]) -> Iterator[Value]:
        """Every size-th of some values: a rank's share of work of which all know the whole."""
        return islice(values, self.rank, None, self.size)

    def barrier(self) -> None:
        """Until every rank is here."""
        self.all_reduce_sum(0.0)

    def check_same(self, what: str, value: object) -> None:
        """Raises ValueError unless all ranks say the same."""
        values = self.all_gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"all ranks need the same {what}: rank 0 has {values[0]}, rank {rank} has {other}; start every "
                    f"host with the same command"
                )

    def fully_shard(self, root: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Keep the float32 parameters of `root` as this mesh says; `parts` of it are gathered one at a time.

        While `root` or one of the parts is called, its parameters are whole and in the compute type. Gradients are
        added up over all ranks, never averaged, in float32 at least.
        """
        # Late: half a second that one process need not wait for.
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        assert self.mesh is not None
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype,
            reduce_dtype=torch.promote_types(self.dtype, torch.float32),
            cast_forward_inputs=False,
        )
        parts_per_copy = self.size // self.replicas
        for module in [*parts, root]:
            fully_shard(
                module,
                mesh=self.mesh,
                mp_policy=policy,
                reshard_after_forward=not self.is_replicated and module is not root,
                shard_placement_fn=lambda parameter: _placement(parameter, parts_per_copy),
            )
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)


def _placement(parameter: nn.Parameter, parts: int) -> "Shard | None":
    """Along which dimension a parameter is cut: the first, unless a stack has fewer matrices than there are parts."""
    from torch.distributed.tensor import Shard

    if parameter.dim() > 2 and parameter.shape[0] < parts and parameter.shape[1] % parts == 0:
        return Shard(1)
    return None


def _mesh_shape(size: int, parallel: ParallelName) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The shape of the mesh and the names of its dimensions."""
    if parallel == "ddp":
        return (size, 1), ("copy", "part")
    if parallel == "fsdp":
        return (size,), ("part",)
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size % per_host:
        raise ValueError(f"hsdp needs as many processes on every host, got {size} in all and {per_host} on this one")
    return (size // per_host, per_host), ("copy", "part")


@contextmanager
def _in_one_line(rank: int, size: int) -> Iterator[None]:
    """Say in one line that another process went away, instead of what each library makes of it."""
    try:
        yield
    except RuntimeError as error:
        lost = re.search(LOST, str(error))
        if lost is None and not isinstance(error, DistError):
            raise
        reason = lost[0] if lost else (str(error).splitlines() or ["no message"])[0][:200]
        raise ConnectionError(
            f"rank {rank} of {size} ends because another process of the job went away ({reason}); its own message says "
            f"why, if it could leave one. Started again, the job goes on from its last checkpoint"
        ) from error


def _choose_device(name: DeviceName) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in available.items() if is_there))
    if not available[name]:
        found = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise ValueError(f"device {name} was asked for, this machine has: {found}; choose one of these or auto")
    return torch.device(name)


def _device_of_this_rank(name: DeviceName) -> torch.device:
    """Its own GPU on this host, or the CPU."""
    chosen = _choose_device(name)
    if chosen.type == "mps":
        if name == "mps":
            raise ValueError("MPS serves one process; run the command without torchrun, or take --device cpu")
        return torch.device("cpu")
    if chosen.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"this host has {there} GPUs, torchrun started more processes; take --nproc-per-node {there}"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    return chosen


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it fast, float16 on older CUDA devices, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        multiplies_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if multiplies_bfloat16 else torch.float32
    return torch.float32
