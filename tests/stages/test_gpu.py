"""On a CUDA device a small run that was stopped ends with the bits of one that was not (pretraining in float32)."""

import dataclasses

import pytest
import torch

from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.tasks import TaskConfig
from nanollm.stages import grpo, pretrain
from nanollm.train.compile import SpeedConfig
from nanollm.train.optim import OptimConfig
from tests.stages.conftest import weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # of torch's own compiler
]


def went_on(stage, of_length, whole: int, first: int) -> tuple[str, str]:
    """Digests of a run of `whole` steps, and of one that ended after `first` and went on."""
    expected = weights_of(stage.run(of_length("whole", whole)).parent)
    stage.run(of_length("parts", first))
    return expected, weights_of(stage.run(of_length("parts", whole)).parent)


@pytest.mark.parametrize("compile", ["on", "off"])
def test_pretraining(run_config, compile):
    def of_length(out, steps):
        c = run_config(steps=steps, out=out)
        optim = dataclasses.replace(c.optim, final_lr_fraction=1.0)
        return dataclasses.replace(c, device="cuda", optim=optim, speed=SpeedConfig(compile=compile))

    expected, got = went_on(pretrain, of_length, 8, 4)
    assert got == expected


def test_grpo(bundle, tmp_path):
    def of_length(out, steps):
        return grpo.Config(
            bundle=bundle,
            out=tmp_path / out,
            task=TaskConfig(name="tests.faults.even:Even"),
            train=grpo.GrpoTrainConfig(steps=steps, validate_every=3, save_every=2),
            rollout=RolloutConfig(prompts=3, group_size=4, max_tokens=10),
            optim=OptimConfig(name="adamw", lr=1e-3, warmup_steps=1, balance_rate=0.0, final_lr_fraction=1.0),
            validation_problems=5,
            device="cuda",
        )

    expected, got = went_on(grpo, of_length, 6, 3)
    assert got == expected
