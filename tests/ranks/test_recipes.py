"""The recipes for clusters start what they say, as far as one machine can be two hosts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanollm.train.metrics import read_metrics
from tests.ranks.launch import ROOT

pytestmark = pytest.mark.dist


def run(command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "nanollm" in line]


def test_the_slurm_script_starts_one_launcher_on_each_host(job, tmp_path):
    """srun starts its command once for each host, all at once; here two hosts are this one."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n")
    (programs / "srun").write_text(
        "#!/bin/bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        'SLURM_NODEID=0 "$@" & one=$!\n'
        'SLURM_NODEID=1 "$@" & two=$!\n'
        "wait $one && wait $two\n"
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    scheduler = {"SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "PROCESSES": "1"}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    _, _, config, *out = job(steps=4)
    options = ["--parallel", "ddp", "--train.batch_size", "4", "--train.steps", "4", "--optim.lr", "1e-3"]
    run(["bash", "recipes/pretrain.sbatch", *out, *options], PATH=path, CONFIG=config, **scheduler)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4


def test_the_ray_job_starts_one_launcher_on_each_host(job, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    hosts = ["--hosts", "2", "--processes", "1", "--cpus", "1", "--no_gpus", "--folder", str(tmp_path)]
    run([sys.executable, "recipes/pretrain_ray.py", *hosts, "--", *job(steps=4)])
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4
