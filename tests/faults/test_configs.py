"""A mistake in a YAML file or on the command line is refused in one line that names the key, before anything is read,
built or written."""

import importlib
import math
import tracemalloc
from collections.abc import Mapping
from dataclasses import is_dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm import cli
from nanollm.config import CONFIGS, SWITCHES, kinds_of, load_preset, notation, read_mapping, to_yaml

FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
NO_LIMIT = ("objective.cispo_max", "objective.importance_cap")  # where infinity is a value like others: no cap


def verb_of(file):
    """The verb that a file is for; of a model's preset, one that reads it as options."""
    kind = file.partition("/")[0]
    return "pretrain" if kind == "model" else kind


def options_of(file):
    kinds = kinds_of(stage_of(file))
    return {name: kind for name, kind in kinds.items() if name != "config" and name not in SWITCHES}


def stage_of(file):
    return importlib.import_module(cli.module_of(verb_of(file)))


def read(file):
    """The settings of a file, with those of its model in full."""
    given = read_mapping(CONFIGS / file)
    if file.startswith("model/"):
        return read(PRETRAIN) | {"model": given}
    return given | ({"model": load_preset("model", given["model"])} if "model" in given else {})


def put(given, key, value):
    """A copy of the settings with one changed."""
    head, _, rest = key.partition(".")
    if not rest:
        return given | {head: value}
    inside = given.get(head)
    return given | {head: put(inside if isinstance(inside, Mapping) else {}, rest, value)}


class Bench:
    """Runs verbs up to where their work would begin."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.begun = []
        self.refused = 0

    def run(self, file, given, *words):
        """Exit code and what was said."""
        path = self.folder / "given.yaml"
        path.write_text(to_yaml(given), encoding="utf-8")
        self.begun.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage_of(file), "run", self.begun.append)
            code = cli.main([verb_of(file), "--config", str(path), *words])
        said = self.capsys.readouterr()
        assert said.out == ""
        return code, said.err

    def refuses(self, file, given, keys, *words):
        code, said = self.run(file, given, *words)
        what = f"{file} {keys} {words}: {said}"
        assert (code, self.begun) == (2, []), what
        assert said.startswith(f"nanollm {verb_of(file)}: ") and said.count("\n") == 1, what
        assert all(key in said for key in keys), what
        self.refused += 1


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """In an empty folder, that nothing may be added to."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield Bench(tmp_path, capsys)
    assert list((tmp_path / "cwd").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"cwd", "given.yaml"}


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_taken_as_it_is(bench, file):
    assert bench.run(file, read(file)) == (0, "")
    assert len(bench.begun) == 1


# One wrong value.

VALUES = {
    "text": "banana",
    "empty text": "",
    "number": -1,
    "fraction": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "huge": 10**30,
    "endless": 10**400,
    "null": None,
    "list": [["banana"]],
    "mapping": {"banana": {"banana": 1}},
}
RIGHT = {  # which of them an option of a kind takes; all else, and each word of a choice, takes none
    "text": {"text", "empty text"},
    "text ...": {"text", "empty text"},
    "path": {"text"},
    "path ...": {"text"},
    "float": {"fraction", "huge"},  # where it is not too large for the option's own rule
    "null": {"null"},
}


def wrong_values(key, kind):
    """Names of values that cannot be right."""
    if is_dataclass(kind):
        return [name for name in VALUES if name != "null"] + ["null"]
    right = set().union(*(RIGHT.get(part, set()) for part in notation(kind).split("|")))
    return [name for name in VALUES if name not in right and not (name == "inf" and key in NO_LIMIT)]


def takes_one_of_a_few_words(kind):
    parts = notation(kind).replace(" ", "|").split("|")
    return not is_dataclass(kind) and kind is not bool and not {"text", "path", "{text:"} & set(parts)


@st.composite
def mistakes(draw):
    """A file, its settings with one mistake, the words beside it, and the key that must be named."""
    file = draw(st.sampled_from(FILES))
    given, kinds = read(file), options_of(file)
    sections = ["", *(f"{name}." for name, kind in kinds.items() if is_dataclass(kind))]
    how = draw(st.sampled_from(["unknown", "wrong", "wrong", "wrong word"]))
    if how == "unknown":
        key = draw(st.sampled_from(sections)) + draw(st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True))
        if key in kinds or any(name.startswith(f"{key}.") for name in kinds) or f"{key}." in sections:
            key += "_zzz"
        return file, put(given, key, draw(st.sampled_from(list(VALUES.values())))), (), key
    if how == "wrong word":  # for a number or a choice: texts and paths take every word, and a switch takes none
        kinds = {name: kind for name, kind in kinds.items() if takes_one_of_a_few_words(kind)}
    key = draw(st.sampled_from(sorted(kinds)))
    name = draw(st.sampled_from(wrong_values(key, kinds[key])))
    if how == "wrong":
        return file, put(given, key, VALUES[name]), (), key
    word = "null" if VALUES[name] is None else str(VALUES[name])
    return file, given, (f"--{key}={word}",), key


@pytest.mark.parametrize("examples", [15, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_one_mistake_is_refused_and_its_key_named(bench, record_property, examples):
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(mistakes())
    def check(mistake):
        file, given, words, key = mistake
        bench.refuses(file, given, [key], *words)

    check()
    told = f"{bench.refused} of {bench.refused} mistakes refused in one line with their key, nothing begun"
    record_property("figure", told)


# Values that each have the right type, and make no sense, alone or together.

MODEL, PRETRAIN, SFT, GRPO = (
    "model/nano-1m.yaml",
    "pretrain/nano-5m.yaml",
    "sft/nano-1m-words.yaml",
    "grpo/nano-1m-words.yaml",
)
OWT, WORDS, TOKENIZER, CURATE = (
    "preprocess/owt.yaml",
    "preprocess/words.yaml",
    "tokenizer/owt-50304.yaml",
    "curate/local.yaml",
)
SIZES = [
    "context_length",
    "d_model",
    "n_blocks",
    "n_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "v_head_dim",
    "d_ff",
    "d_expert",
]

IMPOSSIBLE = [
    *((MODEL, {f"model.{size}": value}, [f"model.{size}"]) for size in SIZES for value in (0, 10**9)),
    (MODEL, {"model.vocab_size": 0}, ["model.vocab_size"]),
    (MODEL, {"model.vocab_size": 65_537}, ["model.vocab_size"]),
    (MODEL, {"model.qk_rope_head_dim": 15}, ["model.qk_rope_head_dim"]),
    (MODEL, {"model.moe_every": 5}, ["model.n_blocks", "model.moe_every"]),
    (MODEL, {"model.n_dense_first": 4}, ["model.n_dense_first"]),
    (MODEL, {"model.n_dense_first": -1}, ["model.n_dense_first"]),
    (MODEL, {"model.experts_per_token": 3}, ["model.experts_per_token", "model.n_routed_experts"]),
    (MODEL, {"model.n_routed_experts": 0}, ["model.n_routed_experts"]),
    (MODEL, {"model.n_shared_experts": 0}, ["model.n_shared_experts"]),
    (MODEL, {"model.norm_topk_prob": True}, ["model.norm_topk_prob", "model.experts_per_token"]),
    (MODEL, {"model.rms_norm_eps": 1.0}, ["model.rms_norm_eps"]),
    *((MODEL, {"model.rope_theta": value}, ["model.rope_theta"]) for value in (0.0, math.nan)),
    (MODEL, {"model.d_model": 10**6, "model.n_blocks": 10**6}, ["model.d_model", "model.n_blocks"]),
    (PRETRAIN, {"train.micro_batch_size": 3}, ["train.batch_size", "train.micro_batch_size"]),
    (PRETRAIN, {"train.micro_batch_size": 16}, ["train.batch_size", "train.micro_batch_size"]),
    *(
        (PRETRAIN, {f"train.{name}": 0}, [f"train.{name}"])
        for name in ("steps", "log_every", "keep_last", "batch_size")
    ),
    *((PRETRAIN, {f"train.{name}_every": -1}, [f"train.{name}_every"]) for name in ("validate", "sample", "save")),
    (PRETRAIN, {"validation_windows": -1}, ["validation_windows"]),
    *(
        (file, {"seed": seed}, ["seed"])
        for file in (PRETRAIN, SFT, GRPO, OWT, TOKENIZER, CURATE)
        for seed in (-1, 2**63)
    ),
    *(
        (PRETRAIN, {f"optim.{name}": math.inf}, [f"optim.{name}"])
        for name in ("lr", "weight_decay", "eps", "max_grad_norm")
    ),
    *((PRETRAIN, {"optim.lr": value}, ["optim.lr"]) for value in (-1.0, math.nan)),
    (PRETRAIN, {"optim.eps": 0.0}, ["optim.eps"]),
    (PRETRAIN, {"optim.betas": (0.9, 1.0)}, ["optim.betas"]),
    (PRETRAIN, {"optim.momentum": 1.0}, ["optim.momentum"]),
    (PRETRAIN, {"optim.warmup_steps": -1}, ["optim.warmup_steps"]),
    (PRETRAIN, {"optim.decay_fraction": 1.5}, ["optim.decay_fraction"]),
    (PRETRAIN, {"optim.final_lr_fraction": 2.0}, ["optim.final_lr_fraction"]),
    *(
        (SFT, {"data": weights}, ["data"])
        for weights in ({}, {"a": 0.0}, {"a": math.nan}, {"a": math.inf}, {"a": -1.0}, {"a": 1, "./a": 1})
    ),
    *((SFT, {f"train.{name}": 0}, [f"train.{name}"]) for name in ("batch_size", "micro_batch_size")),
    (SFT, {"validation_conversations": -1}, ["validation_conversations"]),
    (GRPO, {"rollout.group_size": 1}, ["rollout.group_size"]),
    (GRPO, {"rollout.prompts": 0}, ["rollout.prompts"]),
    (GRPO, {"rollout.temperature": 0.0}, ["rollout.temperature"]),
    *(
        (GRPO, {"rollout.engine": value}, ["rollout.engine", "own or vllm://HOST:PORT"])
        for value in ("", "vllm", "http://x:1", "vllm://x", "vllm://x:0", "vllm://x:70000", "vllm://x:8000/v1")
    ),
    (GRPO, {"reference": "a"}, ["reference", "objective.beta"]),
    (GRPO, {"optim.balance_weight": 0.1}, ["optim.balance_weight"]),
    (GRPO, {"objective.clip_low": 1.0}, ["objective.clip_low"]),
    (GRPO, {"objective.cispo_max": 0.5}, ["objective.cispo_max"]),
    (GRPO, {"objective.importance_cap": 0.5}, ["objective.importance_cap"]),
    (GRPO, {"objective.updates": 0}, ["objective.updates"]),
    *((GRPO, {"reward.weights": value}, ["reward.weights"]) for value in ({}, {"correct": 0.0}, {"correct": math.nan})),
    (GRPO, {"reward.weights": {"banana": 1.0}}, ["reward.weights", "banana"]),
    (GRPO, {"reward.weights": {"length": 1.0}, "reward.soft_tokens": 97}, ["reward.soft_tokens", "rollout.max_tokens"]),
    *((GRPO, {"reward.timeout_s": value}, ["reward.timeout_s"]) for value in (0.0, 1e9)),
    *((GRPO, {"task.levels": value}, ["task.levels"]) for value in ([], [5], [1, 1])),
    (GRPO, {"task.largest": 4}, ["task.largest"]),
    *(
        (GRPO, {"task.name": value}, ["task.name must be words, gsm8k, guess or module:Name"])
        for value in ("banana", "word", "", "Doubles", "mine:", "my/mine:Doubles", "mine:a.b")
    ),
    *((GRPO, {"task.name": name}, ["task.levels is for words", name]) for name in ("gsm8k", "a:B")),
    *(
        (GRPO, {"task.name": name, "task.levels": [1, 2], "task.largest": 20, f"task.{key}": 9}, [f"task.{key} is for"])
        for name, key in (("gsm8k", "largest"), ("a:B", "seed"))
    ),
    (GRPO, {"task.input": ["a"]}, ["task.input", "gsm8k"]),
    (GRPO, {"validation_problems": -1}, ["validation_problems"]),
    *((OWT, {"val_fraction": value}, ["val_fraction"]) for value in (1.0, -0.1, math.nan)),
    *((OWT, {name: 0}, [name]) for name in ("max_tokens_train", "shard_tokens", "flush_every", "num_workers")),
    (OWT, {"max_tokens_val": -1}, ["max_tokens_val"]),
    (OWT, {"words.largest": 9}, ["--words", "owt"]),
    (OWT, {"kind": "sni", "val_input": ["a"]}, ["--val_input", "text, chat"]),
    (OWT, {"input": ["a"], "dataset_name": "a/b"}, ["--input", "--dataset_name"]),
    (OWT, {"kind": "text", "input": ["a"], "dataset_name": "a/b"}, ["--input", "--dataset_name"]),
    (WORDS, {"dataset_name": "a/b"}, ["--dataset_name", "words"]),
    (OWT, {"dataset_name": ""}, ["dataset_name"]),
    (OWT, {"kind": "chat"}, ["chat", "--input"]),
    (OWT, {"kind": "text"}, ["text", "--input", "--dataset_name"]),
    (OWT, {"kind": "gsm8k", "dataset_name": "a/b"}, ["--dataset_name", "gsm8k"]),
    (WORDS, {"input": ["a"]}, ["words", "--input"]),
    *((WORDS, {"words.count": value}, ["words.count"]) for value in (0, 2**31)),
    (WORDS, {"words.levels": [0]}, ["words.levels"]),
    (WORDS, {"words.largest": 4}, ["words.largest"]),
    *((TOKENIZER, {"vocab_size": value}, ["vocab_size"]) for value in (0, 272, 65_537)),
    (TOKENIZER, {"corpus": ["a"]}, ["--dataset_name", "--corpus"]),
    (TOKENIZER, {"dataset_name": None}, ["--dataset_name", "--corpus"]),
    *((TOKENIZER, {"model_name": value}, ["model_name"]) for value in ("", "a/b")),
    (TOKENIZER, {"held_out": 0.6}, ["held_out"]),
    (TOKENIZER, {"sample_bytes": 0}, ["sample_bytes"]),
    *((TOKENIZER, {name: ""}, [name]) for name in ("split", "text_column")),
    (CURATE, {"input": []}, ["--input"]),
    *((CURATE, {name: value}, [name]) for name in ("tasks", "workers", "mem_gb") for value in (0, 10**9)),
    (CURATE, {"executor": "slurm"}, ["--executor", "--slurm.partition"]),
    (CURATE, {"val_fraction": 1.0}, ["val_fraction"]),
]


def changed(config, changes):
    """The config with other values at these dotted names, as its own dataclasses take them."""
    inside = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        inside.setdefault(head, {})[rest] = value
    return replace(
        config,
        **{name: some[""] if "" in some else changed(getattr(config, name), some) for name, some in inside.items()},
    )


def test_impossible_values_and_pairs_are_refused_by_the_configs_and_their_keys_named(bench, record_property):
    configs = {}
    for file in dict.fromkeys(file for file, _, _ in IMPOSSIBLE):
        assert bench.run(file, read(file)) == (0, "")
        (configs[file],) = bench.begun
    tracemalloc.start()
    for file, changes, keys in IMPOSSIBLE:
        with pytest.raises(ValueError) as refusal:
            changed(configs[file], changes)
        assert all(key in str(refusal.value) for key in keys), f"{file} {changes}: {refusal.value}"
        assert "\n" not in str(refusal.value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    record_property(
        "figure", f"{len(IMPOSSIBLE)} of {len(IMPOSSIBLE)} refused, {peak / 2**10:.0f} KiB allocated at most"
    )


@pytest.mark.slow
def test_impossible_values_and_pairs_in_a_file_are_refused_in_one_line(bench, record_property):
    for file, changes, keys in IMPOSSIBLE:
        given = read(file)
        for key, value in changes.items():
            given = put(given, key, list(value) if isinstance(value, tuple) else value)
        bench.refuses(file, given, keys)
    record_property("figure", f"{bench.refused} of {len(IMPOSSIBLE)} refused in one line with all keys")
