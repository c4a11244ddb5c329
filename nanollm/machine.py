"""What of this machine would slow a run down or end it, and what helps?

Looking and judging are apart: a judge_ function is given plain values, and says what they mean for a run.
"""

import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch

from nanollm.durable import lock_folder, new_folder, sync

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
RELEASED = 2026  # a clock that shows an earlier year is wrong
GB = 1e9
EXTRAS = ("data", "serve", "eval", "export")


@dataclass(frozen=True)
class Finding:
    """What one check found; `warn`: runs work, but badly or not all of them; `FAIL`: they do not work."""

    name: str
    level: Literal["ok", "warn", "FAIL"]
    text: str
    advice: str = ""


# --- Python, torch, what computes ---


def judge_python(version: Sequence[int]) -> Finding:
    said = ".".join(map(str, version))
    if tuple(version[:2]) < OLDEST_PYTHON:
        return Finding("python", "FAIL", f"{said} is too old", "install Python 3.11 or newer; make setup finds it")
    return Finding("python", "ok", said)


def judge_torch(version: str, build: str | None, *, is_used: bool, has_gpu: bool, hidden: bool) -> Finding:
    """build: the CUDA or ROCm it is made for; is_used: torch computes on a GPU; hidden: the environment hides GPUs."""
    said = f"{version}, {f'for {build}' if build else 'for CPUs'}"
    if numbers(version) < OLDEST_TORCH:
        return Finding("torch", "FAIL", f"{said} is too old", 'pip install --upgrade "torch>=2.11"')
    if is_used or not has_gpu or hidden:
        return Finding("torch", "ok", said + (", CUDA_VISIBLE_DEVICES hides the GPUs" if has_gpu and hidden else ""))
    if build:
        why = "its driver may be older than that: compare nvidia-smi, and update the driver or install another build"
        return Finding("torch", "warn", f"{said}, cannot use the NVIDIA GPU that is here", why)
    why = "install a build for CUDA: https://pytorch.org/get-started/locally"
    return Finding("torch", "warn", f"{said}, but there is an NVIDIA GPU", why)


def has_nvidia_gpu() -> bool:
    """Whether the driver is there, whatever torch can do with it."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def judge_device(device: str, dtype: str, rates: dict[str, float]) -> Finding:
    """rates: GFLOP/s of matrix products by type; 0 where the device cannot. dtype: what runs choose by themselves."""
    measured = ", ".join(f"{name} {rate:,.0f} GFLOP/s" if rate else f"no {name}" for name, rate in rates.items())
    said = f"{device} in {dtype}; {measured}"
    if not rates[dtype]:
        return Finding("device", "FAIL", f"{said}: this device cannot multiply in {dtype}", "take --dtype float32")
    if rates[dtype] < rates["float32"]:
        return Finding("device", "warn", f"{said}: {dtype} is the slower one here", "take --dtype float32")
    return Finding("device", "ok", said)


def measure_gemm(device: torch.device, dtype: torch.dtype, limit_s: float = 0.25) -> float:
    """GFLOP/s of the fastest matrix product of some; 0 where the device has none in this type."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.ones(size, size, dtype=dtype, device=device)
    try:
        (a @ a)[0, 0].item()  # the first one is slow; item waits for the device
    except (RuntimeError, TypeError):
        return 0.0
    least, end = math.inf, time.perf_counter() + limit_s
    while (started := time.perf_counter()) < end:
        (a @ a)[0, 0].item()
        least = min(least, time.perf_counter() - started)
    return 2 * size**3 / least / 1e9


def judge_gpus(gpus: Sequence[tuple[str, int, int]], shared: int | None) -> Finding:
    """gpus: name, free and all bytes of each; shared: all bytes of /dev/shm, which NCCL needs from two GPUs on."""
    said = ", ".join(f"{name} with {free / GB:.1f} of {total / GB:.1f} GB free" for name, free, total in gpus)
    if any(free < total / 2 for _, free, total in gpus):
        return Finding("gpu", "warn", said, "another program holds the rest: nvidia-smi names it")
    if len(gpus) > 1 and shared is not None and shared < GB:
        advice = "NCCL may fail between GPUs: start the container with --shm-size 1g"
        return Finding("gpu", "warn", f"{said}; /dev/shm has {shared / 1e6:,.0f} MB", advice)
    return Finding("gpu", "ok", said)


def judge_threads(threads: int, cores: int, usable: int, quota: float | None, asked: str | None) -> Finding:
    """cores: of the machine; usable: those this process may run on; quota: cores' worth of time that its container
    gets; asked: OMP_NUM_THREADS."""
    most = usable if quota is None else max(1, min(usable, round(quota)))
    said = f"{threads} thread{'s' * (threads != 1)} on {most} of {cores} core{'s' * (cores != 1)}"
    if quota is not None and quota < usable:
        said += " (a container's quota)"
    by = f" instead of {asked}" if asked else ""
    if threads > most:
        advice = f"set OMP_NUM_THREADS={most}{by}: threads that wait for a core cost more than they bring"
        return Finding("threads", "warn", said, advice)
    if 2 * threads < most:
        return Finding("threads", "warn", said, f"set OMP_NUM_THREADS={most}{by} to use the others")
    return Finding("threads", "ok", said)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that control groups give this process; None: no limit."""
    quotas = [path.read_text().split() for path in _limits(root, "cpu", "cpu.max")]
    for path in _limits(root, "cpu", "cpu.cfs_quota_us"):
        quotas.append([path.read_text().strip(), path.with_name("cpu.cfs_period_us").read_text().strip()])
    shares = [int(quota) / int(period) for quota, period in quotas if quota not in ("max", "-1")]
    return min(shares, default=None)


def memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes that are free and in all, for this process within its control groups; None where Linux does not tell."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines()}
    free, total = known["MemAvailable"], known["MemTotal"]
    for limit, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for path in _limits(root, "memory", limit):
            given, taken = path.read_text().strip(), path.with_name(used)
            if given != "max" and taken.is_file():
                stat = dict(line.split() for line in path.with_name("memory.stat").read_text().splitlines())
                in_use = int(taken.read_text()) - int(stat.get(idle, 0))  # cached files make room when asked
                free, total = min(free, int(given) - in_use), min(total, int(given))
    return free, total


def _limits(root: Path, controller: str, name: str) -> Iterator[Path]:
    """Files of a limit in the control groups (version 1 or 2) that this process is in, and in those around them."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be the host's; what is mounted at the root is then the container's own group.
        group = mount / path.lstrip("/")
        around = [group, *group.parents]
        folders = around[: around.index(mount) + 1] if mount in around else [mount]
        yield from (folder / name for folder in folders if (folder / name).is_file())


def judge_memory(free: int, total: int) -> Finding:
    said = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    if free < 2 * GB:
        advice = "end other programs; nanollm info MODEL says what a training step takes"
        return Finding("memory", "warn", said, advice)
    return Finding("memory", "ok", said)


# --- disk, files, clock ---


def judge_disk(free: int, needed: int) -> Finding:
    """needed: bytes that the checkpoints of a run of nano-327m take."""
    said = f"{free / GB:,.1f} GB free; checkpoints of nano-327m take {needed / GB:.1f} GB"
    if free < 0.5 * GB:
        return Finding("disk", "FAIL", said, "make room, or take another disk: --out decides where a run is kept")
    if free < 10 * GB:
        return Finding("disk", "warn", said, "make room, or keep large runs on another disk (--out)")
    return Finding("disk", "ok", said)


def judge_writing(written: int, seconds: float, checkpoint: int) -> Finding:
    """checkpoint: bytes of one of nano-327m."""
    rate = written / seconds
    said = f"{rate / 1e6:,.0f} MB/s to the disk itself ({written / 1e6:,.0f} MB)"
    if rate < 30e6:
        waits = f"a checkpoint of nano-327m would take {checkpoint / rate:,.0f} s"
        return Finding("writing", "warn", said, f"{waits}: take a faster disk (--out), or save less often")
    return Finding("writing", "ok", said)


def measure_writing(folder: Path, most: int, limit_s: float = 2.0) -> tuple[int, float]:
    """Bytes written and waited for until they were on the disk, and the seconds that took."""
    portion, written, started = os.urandom(8_000_000), 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        while not written or (written + len(portion) <= most and time.perf_counter() - started < limit_s):
            written += file.write(portion)
            file.flush()
            os.fsync(file.fileno())
    return written, time.perf_counter() - started


def judge_files(problem: str) -> Finding:
    if problem:
        advice = "keep runs on another file system (--out), a local disk for example"
        return Finding("files", "FAIL", problem, advice)
    return Finding("files", "ok", "can be locked; folders take each other's place in one moment")


def try_files(folder: Path) -> str:
    """What does not work of what every run does with its folder; empty if all does."""
    try:
        with lock_folder(folder / "locked"):
            if not _is_locked(folder / "locked"):
                return "a lock keeps nobody out here: two processes could write the same run"
        for content in ("old", "new"):
            with new_folder(folder / "replaced") as draft:
                (draft / "file").write_text(content)
        found = (folder / "replaced" / "file").read_text()
        return "" if found == "new" else "a folder that was replaced still shows its old content"
    except OSError as error:
        return f"folders cannot be locked, or replaced: {error.strerror or error}"


def _is_locked(folder: Path) -> bool:
    try:
        with lock_folder(folder):
            return False
    except ValueError:
        return True


def judge_clock(now: float, stamped: float, ticks: tuple[float, float]) -> Finding:
    """now: seconds since 1970; stamped: what the file system wrote down just then; ticks: two times, one after the
    other, of the clock that never goes back."""
    said, advice = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)), "set the clock (timedatectl set-ntp true)"
    if time.gmtime(now).tm_year < RELEASED:
        return Finding("clock", "warn", f"{said} is in the past", f"{advice}: certificates of the hub will not hold")
    if ticks[1] < ticks[0]:
        advice = "restart the machine: what is timed cannot be trusted"
        return Finding("clock", "FAIL", f"{said}, but the monotonic clock goes back", advice)
    if abs(skew := stamped - now) > 2:
        where = f"files are dated {abs(skew):,.0f} s {'later' if skew > 0 else 'earlier'}"
        return Finding("clock", "warn", f"{said}, but {where}", "set the clocks of this machine and its file server")
    return Finding("clock", "ok", said)


def read_clocks(folder: Path) -> tuple[float, float, tuple[float, float]]:
    """What judge_clock is asked."""
    first, probe = time.monotonic(), folder / "dated"
    probe.write_bytes(b"now")
    sync(probe)
    return time.time(), probe.stat().st_mtime, (first, time.monotonic())


def judge_open_files(limit: int) -> Finding:
    said = "any number" if limit < 0 or limit > 10**9 else f"{limit:,} at most"
    if 0 <= limit < 1024:
        return Finding("open files", "warn", said, "ulimit -n 4096, or a server with many clients stops")
    return Finding("open files", "ok", said)


def open_files_limit() -> int | None:
    """How many files this process may have open, below 0: any number; None where nobody says."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# --- what others provide: compiler, packages, hub ---


@dataclass(frozen=True)
class Need:
    """A package that nanollm asks for."""

    extra: str  # whom it serves; empty: everything
    package: str
    least: str
    version: str | None  # that is installed

    @property
    def is_old(self) -> bool:
        return self.version is not None and numbers(self.version) < numbers(self.least)


def judge_compiler(command: Sequence[str], problem: str, seconds: float) -> Finding:
    """problem: why C++ could not be compiled or loaded, empty if it could."""
    if problem:
        said = "C++ cannot be compiled: text is spelled and tokens are decoded several times slower on this CPU"
        return Finding("compiler", "warn", said, problem)
    return Finding("compiler", "ok", f"{' '.join(command)} made and loaded our C++ in {seconds:.1f} s")


def judge_packages(needs: Sequence[Need] | None) -> Finding:
    """needs: None where nanollm was not installed, so that nobody knows what it needs."""
    if needs is None:
        advice = "make setup, or pip install -e . in its folder"
        return Finding("packages", "warn", "unknown: nanollm runs without being installed", advice)
    broken = [need for need in needs if need.is_old or not (need.extra or need.version)]
    if broken:
        faults = {need.package: f"{need.version} (too old)" if need.version else "(missing)" for need in broken}
        said = ", ".join(f"{package} {fault}" for package, fault in faults.items())
        advice = "pip install " + " ".join(f'"{need.package}>={need.least}"' for need in broken)
        return Finding("packages", "warn" if all(need.extra for need in broken) else "FAIL", said, advice)
    lacking = dict.fromkeys(need.extra for need in needs if not need.version)
    there = ", ".join(extra for extra in EXTRAS if extra not in lacking)
    said = f"all that is needed, and for {there or 'nothing more'}"
    if lacking:
        said += f'; pip install "nanollm[{",".join(lacking)}]" adds the others'
    return Finding("packages", "ok", said)


def read_needs(requirements: Sequence[str], version_of: Callable[[str], str | None]) -> list[Need]:
    """requirements as package metadata writes them; version_of: what is installed of a package."""
    needs = []
    for line in requirements:
        package, marker = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](\w+)", line)
        least, extra = re.search(r">=([\d.]+)", line), marker[1] if marker else ""
        if package and least and extra in ("", *EXTRAS):
            needs.append(Need(extra, package[0], least[1], version_of(package[0])))
    return needs


def installed_needs() -> list[Need] | None:
    """What nanollm asked for when it was installed; None if it was not."""
    try:
        return read_needs(metadata.requires("nanollm") or [], installed_version)
    except metadata.PackageNotFoundError:
        return None


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def judge_hub(endpoint: str, answer: float | str) -> Finding:
    """answer: seconds, or what went wrong."""
    host = urlsplit(endpoint).hostname or "HF_ENDPOINT"  # never all of it: it may hold a password
    if isinstance(answer, str):
        advice = "what reads the hub will fail, files work; HF_ENDPOINT names a mirror, --offline skips this check"
        return Finding("hub", "warn", f"{host} cannot be reached: {answer}", advice)
    return Finding("hub", "ok", f"{host} answers in {answer:.2f} s")


def ask_hub(endpoint: str, limit_s: float = 3.0) -> float | str:
    """Seconds until the hub answers, or what went wrong; whatever happens, hardly more than limit_s."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https"):
        return "HF_ENDPOINT must begin with https://"
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # a password would be in its messages
    answers: list[float | str] = []
    # A thread, because no time limit of a socket holds for the look-up of a name.
    asking = threading.Thread(target=lambda: answers.append(_ask(address, limit_s + 1)), daemon=True)
    asking.start()
    asking.join(limit_s)
    return answers[0] if answers else f"no answer within {limit_s:g} s"


def _ask(address: str, timeout_s: float) -> float | str:
    started = time.perf_counter()
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500 or error.code in (403, 407):  # that is a proxy's answer
            return f"it says {error.code} {error.reason}"
    except (OSError, ValueError, HTTPException) as error:
        return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    return time.perf_counter() - started


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: 2.13.0+cpu is (2, 13), as 2.13 is."""
    found = re.match(r"\d+(\.\d+)*?(?=(\.0+)*(?!\.?\d))", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
