import json
from pathlib import Path

import pytest

from nanollm.config import read_mapping
from nanollm.train.run import QatConfig, claim_folder

SETTINGS = {"seed": 0, "data": {"data/sni": 0.7}, "optim": {"lr": 0.003, "betas": (0.9, 0.95)}, "out": Path("runs/x")}
INPUTS = {"tokenizer": "a" * 64, "data": {"data/sni": "b" * 64}}
FIXED = ("seed", "data", "inputs")


def test_a_new_folder_gets_the_settings_and_the_fingerprints(tmp_path):
    claim_folder(tmp_path, SETTINGS, INPUTS, FIXED)
    assert read_mapping(tmp_path / "config.yaml")["optim"] == {"lr": 0.003, "betas": [0.9, 0.95]}
    assert json.loads((tmp_path / "inputs.json").read_bytes()) == INPUTS


def test_the_same_run_goes_on_in_silence(tmp_path, capsys):
    for _ in range(2):
        claim_folder(tmp_path, SETTINGS, INPUTS, FIXED)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "inputs", "complaint"),
    [
        ({"seed": 1}, {}, "seed = 0, this run has 1;"),
        ({"data": {"data/sni": 0.5}}, {}, "data.data/sni = 0.7, this run has 0.5;"),
        ({"data": {"data/sni": 0.7, "data/x": 1.0}}, {}, "data.data/x = None, this run has 1.0;"),
        ({}, {"tokenizer": "c" * 64}, "inputs.tokenizer = aaaaaa, this run has cccccc;"),
        ({}, {"data": {"data/sni": "d" * 64}}, "inputs.data.data/sni = bbbbbb, this run has dddddd;"),
    ],
)
def test_what_decides_the_numbers_may_not_change(tmp_path, settings, inputs, complaint):
    claim_folder(tmp_path, SETTINGS, INPUTS, FIXED)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=f"was begun with {complaint} go on with the old value or choose another --out"
    ):
        claim_folder(tmp_path, SETTINGS | settings, INPUTS | inputs, FIXED)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_name_that_only_begins_like_a_fixed_one_may_change(tmp_path):
    claim_folder(tmp_path, SETTINGS | {"seeding": 1}, INPUTS, FIXED)
    claim_folder(tmp_path, SETTINGS | {"seeding": 2}, INPUTS, FIXED)


def test_the_rest_may_change_and_is_said(tmp_path, capsys):
    claim_folder(tmp_path, SETTINGS, INPUTS, FIXED)
    claim_folder(tmp_path, SETTINGS | {"optim": {"lr": 1e-4, "betas": (0.9, 0.95)}}, INPUTS, FIXED)
    assert "goes on with optim.lr = 0.0001 instead of 0.003" in capsys.readouterr().err
    assert read_mapping(tmp_path / "config.yaml")["optim"]["lr"] == 1e-4


@pytest.mark.parametrize("missing", ["config.yaml", "inputs.json"])
def test_checkpoints_without_their_settings_are_not_continued(tmp_path, missing):
    claim_folder(tmp_path, SETTINGS, INPUTS, FIXED)
    (tmp_path / missing).unlink()
    claim_folder(tmp_path, SETTINGS, INPUTS, FIXED)  # nothing is lost yet
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=r"has checkpoints but not both config\.yaml and inputs\.json; choose another"):
        claim_folder(tmp_path, SETTINGS, INPUTS, FIXED)


def test_a_share_of_int4_steps_is_one_step_at_least():
    """With none, a bundle would be rounded to int4 without a step of training for it."""
    assert [QatConfig(steps=steps, qat_fraction=0.1).int4_from for steps in (4, 10, 100)] == [3, 9, 90]
    assert QatConfig(steps=4).int4_from is None
