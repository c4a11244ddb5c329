"""A file that was cut short, lost, or changed in a single byte is named and never loaded."""

import json
import shutil
from collections.abc import Iterator
from random import Random

import pytest
import torch

from nanollm.bundle import load_bundle, read_config
from nanollm.data.batches import Batch
from nanollm.data.prepare import PrepareConfig, SourceSplit, prepare
from nanollm.data.shards import Shards, read_manifest, write_manifest
from nanollm.durable import write_json
from nanollm.model.transformer import Transformer
from nanollm.train.checkpoint import find_newest, load_newest, save_checkpoint, verify
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World
from tests.data.conftest import content
from tests.model.conftest import TINY

CUTS, FLIPS = 10, 20  # of each file
FLIPS_OF_ALL, SMALL_BYTES = 100, 10_000  # the full form changes every byte of a smaller file

CHECKPOINT = ("state.json", "weights.safetensors", "optimizer.safetensors")
BUNDLE = ("config.json", "model.safetensors", "tokenizer.model", "provenance.json")
SHARD = ("manifest.json", "train-00000.npy", "train-00000.offsets.npy")

thoroughly = pytest.mark.parametrize("every_byte", [False, pytest.param(True, marks=pytest.mark.slow)])


def damages(whole: bytes, every_byte: bool) -> Iterator[bytes | None]:
    """What may be left of a file: less of it, the same with another byte, or (None) nothing."""
    rng = Random(0)
    yield from (whole[: len(whole) * part // CUTS] for part in range(CUTS))
    spots = rng.sample(range(len(whole)), FLIPS_OF_ALL if every_byte else FLIPS)
    if every_byte and len(whole) < SMALL_BYTES:
        spots = [*range(len(whole))]
    for spot in spots:
        yield whole[:spot] + bytes([whole[spot] ^ rng.randrange(1, 256)]) + whole[spot + 1 :]
    yield None


def damage(file, every_byte):
    """Damage a file in each way, let the caller look at it, and mend it."""
    whole = file.read_bytes()
    for left in damages(whole, every_byte):
        file.unlink(missing_ok=True)
        if left is not None:
            file.write_bytes(left)
        yield
    file.write_bytes(whole)


def assert_all_is_found(folder, files, load, every_byte, record_property):
    """`load` names each file of a folder when that is damaged, and loads the folder when it is mended."""
    tried = 0
    for name in files:
        for _ in damage(folder / name, every_byte):
            with pytest.raises((ValueError, OSError), match=name):
                load()
            tried += 1
    load()
    record_property("figure", f"{tried:,} of {tried:,} found by name, 0 loaded in silence")


# --- a checkpoint ---


@pytest.fixture
def start():
    """A fresh state, the same each time."""
    return lambda: TrainState.start(Transformer(TINY).init(0), OptimConfig(), World())


@pytest.fixture
def run(start, tmp_path):
    """The checkpoints of a run: of step 1 and of step 2."""
    state = start()
    for state.step in (1, 2):
        tokens = torch.arange(33).reshape(3, 11) + state.step
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        train_step(state, [batch], next_token_loss, 1e-2, OptimConfig(), World())
        save_checkpoint(tmp_path / "checkpoints", state, keep_last=2)
    return tmp_path / "checkpoints"


@thoroughly
def test_every_damage_to_a_checkpoint_is_found(run, every_byte, record_property):
    newest = run / "step-00000002"
    assert {file.name for file in newest.iterdir()} == {*CHECKPOINT}
    assert_all_is_found(newest, CHECKPOINT, lambda: verify(newest), every_byte, record_property)


@thoroughly
def test_training_takes_the_newest_sound_checkpoint_and_says_so(run, start, every_byte, capsys, record_property):
    newest, tried = run / "step-00000002", 0
    for name in CHECKPOINT:
        for _ in damage(newest / name, every_byte):
            path, counters = find_newest(run)
            assert (path.name, counters["step"]) == ("step-00000001", 1)
            assert f"passing over a damaged checkpoint: {newest / name}" in capsys.readouterr().err
            newest.with_suffix(".damaged").rename(newest)
            tried += 1
        (newest / name).rename(newest / "away")
        resumed = start()
        assert load_newest(run, resumed, World())
        assert resumed.step == 1
        newest.with_suffix(".damaged").rename(newest)
        (newest / "away").rename(newest / name)
    assert find_newest(run)[0] == newest
    record_property("figure", f"{tried:,} of {tried:,} damaged ones passed over, the one before taken")


# --- a bundle ---


@pytest.fixture
def bundle(materials, tmp_path):
    return shutil.copytree(materials["bundle"], tmp_path / "bundle")


@thoroughly
def test_every_damage_to_a_bundle_is_found(bundle, every_byte, record_property):
    assert {file.name for file in bundle.iterdir()} == {*BUNDLE}
    assert_all_is_found(bundle, BUNDLE, lambda: load_bundle(bundle), every_byte, record_property)


# --- token files ---


@thoroughly
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_every_damage_to_token_files_is_found(materials, tmp_path, kind, every_byte, record_property):
    """bad_records.jsonl is not one of them: it is a list for people, which nothing reads."""
    folder = shutil.copytree(materials[kind], tmp_path / kind)
    train = [*SHARD, *(["train-00000.flags.npy"] if kind == "chat" else [])]
    files = [*train, *(name.replace("train", "val") for name in train[1:])]
    assert {file.name for file in folder.iterdir()} - {".lock", "bad_records.jsonl"} == {*files}

    def load():
        for split in ("train", "val"):
            Shards.open(folder, split, tokenizer_fingerprint=None)

    assert_all_is_found(folder, files, load, every_byte, record_property)


def test_ids_that_the_tokenizer_lacks_are_refused_though_every_byte_is_right(materials, tmp_path):
    folder = shutil.copytree(materials["text"], tmp_path / "tokens")
    manifest = read_manifest(folder)[0]
    manifest["tokenizer"]["vocab_size"] = 300
    write_manifest(folder, manifest)
    with pytest.raises(ValueError, match=r"train-00000.npy holds the id \d{3}, its tokenizer has 300 pieces"):
        Shards.open(folder, tokenizer_fingerprint=None)


@thoroughly
def test_a_preparation_that_was_stopped_never_goes_on_from_a_damaged_note(tmp_path, tokenizer, every_byte):
    texts = [f"{n} waves of the sea" for n in range(40)]

    def breaks_off():
        yield from texts[:20]
        raise KeyboardInterrupt

    def go_on(folder, read=lambda: texts):
        rules = PrepareConfig(kind="text", shard_tokens=100)
        return prepare([SourceSplit(lambda on_bad: read())], tokenizer, folder, rules, source={}, flush_every=50)

    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        go_on(stopped, breaks_off)
    before = content(stopped)
    for _ in damage(stopped / "progress.json", every_byte):
        with pytest.raises(ValueError, match=r"progress.json|is not part of a preparation"):
            go_on(stopped)
    assert content(stopped) == before
    go_on(stopped)
    go_on(tmp_path / "whole")
    assert content(stopped) == content(tmp_path / "whole")


# --- other formats ---


@pytest.fixture
def sealed(run, bundle, materials, tmp_path):
    """Each file with a seal, what loads it, and what is advised where it has another format."""
    tokens, newest = shutil.copytree(materials["text"], tmp_path / "tokens"), run / "step-00000002"
    return [
        (newest / "state.json", lambda: verify(newest), "expected format 2, got 1; resume with the version"),
        (bundle / "config.json", lambda: read_config(bundle), "expected format 2, got 1; take the version"),
        (bundle / "provenance.json", lambda: load_bundle(bundle), "expected format 2, got 1; take the version"),
        (tokens / "manifest.json", lambda: read_manifest(tokens), "has format 1, .*; prepare the folder again"),
    ]


def test_another_format_is_one_line_and_a_lost_seal_or_format_is_refused(sealed):
    for file, load, advice in sealed:
        record = json.loads(file.read_bytes())
        left = {lost: {name: each for name, each in record.items() if name != lost} for lost in ("seal", "format")}
        for changed in (*left.values(), {**record, "format": 1, "seal": None}):
            write_json(file, changed)
            with pytest.raises(ValueError, match=f"{file.name} was changed after it was written"):
                load()
        write_json(file, left["seal"] | {"format": 1})
        with pytest.raises(ValueError, match=f"{file.name}:? {advice}"):
            load()
        write_json(file, record)
        load()
