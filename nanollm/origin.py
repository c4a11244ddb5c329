"""Says which code on which machine made a figure: what somebody needs to repeat it."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def commit(root: Path = ROOT) -> str | None:
    """The commit of this code, with + if the files differ from it; None where it is no checkout."""
    if not (root / ".git").exists():
        return None  # an installed package: a checkout around it would be somebody else's
    describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(describe, check=False, capture_output=True, text=True, cwd=root, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # there is no git, or a disk that does not answer
        return None
    return done.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """The processor's name and cores, the threads that PyTorch uses, and the first GPU, if there is one."""
    import torch  # late: workers of the benchmarks ask for the commit only, and would wait for it

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
