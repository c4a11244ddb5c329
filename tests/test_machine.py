"""What is said of a machine whose numbers are known, and whether the numbers of this one are read right."""

import importlib.metadata
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from nanollm import durable, machine
from nanollm.machine import Finding

GB, MB = 10**9, 10**6
NEED = machine.Need("", "numpy", "2.0", "2.1.0")


def said(finding: Finding) -> tuple[str, str, str]:
    return finding.level, finding.text, finding.advice


# Judgements


@pytest.mark.parametrize(
    ("version", "level", "text", "advice"),
    [
        ((3, 11, 0), "ok", "3.11.0", ""),
        ((3, 10, 12), "FAIL", "3.10.12 is too old", "install Python 3.11 or newer; make setup finds it"),
    ],
)
def test_an_old_python_is_named(version, level, text, advice):
    assert said(machine.judge_python(version)) == (level, text, advice)


@pytest.mark.parametrize(
    ("version", "build", "state", "level", "text", "advice"),
    [
        ("2.13.0+cpu", None, {}, "ok", "2.13.0+cpu, for CPUs", ""),
        ("2.11.0+cu130", "CUDA 13.0", {"has_gpu", "is_used"}, "ok", "2.11.0+cu130, for CUDA 13.0", ""),
        ("2.9.1", None, {}, "FAIL", "2.9.1, for CPUs is too old", 'pip install --upgrade "torch>=2.11"'),
        (
            "2.13.0+cpu",
            None,
            {"has_gpu"},
            "warn",
            "2.13.0+cpu, for CPUs, but there is an NVIDIA GPU",
            "install a build",
        ),
        ("2.13.0", "CUDA 13.0", {"has_gpu"}, "warn", "2.13.0, for CUDA 13.0, cannot use the NVIDIA GPU", "nvidia-smi"),
        ("2.13.0", "CUDA 13.0", {"has_gpu", "hidden"}, "ok", "CUDA_VISIBLE_DEVICES hides the GPUs", ""),
    ],
)
def test_a_torch_that_is_old_or_cannot_use_the_gpu_is_named(version, build, state, level, text, advice):
    flags = {name: name in state for name in ("is_used", "has_gpu", "hidden")}
    finding = machine.judge_torch(version, build, **flags)
    assert finding.level == level
    assert text in finding.text
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("dtype", "rates", "level", "text"),
    [
        ("bfloat16", {"float32": 100.0, "bfloat16": 400.0}, "ok", "cpu in bfloat16; float32 100 GFLOP/s, bfloat16 400"),
        ("float32", {"float32": 100.0, "bfloat16": 4.0}, "ok", "cpu in float32;"),
        ("bfloat16", {"float32": 100.0, "bfloat16": 40.0}, "warn", "bfloat16 is the slower one here"),
        (
            "bfloat16",
            {"float32": 100.0, "bfloat16": 0.0},
            "FAIL",
            "no bfloat16: this device cannot multiply in bfloat16",
        ),
    ],
)
def test_a_type_that_is_slower_than_float32_is_named(dtype, rates, level, text):
    finding = machine.judge_device("cpu", dtype, rates)
    assert finding.level == level
    assert text in finding.text
    assert finding.advice == ("" if level == "ok" else "take --dtype float32")


@pytest.mark.parametrize(
    ("gpus", "shared", "level", "text", "advice"),
    [
        ([("H200", 149 * GB, 150 * GB)], 64 * MB, "ok", "H200 with 149.0 of 150.0 GB free", ""),
        ([("H200", 20 * GB, 150 * GB)], None, "warn", "H200 with 20.0 of 150.0 GB free", "nvidia-smi names it"),
        ([("A", 9 * GB, 10 * GB)] * 2, 64 * MB, "warn", "GB free; /dev/shm has 64 MB", "--shm-size 1g"),
        ([("A", 9 * GB, 10 * GB)] * 2, 8 * GB, "ok", "A with 9.0 of 10.0 GB free, A with", ""),
    ],
)
def test_a_gpu_that_others_fill_and_little_shared_memory_are_named(gpus, shared, level, text, advice):
    finding = machine.judge_gpus(gpus, shared)
    assert finding.level == level
    assert text in finding.text
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("threads", "cores", "usable", "quota", "asked", "level", "text", "advice"),
    [
        (2, 2, 2, None, None, "ok", "2 threads on 2 of 2 cores", ""),
        (1, 2, 2, None, "1", "ok", "1 thread on 2 of 2 cores", ""),
        (64, 64, 64, 2.0, None, "warn", "64 threads on 2 of 64 cores (a container's quota)", "set OMP_NUM_THREADS=2:"),
        (64, 64, 4, None, None, "warn", "64 threads on 4 of 64 cores", "set OMP_NUM_THREADS=4:"),
        (8, 8, 8, None, "8", "ok", "8 threads on 8 of 8 cores", ""),
        (1, 64, 64, None, "1", "warn", "1 thread on 64 of 64 cores", "set OMP_NUM_THREADS=64 instead of 1 to use"),
        (1, 64, 64, 0.5, None, "ok", "1 thread on 1 of 64 cores (a container's quota)", ""),
        (4, 4, 4, 8.0, None, "ok", "4 threads on 4 of 4 cores", ""),
    ],
)
def test_threads_that_do_not_fit_the_cores_are_named(threads, cores, usable, quota, asked, level, text, advice):
    finding = machine.judge_threads(threads, cores, usable, quota, asked)
    assert (finding.level, finding.text) == (level, text)
    assert finding.advice.startswith(advice)
    assert bool(finding.advice) == (level != "ok")


@pytest.mark.parametrize(("free", "level"), [(2 * GB, "ok"), (2 * GB - 1, "warn")])
def test_little_memory_is_named(free, level):
    finding = machine.judge_memory(free, 16 * GB)
    assert (finding.level, finding.text) == (level, "2.0 of 16.0 GB free")
    assert ("nanollm info" in finding.advice) == (level == "warn")


@pytest.mark.parametrize(("free", "level"), [(10 * GB, "ok"), (1 * GB, "warn"), (GB // 4, "FAIL")])
def test_a_disk_that_is_nearly_full_is_named_with_what_a_run_takes(free, level):
    finding = machine.judge_disk(free, 9 * GB)
    assert finding.level == level
    assert finding.text == f"{free / GB:.1f} GB free; checkpoints of nano-327m take 9.0 GB"
    assert ("make room" in finding.advice) == (level != "ok")


@pytest.mark.parametrize(
    ("written", "seconds", "level", "text", "advice"),
    [
        (256 * MB, 0.5, "ok", "512 MB/s to the disk itself (256 MB)", ""),
        (
            16 * MB,
            2.0,
            "warn",
            "8 MB/s to the disk itself (16 MB)",
            "a checkpoint of nano-327m would take 375 s: take a",
        ),
    ],
)
def test_a_slow_disk_is_named_with_what_a_save_would_take(written, seconds, level, text, advice):
    finding = machine.judge_writing(written, seconds, 3 * GB)
    assert (finding.level, finding.text) == (level, text)
    assert finding.advice.startswith(advice)


NOON = 1_795_780_800.0  # 2026-11-27 12:00:00 UTC


@pytest.mark.parametrize(
    ("now", "stamped", "ticks", "level", "text", "advice"),
    [
        (NOON, NOON + 1, (5.0, 5.0), "ok", "2026-11-27 12:00:00 UTC", ""),
        (12.0, 12.0, (5.0, 6.0), "warn", "1970-01-01 00:00:12 UTC is in the past", "set the clock"),
        (NOON, NOON - 90, (5.0, 6.0), "warn", "but files are dated 90 s earlier", "file server"),
        (NOON, NOON + 3600, (5.0, 6.0), "warn", "but files are dated 3,600 s later", "file server"),
        (NOON, NOON, (6.0, 5.0), "FAIL", "but the monotonic clock goes back", "restart the machine"),
    ],
)
def test_a_clock_that_is_wrong_is_named(now, stamped, ticks, level, text, advice):
    finding = machine.judge_clock(now, stamped, ticks)
    assert finding.level == level
    assert text in finding.text
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("limit", "level", "text"),
    [
        (256, "warn", "256 at most"),
        (1024, "ok", "1,024 at most"),
        (-1, "ok", "any number"),
        (2**62, "ok", "any number"),
    ],
)
def test_a_low_limit_of_open_files_is_named(limit, level, text):
    finding = machine.judge_open_files(limit)
    assert (finding.level, finding.text) == (level, text)
    assert ("ulimit -n 4096" in finding.advice) == (level == "warn")


def test_a_missing_compiler_is_named_with_what_it_costs():
    finding = machine.judge_compiler([], "no C++ compiler was found (on Debian and Ubuntu: sudo apt install g++)", 0.1)
    assert finding.level == "warn"
    assert "several times slower" in finding.text
    assert "apt install g++" in finding.advice
    found = machine.judge_compiler(["ccache", "g++"], "", 5.94)
    assert said(found) == ("ok", "ccache g++ made and loaded our C++ in 5.9 s", "")


def test_packages_that_are_missing_or_old_are_named():
    torch_ok, none = machine.Need("", "torch", "2.11", "2.13.0+cpu"), machine.Need("", "pebble", "5.1", None)
    eval_missing, serve_old = (
        machine.Need("eval", "lm-eval", "0.4", None),
        machine.Need("serve", "fastapi", "0.115", "0.99"),
    )
    assert said(machine.judge_packages([torch_ok, NEED])) == (
        "ok",
        "all that is needed, and for data, serve, eval, export",
        "",
    )
    assert machine.judge_packages([torch_ok, eval_missing]).text == (
        'all that is needed, and for data, serve, export; pip install "nanollm[eval]" adds the others'
    )
    assert said(machine.judge_packages([torch_ok, none])) == (
        "FAIL",
        "pebble (missing)",
        'pip install "pebble>=5.1"',
    )
    assert said(machine.judge_packages([torch_ok, serve_old])) == (
        "warn",
        "fastapi 0.99 (too old)",
        'pip install "fastapi>=0.115"',
    )
    assert machine.judge_packages(None).level == "warn"


def test_the_hub_is_named_without_what_its_address_may_hold():
    reached = machine.judge_hub("https://user:secret@hub.example:8443/path?token=secret", 0.123)
    assert said(reached) == ("ok", "hub.example answers in 0.12 s", "")
    lost = machine.judge_hub("https://hub.example", "refused")
    assert (lost.level, lost.text) == ("warn", "hub.example cannot be reached: refused")
    assert "--offline" in lost.advice


def test_a_file_system_without_locks_is_named():
    finding = machine.judge_files("folders cannot be locked, or replaced: not supported")
    assert (finding.level, finding.text) == ("FAIL", "folders cannot be locked, or replaced: not supported")
    assert "--out" in finding.advice
    assert machine.judge_files("").level == "ok"


# Looking


def tree(root, own: str, files: dict[str, str]):
    """Files as Linux shows control groups."""
    for name, content in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            "0::/a/b\n",
            {"sys/fs/cgroup/a/cpu.max": "150000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n"},
            1.5,
        ),
        ("0::/of/the/host\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../elsewhere\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            "5:memory:/\n4:cpu,cpuacct:/docker/x\n",
            {
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4.0,
        ),
    ],
)
def test_the_quota_of_a_container_is_the_smallest_of_those_around_it(tmp_path, own, files, quota):
    assert machine.cpu_quota(tree(tmp_path, own, files)) == quota


def test_without_control_groups_nothing_is_limited(tmp_path):
    assert machine.cpu_quota(tmp_path) is None
    assert machine.memory(tmp_path) is None


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_what_the_container_has_left_and_cached_files_count_as_free(tmp_path, version):
    meminfo = {"proc/meminfo": "MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 60000000 kB\nHugePages_Total: 0\n"}
    assert machine.memory(tree(tmp_path, "0::/\n", meminfo)) == (60_000_000 * 1024, 64_000_000 * 1024)
    names = ("memory.max", "memory.current", "inactive_file", "sys/fs/cgroup", "0::/\n")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "sys/fs/cgroup/memory")
        names = (*names, "3:memory:/\n")
    limit, usage, idle, folder, own = names
    files = {limit: "4000000000\n", usage: "3000000000\n", "memory.stat": f"anon 5\n{idle} 500000000\n"}
    root = tree(tmp_path, own, meminfo | {f"{folder}/{name}": content for name, content in files.items()})
    assert machine.memory(root) == (1_500_000_000, 4_000_000_000)


def test_this_machine_has_memory_cores_and_a_limit_of_files():
    free, total = machine.memory() or (1, 1)
    assert 0 < free <= total
    assert 1 <= machine.usable_cores() <= os.cpu_count()
    assert machine.open_files_limit() != 0


def test_a_matrix_product_is_measured():
    assert machine.measure_gemm(torch.device("cpu"), torch.float32, limit_s=0.01) > 0.1


def test_a_type_that_a_device_does_not_multiply_has_no_speed():
    assert machine.measure_gemm(torch.device("cpu"), torch.bool) == 0


def test_writing_ends_at_its_bytes_or_at_its_seconds_and_leaves_nothing(tmp_path):
    written, seconds = machine.measure_writing(tmp_path, 20 * MB)
    assert written == 16 * MB
    assert seconds > 0
    assert machine.measure_writing(tmp_path, 10**12, limit_s=0.0)[0] == 8 * MB
    assert list(tmp_path.iterdir()) == []


def test_locks_and_replaced_folders_are_tried(tmp_path, monkeypatch):
    assert machine.try_files(tmp_path) == ""

    def refuse(_):
        raise OSError(38, "this file system cannot lock files (not implemented)")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_try_to_lock", lambda _: True)  # of a file system where every lock succeeds
        assert machine.try_files(tmp_path) == "a lock keeps nobody out here: two processes could write the same run"
        patch.setattr(durable, "_try_to_lock", refuse)
        assert machine.try_files(tmp_path) == (
            "folders cannot be locked, or replaced: this file system cannot lock files (not implemented)"
        )


def test_the_clocks_of_this_machine_agree(tmp_path):
    now, stamped, ticks = machine.read_clocks(tmp_path)
    assert abs(now - time.time()) < 60
    assert abs(stamped - now) < 60
    assert ticks[0] <= ticks[1]


def test_what_nanollm_needs_is_read_from_its_metadata():
    lines = [
        "torch>=2.11",
        "jsonargparse[signatures]<5,>=4.53",
        "lm-eval>=0.4.13; extra == 'eval'",
        "xllamacpp>=2026.10; (sys_platform == 'linux') and extra == 'dev'",
    ]
    versions = {"torch": "2.13.0+cpu", "jsonargparse": "4.52.9"}
    needs = machine.read_needs(lines, versions.get)
    assert needs == [
        machine.Need("", "torch", "2.11", "2.13.0+cpu"),
        machine.Need("", "jsonargparse", "4.53", "4.52.9"),
        machine.Need("eval", "lm-eval", "0.4.13", None),
    ]
    assert [need.is_old for need in needs] == [False, True, False]


def test_this_nanollm_has_what_it_needs():
    needs = machine.installed_needs()
    if needs is None:
        pytest.skip("nanollm is not installed")
    assert {"torch", "numpy"} <= {need.package for need in needs}
    assert [need.package for need in needs if not need.extra and (need.version is None or need.is_old)] == []


def test_an_uninstalled_nanollm_is_named(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    assert machine.installed_needs() is None


@pytest.mark.parametrize(
    ("version", "parts"),
    [("2.13.0+cpu", (2, 13)), ("2", (2,)), ("2.0", (2,)), ("10.0.0", (10,)), ("5.0rc1", (5,)), ("2026.10", (2026, 10))],
)
def test_versions_compare_as_numbers(version, parts):
    assert machine.numbers(version) == parts


# The hub


class Hub(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_):
        """Nothing: stderr is the tests'."""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def hub_that_says():
    """hub_that_says(status): the address of a server that answers HEAD with it."""
    servers = []

    def start(status):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"status": status}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("status", [200, 401, 404])
def test_a_hub_that_answers_is_reached(hub_that_says, status):
    answer = machine.ask_hub(hub_that_says(status))
    assert isinstance(answer, float)
    assert 0 < answer < 3


@pytest.mark.parametrize(
    ("status", "answer"), [(503, "it says 503 Service Unavailable"), (403, "it says 403 Forbidden")]
)
def test_a_hub_with_a_fault_or_a_proxy_that_forbids_is_not_reached(hub_that_says, status, answer):
    assert machine.ask_hub(hub_that_says(status)) == answer


def test_a_hub_that_refuses_is_not_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    answer = machine.ask_hub(f"http://user:secret@127.0.0.1:{port}")
    assert "refused" in answer
    assert "secret" not in answer


def test_a_silent_hub_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        answer = machine.ask_hub(f"http://127.0.0.1:{server.getsockname()[1]}", limit_s=0.2)
        assert answer == "no answer within 0.2 s"
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("endpoint", ["huggingface.co", "file:///etc/hostname"])
def test_an_address_that_is_none_is_named(endpoint):
    assert machine.ask_hub(endpoint) == "HF_ENDPOINT must begin with https://"
