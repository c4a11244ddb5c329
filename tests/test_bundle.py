"""There and back through the one door. That nothing damaged comes through: faults/test_corruption.py."""

import dataclasses

import pytest
import torch

from nanollm.bundle import load_bundle, save_bundle
from nanollm.durable import write_sealed_json
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised


@pytest.fixture
def model():
    return randomised(Transformer(TINY).init(0)).eval()


@pytest.fixture
def bundle(tmp_path, model, tokenizer):
    return save_bundle(tmp_path / "bundle", TINY, model.state_dict(), tokenizer, {"made_by": "a test"})


def test_weights_shape_tokenizer_and_provenance_come_back(bundle, model, tokenizer):
    loaded = load_bundle(bundle)
    assert loaded.model.config == TINY
    assert all(torch.equal(t, loaded.model.state_dict()[name]) for name, t in model.state_dict().items())
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert loaded.provenance["made_by"] == "a test"
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded.model(tokens), model(tokens), atol=0, rtol=0)


def test_a_loaded_model_computes_in_the_asked_type_and_can_train(bundle):
    model = load_bundle(bundle, torch.bfloat16).model.train()
    model(torch.arange(20)[None]).float().sum().backward()
    assert model.head.weight.dtype == torch.bfloat16
    assert all(layer.balance_bias.dtype == torch.float32 for layer in model.moe_layers())
    assert all(layer.load.sum() == 20 * TINY.experts_per_token for layer in model.moe_layers())


def test_what_is_not_a_bundle_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a bundle"):
        load_bundle(tmp_path)
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"run is not a bundle .*; did you mean .*bundle\?"):
        load_bundle(tmp_path / "run")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"notes.txt is not a bundle \(it is a file\)"):
        load_bundle(tmp_path / "notes.txt")


def test_weights_that_do_not_fit_the_shape_are_refused(tmp_path, model, tokenizer):
    wider = dataclasses.replace(TINY, d_ff=TINY.d_ff + 1)
    bundle = save_bundle(tmp_path / "bundle", wider, model.state_dict(), tokenizer, {})
    with pytest.raises(ValueError, match="does not fit"):
        load_bundle(bundle)


def test_a_provenance_without_checksums_is_refused(bundle):
    write_sealed_json(bundle / "provenance.json", {"format": 2})
    with pytest.raises(ValueError, match="does not list the files of a bundle"):
        load_bundle(bundle)


def test_a_bundle_that_a_save_was_replacing_is_found(bundle):
    bundle.rename(bundle.with_name("bundle.old"))  # killed between the two renames
    assert load_bundle(bundle).provenance["made_by"] == "a test"


def test_saving_again_replaces_the_bundle(bundle, model, tokenizer):
    (bundle / "stray").write_text("x")
    save_bundle(bundle, TINY, model.state_dict(), tokenizer, {"made_by": "again"})
    assert load_bundle(bundle).provenance["made_by"] == "again"
    assert not (bundle / "stray").exists()
