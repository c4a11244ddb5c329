"""Functions called in several processes at once, each a rank of one World: what torchrun does, for a test."""

import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from nanollm.world import World

# Ranks are forked from a process that has imported what their functions need, which takes seconds.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
multiprocessing.set_forkserver_preload(["tests.ranks.test_grpo", "tests.rl.promises"])


def together(size: int, function: Callable[..., Any], *arguments: Any, **of_world: str) -> list[Any]:
    """What `function(world, *arguments)` returns on each rank; it must be one that another process can import."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        given = (size, port, Path(folder), function, arguments, {"device": "cpu", **of_world})
        start_processes(_rank, given, nprocs=size, start_method=START)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]


def _rank(
    rank: int,
    size: int,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    of_world: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with World.join(**of_world) as world:
        value = function(world, *arguments)
    (folder / str(rank)).write_bytes(pickle.dumps(value))
