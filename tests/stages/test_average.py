"""The mean of checkpoints is that of their masters, and says which they were."""

import dataclasses

import torch
from safetensors.torch import load_file

from nanollm.bundle import load_bundle
from nanollm.cli import main
from nanollm.stages import average, pretrain
from nanollm.train.checkpoint import checkpoints, read_weights


def test_weights_and_router_bias_are_the_mean_of_the_newest(run_config, tmp_path, capsys):
    c = run_config(start="fast")
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, keep_last=3))
    pretrain.run(c)
    folder = average.run(average.Config(run=c.out, last=3))
    kept = [read_weights(path) for path in checkpoints(c.out / "checkpoints")]
    found, bundle = load_file(folder / "model.safetensors"), load_bundle(folder)
    assert found.keys() == kept[0].keys()
    for name, weight in found.items():
        mean = torch.stack([each[name] for each in kept]).mean(0)
        if name == "trunk.embed.weight":  # of which the model sees rows with an RMS of 1
            mean = mean / mean.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        torch.testing.assert_close(weight, mean, atol=1e-6, rtol=1e-5)
    assert all(weight.any() for name, weight in found.items() if name.endswith("balance_bias"))
    assert bundle.provenance["steps"] == [12, 9, 6]
    assert bundle.provenance["inputs"] == load_bundle(c.out / "bundle").provenance["inputs"]

    for words, told in (
        (["--last", "4", "--out", str(tmp_path / "more")], "has 3 checkpoints, --last is 4"),
        (["--last", "1"], "--last must be at least 2"),
        ([], "--force"),
    ):
        assert main(["average", str(c.out), *(words or ["--last", "3"])]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_a_folder_that_is_no_pretraining_run_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("bundle: runs/demo/pretrain/bundle\n")
    assert main(["average", str(tmp_path)]) == 2
    assert "is not the folder of a run of nanollm pretrain" in capsys.readouterr().err
