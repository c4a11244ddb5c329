"""Two hosts, as Linux makes them of one: network namespaces with an address each, and a cable that can be pulled."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from nanollm.train.run import TrainConfig
from tests.ranks.launch import running, wait_until
from tests.ranks.traced import read_rows

pytestmark = pytest.mark.dist

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
TRAIN = TrainConfig(steps=150, batch_size=8, micro_batch_size=1, log_every=1, validate_every=0, save_every=10)
LONGEST_S = 60.0


def ip(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Host to the name of its namespace."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and apt-get install iproute2")
    names = {host: f"nano-{os.getpid()}-{host}" for host in ADDRESSES}
    with ExitStack() as stack:
        for name in names.values():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        ip("link", "add", "cable", "netns", names["a"], "type", "veth", "peer", "name", "cable", "netns", names["b"])
        for host, name in names.items():
            ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names


def start_both(stack, hosts, arguments, logs):
    """torchrun on both hosts; the two launchers."""
    return [
        stack.enter_context(
            running(
                1,
                arguments,
                logs[host],
                # Not c10d: with the cable cut its launcher waits for the store on the other host as long as TCP does.
                *("--nnodes=2", f"--node-rank={number}", f"--master-addr={ADDRESSES['a']}", "--master-port=29400"),
                inside=["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable"],
            )
        )
        for number, (host, name) in enumerate(hosts.items())
    ]


def test_two_hosts_train_as_one_process_does_and_a_cut_cable_ends_both_with_a_message(hosts, job, tmp_path):
    logs = {host: tmp_path / f"log-{host}" for host in hosts}
    arguments, out = job(out="cut", train=TRAIN), tmp_path / "cut"
    alone = job(out="alone", train=TRAIN)
    with ExitStack() as stack:
        for process in start_both(stack, hosts, alone, logs):
            assert process.wait(300) == 0, logs["a"].read_text()[-2000:]
    with ExitStack() as stack:
        processes = start_both(stack, hosts, arguments, logs)
        wait_until(
            lambda: (out / "rows-0.jsonl").exists() and len((out / "rows-0.jsonl").read_text()) > 3000, LONGEST_S
        )
        ip("-n", hosts["a"], "link", "set", "cable", "down")
        cut = time.monotonic()
        ended = {}
        while len(ended) < 2:
            assert time.monotonic() < cut + LONGEST_S, [log.read_text()[-1500:] for log in logs.values()]
            ended |= {p.pid: time.monotonic() - cut for p in processes if p.poll() is not None and p.pid not in ended}
            time.sleep(0.1)
        print(f"the cable was cut: the hosts ended after {' and '.join(f'{s:.1f} s' for s in ended.values())}")
        assert all(process.returncode for process in processes)
    assert "ends: nothing was heard of rank 1 on host" in logs["a"].read_text()
    assert "ends: nothing was heard of rank 0" in logs["b"].read_text()
    ip("-n", hosts["a"], "link", "set", "cable", "up")
    with ExitStack() as stack:
        for process in start_both(stack, hosts, arguments, logs):
            assert process.wait(300) == 0, logs["a"].read_text()[-2000:]
    assert "going on from step" in logs["a"].read_text()
    assert read_rows(tmp_path / "alone") == read_rows(out)
    weights = [(tmp_path / name / "bundle" / "model.safetensors").read_bytes() for name in ("alone", "cut")]
    assert weights[0] == weights[1]
