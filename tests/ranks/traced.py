"""`nanollm VERB ...` that also writes down which rows each step read: rows-RANK.jsonl in the folder of --out.

Started by torchrun or alone: python -m tests.ranks.traced pretrain --out FOLDER ...
"""

import json
import os
import sys
from hashlib import blake2b
from pathlib import Path

from nanollm.cli import main
from nanollm.data.batches import Batch, Windows

untraced = Windows.micro_batches


def micro_batches(self, step, batch_size, micro_batch_size, *, rank=0, world=1) -> list[Batch]:
    batches = untraced(self, step, batch_size, micro_batch_size, rank=rank, world=world)
    digests = [blake2b(batch.tokens.numpy().tobytes(), digest_size=8).hexdigest() for batch in batches]
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    with (out / f"rows-{rank}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "world": world, "batches": digests}) + "\n")
    return batches


def read_rows(out: Path) -> dict[int, list[str]]:
    """What each step read, over all ranks, in its global order: micro-batch m of rank r is slice m * world + r.

    A step that was taken again, after a kill, counts as it was taken last.
    """
    by_rank = {}
    for file in sorted(out.glob("rows-*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            by_rank[int(file.stem[5:]), row["step"]] = row
    rows = {}
    for step in sorted({step for _, step in by_rank}):
        world = by_rank[0, step]["world"]
        parts = [by_rank[rank, step]["batches"] for rank in range(world)]
        rows[step] = [digest for together in zip(*parts, strict=True) for digest in together]
    return rows


if __name__ == "__main__":
    Windows.micro_batches = micro_batches
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
