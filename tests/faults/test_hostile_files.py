"""A file that an attacker made runs nothing, takes no more memory than its size warrants, and is refused in a line."""

import ast
import gzip
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zstandard

from nanollm import cli
from nanollm.durable import sha256_of, write_sealed_json
from nanollm.model.transformer import Transformer
from nanollm.stages import export
from nanollm.train.checkpoint import load_newest, save_checkpoint
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.world import World
from tests.model.conftest import TINY

ROOT = Path(__file__).parents[2]


class Payload:
    """What an attacker hides in a pickle; unpickled, it leaves a file behind."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


@pytest.fixture
def canary(tmp_path):
    """Where the payloads leave their mark; there is none when the test has ended."""
    path = tmp_path / "exploded"
    yield path
    assert not path.exists()


@pytest.fixture
def bombs(canary):
    """Files that run the payload when they are unpickled, by how they were made."""
    payload, saved, array, arrays = Payload(canary), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"model": payload}, saved)
    np.save(array, np.array([payload], dtype=object), allow_pickle=True)
    np.savez(arrays, np.array([payload], dtype=object), allow_pickle=True)
    found = {"pickle": pickle.dumps(payload), "pt": saved.getvalue(), "npy": array.getvalue(), "npz": arrays.getvalue()}
    return found | {"yaml": f"!!python/object/apply:os.system ['touch {canary}']\n".encode()}


@pytest.fixture
def refused(capsys):
    """Run a command that must end as a user's mistake: nothing on stdout, no traceback; returns its last line."""

    def run(*words):
        capsys.readouterr()
        code = cli.main([*map(str, words)])
        said = capsys.readouterr()
        assert (code, said.out) == (2, ""), said.err
        assert "Traceback" not in said.err
        last = said.err.splitlines()[-1]
        assert last.startswith(f"nanollm {words[0]}: ")
        assert len(last) < 1000
        return last

    return run


def test_the_payload_runs_where_a_file_is_unpickled(bombs, canary):
    """Otherwise nothing here would show anything."""
    readers = {
        "pickle": pickle.load,
        "pt": lambda file: torch.load(file, weights_only=False),
        "npy": lambda file: np.load(file, allow_pickle=True),
        "npz": lambda file: np.load(file, allow_pickle=True)["arr_0"],
        "yaml": yaml.unsafe_load,
    }
    for name, read in readers.items():
        read(io.BytesIO(bombs[name]))
        canary.unlink()


# --- a bundle of others ---


@pytest.fixture
def bundle(materials, tmp_path):
    return shutil.copytree(materials["bundle"], tmp_path / "bundle")


def sign(bundle, **record):
    """Make a bundle's seals and sums right again, as anybody can who made the bundle."""
    config = json.loads((bundle / "config.json").read_bytes())
    if isinstance(config, dict):
        write_sealed_json(bundle / "config.json", config)
    files = {name: sha256_of(bundle / name) for name in ("config.json", "model.safetensors", "tokenizer.model")}
    write_sealed_json(bundle / "provenance.json", {"made_by": "them", "format": 2, "files": files} | record)


def spoilt(bundle, file, content):
    """Put something in place of a file, and let all sums agree."""
    (bundle / file).write_bytes(content)
    if file in ("model.safetensors", "tokenizer.model"):
        sign(bundle)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.model", "provenance.json"])
def test_a_pickle_or_a_file_without_end_in_place_of_a_bundles_is_refused(bundle, bombs, refused, file):
    for bomb in bombs.values():
        spoilt(bundle, file, bomb)
        assert file in refused("generate", bundle, "--prompt", "Once")
    (bundle / file).unlink()
    (bundle / file).symlink_to("/dev/zero")
    assert file in refused("generate", bundle, "--prompt", "Once")


SIZES = [
    {"n_blocks": 10**9},
    {"vocab_size": 10**12},
    {"d_model": 10**12, "q_lora_rank": 10**12},
    {"n_heads": -1},
    {"d_model": 0},
    {"d_model": "64"},
    {"d_model": None},
    {"rope_theta": float("nan")},
    {"rope_theta": 10**400},
    {"rms_norm_eps": -1.0},
    {"norm_topk_prob": "yes"},
    {"n_experts": 4},
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes!s:.60}")
def test_sizes_that_the_weights_do_not_bear_out_are_refused_before_anything_is_built(bundle, refused, sizes):
    config = json.loads((bundle / "config.json").read_bytes())
    write_sealed_json(bundle / "config.json", config | {"model": config["model"] | sizes})
    sign(bundle)
    last = refused("generate", bundle, "--prompt", "Once")
    assert next(iter(sizes)) in last or "does not fit" in last or "does not describe a model" in last


@pytest.mark.parametrize("verb", ["export", "eval"])
def test_what_is_said_before_the_weights_are_read_takes_no_time_either(bundle, refused, verb):
    """To count the parameters of a billion blocks would take minutes."""
    config = json.loads((bundle / "config.json").read_bytes())
    write_sealed_json(bundle / "config.json", config | {"model": config["model"] | {"n_blocks": 10**6}})
    sign(bundle)
    words = ["--dry_run"] if verb == "export" else ["--task.name", "words", "--n", 1]
    assert "n_blocks is 1000000, but the weights have 4 blocks" in refused(verb, bundle, *words)


DEEP = {"list": b"[" * 100_000, "object": b'{"a":' * 100_000, "closed": b'{"a":' * 900 + b"1" + b"}" * 900}


@pytest.mark.parametrize("file", ["config.json", "provenance.json"])
@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_json_of_any_depth_is_refused(bundle, refused, file, content):
    (bundle / file).write_bytes(content)
    refused("generate", bundle, "--prompt", "Once")


def test_a_history_that_is_none_is_refused_where_it_is_told(bundle, refused):
    for parent in (3, [3], {"parent": "x"}, {"inputs": 3}):
        sign(bundle, parent=parent)
        assert "provenance.json: " in refused("export", bundle)


# --- safetensors ---


def safetensors(header, numbers=b"", length=None):
    """A file with this header, or with one that is said to be `length` bytes long."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + numbers


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "nothing": b"",
    "a header of 2^63 bytes": safetensors(b"{}", length=2**63),
    "a header of 1 TB": safetensors(b"{}", length=10**12),
    "overlapping tensors": safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "a tensor behind the end": safetensors({"a": entry([2], 0, 8)}, bytes(4)),
    "a hole": safetensors({"a": entry([1], 4, 8)}, bytes(8)),
    "a negative side": safetensors({"a": entry([-1, -2], 0, 8)}, bytes(8)),
    "sides that overflow": safetensors({"a": entry([2**32, 2**32, 2], 0, 8)}, bytes(8)),
    "an unknown type": safetensors({"a": entry([1], 0, 8, "OBJECT")}, bytes(8)),
    "a header of 90,000 brackets": safetensors(b"[" * 90_000),
    "a header that is not UTF-8": safetensors(b"\xff" * 16),
    "numbers behind the last tensor": safetensors({"a": entry([1], 0, 4)}, bytes(400)),
    "tensors of no model": safetensors({"a": entry([1], 0, 4)}, bytes(4)),
    "no tensors": safetensors({}),
}


@pytest.fixture(scope="module")
def foreign(materials, tmp_path_factory):
    """An export that others may have changed."""
    return export.run(export.Config(bundle=materials["bundle"], out=tmp_path_factory.mktemp("foreign") / "export"))


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_safetensors_that_lie_are_refused_as_a_bundle_and_as_a_model_to_import(
    bundle, foreign, tmp_path, refused, content
):
    spoilt(bundle, "model.safetensors", content)
    last = refused("generate", bundle, "--prompt", "Once")
    assert "model.safetensors" in last or "n_blocks is 4, but the weights have 0 blocks" in last
    folder = shutil.copytree(foreign, tmp_path / "foreign")
    (folder / "model.safetensors").write_bytes(content)
    refused("import", folder, "--out", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.model", "provenance.json"])
def test_a_pickle_in_a_model_to_import_never_runs(foreign, tmp_path, bombs, refused, file):
    folder = shutil.copytree(foreign, tmp_path / "foreign")
    for bomb in bombs.values():
        (folder / file).write_bytes(bomb)
        assert file in refused("import", folder, "--out", tmp_path / "imported")


# --- the folder of a run ---


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "checkpoints", fresh_state(), keep_last=1)


def fresh_state():
    return TrainState.start(Transformer(TINY).init(0), OptimConfig(), World())


def sign_checkpoint(checkpoint, **changed):
    """Seal a checkpoint again, as anybody can who made it."""
    state = json.loads((checkpoint / "state.json").read_bytes())
    files = {file.name: sha256_of(file) for file in checkpoint.glob("*.safetensors")}
    write_sealed_json(checkpoint / "state.json", state | {"files": files} | changed)


def assert_not_resumed(checkpoint, expected):
    with pytest.raises(ValueError, match=expected):
        load_newest(checkpoint.parent, fresh_state(), World())


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_with_a_pickle_or_a_lying_header_is_not_resumed(checkpoint, bombs, file):
    for content in (*bombs.values(), *HEADERS.values()):
        if content == HEADERS["no tensors"] and file.startswith("optimizer"):
            continue  # before the first step there are none
        (checkpoint / file).write_bytes(content)
        sign_checkpoint(checkpoint)
        assert_not_resumed(checkpoint, "holds no tensors that can be read|not a whole safetensors|holds another model")


@pytest.mark.parametrize("name", ["../../secret", "/dev/zero", "..", "", "sub/file"])
def test_a_checkpoint_that_names_files_elsewhere_is_not_resumed_and_they_are_not_read(checkpoint, name):
    (checkpoint.parent.parent / "secret").write_text("x")
    files = {file.name: sha256_of(file) for file in checkpoint.glob("*.safetensors")}
    sign_checkpoint(checkpoint, files={name: sha256(b"x").hexdigest()} | files)
    assert_not_resumed(checkpoint, "every checkpoint in .* is damaged")


@pytest.mark.parametrize("counters", [{"step": "4"}, {"step": None}, {}, [], 4], ids=str)
def test_a_checkpoint_without_the_counters_of_a_run_is_not_resumed(checkpoint, counters):
    sign_checkpoint(checkpoint, counters=counters)
    assert_not_resumed(checkpoint, "every checkpoint in .* is damaged")


def test_pickles_beside_a_checkpoint_or_in_place_of_its_state_never_run(checkpoint, bombs):
    """torch.distributed.checkpoint's own reader would unpickle .metadata."""
    for name in (".metadata", "__0_0.distcp", "optimizer.pt", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(bombs["pickle"])
    assert load_newest(checkpoint.parent, fresh_state(), World())
    for bomb in bombs.values():
        (checkpoint / "state.json").write_bytes(bomb)
        assert_not_resumed(checkpoint, "every checkpoint in .* is damaged")


def test_the_command_line_refuses_to_go_on_from_a_pickle(job_of, bombs, refused):
    job = job_of("pretrain", "--train.steps", 3, "--sample_prompts")
    assert cli.main(job.words) == 0
    (checkpoint,) = (job.out / "checkpoints").iterdir()
    (checkpoint / "weights.safetensors").write_bytes(bombs["pt"])
    sign_checkpoint(checkpoint)
    assert "weights.safetensors is not a whole safetensors file" in refused(*job.words)


# --- token files ---


@pytest.fixture
def tokens(materials, tmp_path):
    return shutil.copytree(materials["text"], tmp_path / "tokens")


def rewrite(tokens, change):
    """Change a manifest and seal it again."""
    manifest = json.loads((tokens / "manifest.json").read_bytes())
    change(manifest)
    write_sealed_json(tokens / "manifest.json", manifest)


@pytest.mark.long
def test_a_pickle_in_place_of_token_files_never_runs(tokens, bombs, refused, job_of):
    words = [*job_of("pretrain").words, "--data", tokens]
    whole = {path.name: path.read_bytes() for path in tokens.iterdir()}
    for file in ("train-00000.npy", "val-00000.offsets.npy"):
        for bomb in bombs.values():
            same_size = bomb[: len(whole[file])].ljust(len(whole[file]), b"\0")
            (tokens / file).write_bytes(same_size)
            split = file.partition("-")[0]
            about = {"size": len(same_size), "sha256": sha256(same_size).hexdigest()}
            rewrite(tokens, lambda manifest: manifest["splits"][split]["shards"][0]["files"].update({file: about}))  # noqa: B023
            assert f"{file} is not a .npy file" in refused(*words)
            for name, content in whole.items():
                (tokens / name).write_bytes(content)
    for bomb in bombs.values():
        (tokens / "manifest.json").write_bytes(bomb)
        assert "manifest.json" in refused(*words)


def train_of(manifest):
    return manifest["splits"]["train"]


def rename(manifest, new):
    files = train_of(manifest)["shards"][0]["files"]
    files[new] = files.pop("train-00000.npy")


MANIFESTS = {
    "a file above": lambda m: rename(m, "../../secret.npy"),
    "a sum that is no text": lambda m: train_of(m)["shards"][0]["files"]["train-00000.npy"].update(sha256=5),
    "more tokens than the file": lambda m: train_of(m)["shards"][0].update(tokens=10**12),
    "fewer than none": lambda m: train_of(m)["shards"][0].update(tokens=-64),
    "no splits": lambda m: m.pop("splits"),
    "splits that are a list": lambda m: m.update(splits=[]),
    "a shard that is a number": lambda m: train_of(m).update(shards=[1]),
    "no tokenizer": lambda m: m.update(tokenizer=None),
    "a vocabulary that is none": lambda m: m["tokenizer"].update(vocab_size="all"),
    "no format": lambda m: m.pop("format"),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_lies_is_refused_and_leads_nowhere_else(tokens, refused, job_of, change):
    rewrite(tokens, change)
    refused(*job_of("pretrain").words, "--data", tokens)


# --- a tokenizer ---


def test_a_pickle_in_place_of_a_tokenizer_never_runs(tmp_path, bombs, refused, job_of):
    for bomb in bombs.values():
        (tmp_path / "their.model").write_bytes(bomb)
        last = refused(*job_of("pretrain").words, "--tokenizer_path", tmp_path / "their.model")
        assert "their.model is not a SentencePiece model" in last


def test_a_tokenizer_without_end_is_not_read(tmp_path, refused, job_of):
    """A link may lead to a device, and a file may be mostly hole."""
    (tmp_path / "zeros").mkdir()
    (tmp_path / "zeros" / "a.model").symlink_to("/dev/zero")
    last = refused(*job_of("pretrain").words, "--tokenizer_path", tmp_path / "zeros")
    assert "a.model is not a file" in last
    with (tmp_path / "large.model").open("wb") as file:
        file.truncate(2**40)
    last = refused(*job_of("pretrain").words, "--tokenizer_path", tmp_path / "large.model")
    assert "expected at most 33,554,432; it is no tokenizer" in last


FUZZ = """
import faulthandler, random, sys
from pathlib import Path
from nanollm.text.tokenizer import Tokenizer

faulthandler.enable()
whole, rng, refused, loaded = Path(sys.argv[1]).read_bytes(), random.Random(0), 0, 0
cases = [whole[: len(whole) * part // 20] for part in range(20)]
for _ in range(int(sys.argv[2])):
    spot = rng.randrange(len(whole))
    cases.append(whole[:spot] + bytes([whole[spot] ^ rng.randrange(1, 256)]) + whole[spot + 1 :])
    cases.append(whole[:spot] + rng.randbytes(rng.randrange(40)) + whole[spot + rng.randrange(40) :])
cases += [rng.randbytes(2000), bytes(2000), b"\\x0b" * 10**6, b"\\x0a\\x00" * 10**6, b"\\xff" * 99]
for case in cases:
    try:
        tokenizer = Tokenizer(case)
        text = "Once \u2581 upon\\0 a time </s><0x41> \U0001f600"
        ids = tokenizer.encode(text)
        assert isinstance(tokenizer.decode(ids), str)
        tokenizer.remember_words()
        assert tokenizer.encode_all([text])[0].tolist() == ids, (text, case)
        loaded += 1
    except ValueError as error:
        assert str(error).count("\\n") == 0
        refused += 1
print(len(cases), refused, loaded)
"""


@pytest.mark.parametrize("flips", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_damaged_tokenizer_is_refused_or_harmless_and_never_ends_the_process(materials, flips, record_property):
    """One that still spells every text without loss is another tokenizer; what was written with the old one says so."""
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, materials["tokenizer"], str(flips)],
        capture_output=True, text=True, timeout=60 + flips / 10, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    cases, refused, loaded = map(int, done.stdout.split())
    assert refused > cases / 3
    record_property("figure", f"{cases:,} files: {refused:,} refused, {loaded:,} harmless, 0 crashes")


# --- settings ---

TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:pathlib.Path.touch [{canary}]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1]",
]


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_in_settings_runs_nothing(tmp_path, refused, canary, tag):
    for settings in (f"seed: {tag}", tag, f"{tag}: 1"):
        (tmp_path / "run.yaml").write_text(settings.format(canary=canary))
        assert "run.yaml" in refused("pretrain", "--config", tmp_path / "run.yaml")


LAUGHS = "".join(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghij"))

SETTINGS = {
    "a billion values of ten lines": ("a: &a [x]\n" + LAUGHS, "*copies are not read; write them out"),
    "a mapping that holds itself": ("model: &a {d_model: *a}", "*copies are not read; write them out"),
    "10,000 brackets": ("seed: " + "[" * 10_000, "nested too deeply"),
    "100,000 dashes": ("- " * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize(("text", "complaint"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_would_take_all_memory_or_hours_are_refused_at_once(tmp_path, refused, text, complaint):
    (tmp_path / "run.yaml").write_text(text)
    line = refused("pretrain", "--config", tmp_path / "run.yaml")
    assert "run.yaml" in line and f"not valid YAML: {complaint}" in line


# --- data ---


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".jsonl.gz", ".txt.zst"])
def test_a_pickle_in_place_of_data_never_runs(tmp_path, bombs, refused, materials, suffix):
    for name, bomb in bombs.items():
        if (name, suffix) != ("yaml", ".txt"):  # that one is a text
            (tmp_path / f"data{suffix}").write_bytes(bomb)
            words = ["--tokenizer_path", materials["tokenizer"], "--save_dir", tmp_path / "tokens"]
            assert "records are bad, the first" in refused(
                "preprocess", "text", "--input", tmp_path / f"data{suffix}", *words
            )
            shutil.rmtree(tmp_path / "tokens")


# --- links ---


def test_links_are_followed_because_a_model_may_lie_on_another_disk(bundle, tmp_path, capsys):
    """A hub's cache is a folder of links. Whoever unpacks an archive of others should look for links in it."""
    for file in bundle.iterdir():
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    assert cli.main(["generate", str(bundle), "--prompt", "Once", "--max_tokens", "1"]) == 0
    assert capsys.readouterr().out


# --- memory ---

MEASURED = """
import re, sys
from pathlib import Path
from nanollm.cli import main
code = main(sys.argv[1:])
print(code, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak_mb(*words):
    """(exit code, the most memory that a command had at once, what it said)."""
    command = [sys.executable, "-c", MEASURED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    code, kilobytes = done.stdout.splitlines()[-1].split()
    assert "Traceback" not in done.stderr
    return int(code), int(kilobytes) / 1024, done.stderr


def packed(path, megabytes, content=b"\0"):
    opener = gzip.open if path.suffix == ".gz" else zstandard.open
    with opener(path, "wb") as file:
        for _ in range(megabytes):
            file.write(content * 2**20)
    return path


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory by /proc")


@needs_proc
@pytest.mark.slow
def test_a_gigabyte_that_was_packed_into_a_megabyte_takes_less_than_a_gigabyte(materials, tmp_path, record_property):
    """.txt is read in documents of 16 MiB; in .jsonl and .csv a line of that length is a bad record."""

    def prepare(file):
        words = ["--tokenizer_path", materials["tokenizer"], "--save_dir", tmp_path / file.name.replace(".", "-")]
        code, peak, said = peak_mb("preprocess", "text", "--input", file, "--val_fraction", 0, *words)
        assert (code, "nothing to train on" in said) == ((0, False) if ".txt" in file.name else (2, True))
        return peak

    (tmp_path / "small.txt").write_text("the sea")
    base = prepare(tmp_path / "small.txt")
    names = ("zeros.txt.gz", "zeros.txt.zst", "zeros.jsonl.gz", "zeros.jsonl.zst", "zeros.csv.gz")
    peaks = {name: prepare(packed(tmp_path / name, 1024)) - base for name in names}
    peaks["letters.txt.gz"] = prepare(packed(tmp_path / "letters.txt.gz", 1024, b"a")) - base
    assert max(peaks.values()) < 1024
    record_property("figure", ", ".join(f"{name} {peak:+.0f} MB" for name, peak in peaks.items()))


def named(form, count):
    return safetensors(b"{" + b",".join(b'"' + form % number + b'":' + EMPTY for number in range(count)) + b"}")


EMPTY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@needs_proc
@pytest.mark.slow
def test_a_header_of_a_hundred_megabytes_takes_less_than_a_gigabyte(bundle, foreign, tmp_path, record_property):
    _, base, _ = peak_mb("generate", bundle, "--prompt", "Once", "--max_tokens", 1)
    peaks = {}
    for name, content in (
        ("10^6 tensors", named(b"t%d", 10**6)),
        ("all that a header may name", named(b"model.layers.%d.x", 200_000)),
        ("100 MB of notes", safetensors({"__metadata__": {"a": "a" * 99_000_000}})),
    ):
        spoilt(bundle, "model.safetensors", content)
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(foreign, folder)
        (folder / "model.safetensors").write_bytes(content)
        for words in (["generate", bundle, "--prompt", "Once"], ["import", folder, "--out", tmp_path / "imported"]):
            code, peak, _ = peak_mb(*words)
            assert code == 2
            peaks[f"{words[0]} {name}"] = peak - base
    folder = shutil.copytree(foreign, tmp_path / "json")
    (folder / "config.json").write_bytes(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}")
    peaks["import a config.json of 30 MB"] = peak_mb("import", folder, "--out", tmp_path / "imported")[1] - base
    assert max(peaks.values()) < 1024
    record_property("figure", ", ".join(f"{name} {peak:+.0f} MB" for name, peak in peaks.items()))


# --- the code ---

UNPICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "tarfile", "zipfile")
CALLS = ("torch.load", "np.load", "numpy.load", "eval", "exec", "os.system", "os.popen", "shutil.unpack_archive")
YAML_CALLS = ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.UnsafeLoader", "yaml.Loader")
SWITCHES = ("allow_pickle", "weights_only", "shell", "trust_remote_code")


def test_nothing_in_the_package_can_read_a_pickle_or_unpack_an_archive(record_property):
    """torch.distributed pickles the small values that processes of one job send each other; no file is involved."""
    files, found = sorted((ROOT / "nanollm").rglob("*.py")), []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    used = [alias.name.partition(".")[0] for alias in names]
                case ast.ImportFrom(module=str(module), names=names):
                    used = [module.partition(".")[0], *(f"{module}.{alias.name}" for alias in names)]
                case ast.Attribute() | ast.Name():
                    used = [ast.unparse(node)]
                case ast.keyword(arg=str(arg)):
                    used = [arg]
                case _:
                    used = []
            found += [f"{file.name}: {name}" for name in used if name in UNPICKLERS + CALLS + YAML_CALLS + SWITCHES]
    assert found == []
    record_property("figure", f"{len(files)} modules, none imports or calls what unpickles")
