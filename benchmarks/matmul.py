"""What does this machine multiply per second?  A large product in the compute type of training, beside float32.

1024 x 1024 matrices, twenty products each time: the limit of everything else.
"""

import argparse
from functools import partial
from typing import Any

from benchmarks.measuring import in_turns, read_roof, seconds

SIZE, PRODUCTS = 1024, 20


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from nanollm.world import World

    world = World.start()

    def speed(dtype: torch.dtype) -> float:
        a = torch.ones(SIZE, SIZE, device=world.device, dtype=dtype)

        def work() -> None:
            product = a
            for _ in range(PRODUCTS):
                product = a @ a
            product[0, 0].item()  # waits for the device

        work()
        return PRODUCTS * 2 * SIZE**3 / 1e9 / seconds(work)

    dtypes = {"float32": torch.float32, str(world.dtype).removeprefix("torch."): world.dtype}
    compared = in_turns({name: partial(speed, dtype) for name, dtype in dtypes.items()}, options.repeats)
    return {"unit": "GFLOP/s", **compared, "roof": {"read_gb_per_s": read_roof()}}
