"""Start a run on a Ray cluster.

    ray job submit --working-dir . -- python recipes/pretrain_ray.py --hosts 8 --processes 8 \\
        --folder /shared/nanollm -- pretrain --config configs/pretrain/nano-327m.yaml --parallel hsdp

Ray chooses the hosts and starts one launcher (torchrun) on each, in a shared folder. The run's paths are relative to
that folder, not to Ray's copy of the code. Submitted again, the run resumes.
"""

import argparse
import socket
import subprocess
import sys

import ray
from ray.util import get_node_ip_address, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote
class Host:
    """One launcher, on the host that Ray assigns."""

    def meeting_point(self) -> tuple[str, int]:
        """This host's address and a free port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return get_node_ip_address(), free.getsockname()[1]

    def launch(self, rank: int, meeting_point: tuple[str, int], options: argparse.Namespace, words: list[str]) -> int:
        """Run the verb in this host's processes and return the exit code."""
        address, port = meeting_point
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.processes}"]
        command += [f"--nnodes={options.hosts}", f"--node-rank={rank}"]
        command += [f"--master-addr={address}", f"--master-port={port}", "--max-restarts=3"]
        return subprocess.run([*command, "-m", "nanollm", *words], cwd=options.folder, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, required=True, help="hosts, each with one launcher")
    parser.add_argument("--processes", type=int, required=True, help="processes per host, one per GPU")
    parser.add_argument("--cpus", type=int, default=4, help="CPU cores per process")
    parser.add_argument("--folder", required=True, help="shared folder, to which paths are relative")
    parser.add_argument("--no_gpus", action="store_true", help="train on CPUs, if needed several launchers per host")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="-- followed by the verb and its options")
    options = parser.parse_args()
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    needs = {"CPU": float(options.cpus * options.processes)}
    if not options.no_gpus:
        needs["GPU"] = float(options.processes)
    ray.init()
    group = placement_group([needs] * options.hosts, strategy="SPREAD" if options.no_gpus else "STRICT_SPREAD")
    ray.get(group.ready())
    hosts = [
        Host.options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0.0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        ).remote()
        for number in range(options.hosts)
    ]
    meeting_point = ray.get(hosts[0].meeting_point.remote())
    ends = [host.launch.remote(number, meeting_point, options, words) for number, host in enumerate(hosts)]
    return int(any(ray.get(ends)))  # a process killed by a signal has a negative code


if __name__ == "__main__":
    sys.exit(main())
