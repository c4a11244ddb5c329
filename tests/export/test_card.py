"""A card says what is recorded and measured of this very model, nothing else, and what it tells to type works."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from nanollm.bundle import load_bundle, save_bundle
from nanollm.durable import sha256_of
from nanollm.evals import results
from nanollm.export.card import About, card, find_evaluations, write_card
from nanollm.export.dense_to_moe import Placement
from nanollm.export.hf import exported_weights, write_model
from nanollm.export.provenance import find_manifests, public
from nanollm.export.tokenizer_json import write_tokenizer
from nanollm.model.transformer import Transformer
from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.tasks import TaskConfig
from nanollm.stages import eval as evaluation
from nanollm.stages import grpo, preprocess, pretrain, sft
from nanollm.stages.eval import EvalTask
from nanollm.stages.preprocess import WordsConfig
from nanollm.train.optim import OptimConfig
from nanollm.train.run import TrainConfig
from tests.conftest import STORY
from tests.stages.conftest import MODEL

SHAPE = replace(MODEL, context_length=256)
OWNER = "ada-lovelace"  # of the machine; her name is in every path


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory):
    """A folder of runs: a model that was pretrained, fine-tuned and reinforced, two steps each."""
    home = tmp_path_factory.mktemp(OWNER)
    tokenizer.save(home / "story.model")
    texts = [json.dumps({"text": STORY.read_text("utf-8")[start:]}) + "\n" for start in range(20)]
    (home / "texts.jsonl").write_text("".join(texts))
    prepared = {"tokenizer_path": home / "story.model", "val_fraction": 0.2}
    words = WordsConfig(levels=[1], count=40)
    for data in (
        preprocess.Config(kind="text", input=[home / "texts.jsonl"], save_dir=home / "tokens", **prepared),
        preprocess.Config(kind="words", words=words, save_dir=home / "lessons", **prepared),
    ):
        preprocess.run(data)
    length = {"steps": 2, "validate_every": 0, "save_every": 0}
    shared = {"optim": OptimConfig(warmup_steps=1), "dtype": "float32", "device": "cpu"}
    pretrain.run(
        pretrain.Config(
            model=SHAPE,
            tokenizer_path=home / "story.model",
            data=home / "tokens",
            out=home / "pretrain",
            train=TrainConfig(batch_size=2, micro_batch_size=2, sample_every=0, **length),
            **shared,
        )
    )
    sft.run(
        sft.Config(
            bundle=home / "pretrain" / "bundle",
            data=str(home / "lessons"),
            out=home / "sft",
            train=sft.ChatTrainConfig(batch_size=2, micro_batch_size=1, sample_every=0, **length),
            **shared,
        )
    )
    grpo.run(
        grpo.Config(
            bundle=home / "sft" / "bundle",
            out=home / "grpo",
            task=TaskConfig(name="words", levels=[1]),
            train=grpo.GrpoTrainConfig(**length),
            rollout=RolloutConfig(prompts=2, group_size=2, max_tokens=4),
            validation_problems=0,
            **shared,
        )
    )
    return home


@pytest.fixture
def about(runs):
    """about(**changes): of the reinforced model, in the format compact."""
    bundle = runs / "grpo" / "bundle"
    provenance = json.loads((bundle / "provenance.json").read_bytes())
    defaults = {
        "name": "ada/tiny",
        "address": "ada/tiny",
        "is_base": False,
        "format": "compact",
        "dtype": "f32",
        "config": SHAPE,
        "provenance": provenance,
        "license": "mit",
        "manifests": find_manifests(provenance),
    }
    return lambda **changes: About(**defaults | changes)


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1].strip()


# --- where it comes from ---


def test_every_stage_is_told_with_its_data_its_length_and_its_optimizer(about, runs):
    told = section(card(about()), "How it was made").splitlines()
    manifest = runs / "tokens" / "manifest.json"
    train = json.loads(manifest.read_bytes())["splits"]["train"]
    size = f"{train['tokens']:,} tokens in {train['documents']} documents"
    assert [line.split()[3] for line in told if re.match(r"\d\. `nanollm ", line)] == ["pretrain,", "sft,", "grpo,"]
    assert f"   - data: `tokens` (manifest {sha256_of(manifest)[:12]}), {size} of `text`" in told
    assert "   - 2 optimizer steps, 1,024 tokens" in told
    assert "   - 2 optimizer steps, 4 conversations" in told
    assert "   - 2 optimizer steps, 8 replies" in told
    assert "   - task: name `words`, levels `[1]`, largest `20`, seed `0`" in told
    muon = "   - muon, learning rate 0.003 at its peak, schedule linear after 1 steps of warm-up, weight decay 0.1"
    assert told.count(muon) == told.count("   - seed 0, computed in float32 on cpu") == 3


def test_token_files_that_are_gone_or_changed_are_said_to_be_unknown(about):
    assert card(about(manifests={})).count(", made of what is not recorded") == 2


def test_a_manifest_counts_only_if_it_is_the_one_that_was_read(about, runs):
    provenance = json.loads((runs / "grpo" / "bundle" / "provenance.json").read_bytes())
    assert len(find_manifests(provenance)) == 2
    provenance["parent"]["inputs"]["data"] = {str(runs / "lessons"): "0" * 64}
    assert len(find_manifests(provenance)) == 1


def test_the_owner_of_the_machine_is_named_nowhere(about, runs, tmp_path):
    text = runs / "notes.txt"
    text.write_text("The king rode out.")
    asked = {"text": [text], "task": EvalTask(name="words"), "contamination": [text], "ngram": 1, "n": 2}
    measured = measure(runs, out=tmp_path, **asked)
    shown = card(about(evaluations=[measured]))
    assert OWNER in json.dumps(about().provenance)
    assert OWNER in json.dumps(measured)
    assert OWNER not in json.dumps(public(about().provenance))
    assert OWNER not in shown
    assert "notes.txt: " in shown
    task = {"name": "gsm8k", "input": [f"/srv/{OWNER}/problems.jsonl"]}
    shown = card(about(provenance={"made_by": "grpo", "config": {"task": task}}))
    assert "task: name `gsm8k`, input `['problems.jsonl']`" in shown
    assert OWNER not in shown


@pytest.mark.parametrize("odd", [{"config": {"train": {}}}, {"config": {"task": 3}}, {"inputs": {"data": {"x": 3}}}])
def test_a_history_that_cannot_be_read_is_said_to_be_so(about, odd):
    told = section(card(about(provenance={"made_by": "grpo\n## Results\n99 %"} | odd)), "How it was made")
    assert told.startswith("1. `grpo ## Results 99 %`\n   - what is recorded of this step cannot be read")


def test_what_others_trained_is_said_to_be_imported(about):
    imported = {"made_by": "x", "folder": "theirs", "format": "deepseek_v3", "files": {}, "changes": ["4 marks added"]}
    told = section(
        card(about(provenance={"made_by": "nanollm 0.1.0 import", "imports": [imported]})), "How it was made"
    )
    assert "1. `nanollm 0.1.0 import`\n   - data and settings are not recorded" in told
    assert "   - imported from `theirs`, `deepseek_v3; 4 marks added`" in told


# --- how good it is ---


def measure(runs, **settings):
    """The content of an eval.json beside the reinforced model."""
    given = {"bundle": runs / "grpo" / "bundle", "max_tokens": 4, "dtype": "float32", "device": "cpu"}
    return json.loads(evaluation.run(evaluation.Config(**given | settings, json=True)))


@pytest.fixture(scope="module")
def evaluations(runs):
    """Two evaluations of the reinforced model, and two that must not count: of another model, and of it before."""
    text = runs / "story.txt"
    text.write_text("The king rode out. " * 9)
    measure(runs, text=[text])
    measure(runs, task=EvalTask(name="words", levels=[1]), n=3, samples=2, against=runs / "sft" / "bundle")
    measure(runs, bundle=runs / "sft" / "bundle", text=[text], out=runs / "grpo" / "eval" / "sft")
    old = json.loads((runs / "grpo" / "eval" / "text" / "eval.json").read_bytes())
    old["bundle"]["digest"] = "0" * 64
    (runs / "grpo" / "eval" / "old").mkdir()
    (runs / "grpo" / "eval" / "old" / "eval.json").write_text(json.dumps(old))
    return runs / "grpo" / "eval"


def test_only_evaluations_of_this_very_bundle_count_and_the_others_are_said(runs, evaluations, capsys):
    found = find_evaluations(runs / "grpo" / "bundle")
    assert [each["settings"]["task"]["name"] for each in found] == ["none", "words"]
    said = capsys.readouterr().err
    assert f"{evaluations / 'old' / 'eval.json'} is about another model than" in said
    assert f"{evaluations / 'sft' / 'eval.json'} is about another model than" in said
    assert said.count("\n") == 2


def test_results_are_the_lines_of_nanollm_eval_without_the_other_model(about, runs, evaluations):
    found = find_evaluations(runs / "grpo" / "bundle")
    told = section(card(about(evaluations=found)), "Results").splitlines()
    alone = {name: each for name, each in found[1].items() if name not in ("against", "difference")}
    assert [f"- {line}" for line in results.lines(alone)] == [
        line for line in told if "words test" in line or "replies:" in line
    ]
    assert any(re.fullmatch(r"- story.txt: \d\.\d{4} bits per byte of 171 bytes, n 1", line) for line in told)
    assert "sft" not in " ".join(told)
    assert any(line.endswith("in float32, at most 4 tokens a reply") for line in told)


def test_where_nothing_was_measured_the_card_says_so(about):
    assert section(card(about()), "Results") == "Nothing was measured: there is no eval.json of this model."


@pytest.mark.parametrize("content", ["{", "[]", '{"bundle": {}}'])
def test_an_eval_json_that_is_none_is_refused(runs, tmp_path, content):
    shutil.copytree(runs / "grpo" / "bundle", tmp_path / "bundle")
    (tmp_path / "eval" / "odd").mkdir(parents=True)
    (tmp_path / "eval" / "odd" / "eval.json").write_text(content)
    with pytest.raises(ValueError, match=r"odd/eval.json is not what nanollm eval writes .*; measure again"):
        find_evaluations(tmp_path / "bundle")


# --- metadata ---


def test_the_hub_reads_the_metadata_as_it_was_meant(about, runs, evaluations, tmp_path):
    found = find_evaluations(runs / "grpo" / "bundle")
    write_card(tmp_path, about(evaluations=found, language="en"))
    read = ModelCard.load(tmp_path / "README.md").data
    assert (read.license, read.language, read.pipeline_tag) == ("mit", "en", "text-generation")
    assert (read.library_name, read.eval_results) == ("transformers", None)
    assert {"nanollm", "mixture-of-experts"} <= set(read.tags)


def test_datasets_are_named_where_they_were_read_from_the_hub(about):
    def named(**source):
        splits = {"train": {"tokens": 1, "documents": 1}}
        return ModelCard(card(about(manifests={"0" * 64: {"source": source, "splits": splits}}))).data.datasets

    assert named(dataset="owt", files=None) == ["Skylion007/openwebtext"]
    assert named(dataset="Elriggs/openwebtext-100k", files=None) == ["Elriggs/openwebtext-100k"]
    assert named(dataset="owt", files=[["a.parquet", 3]]) is None
    assert named(dataset=f"/srv/{OWNER}", files=None) is None
    asked = {"config": {"task": {"name": "gsm8k", "input": []}}, "made_by": "grpo"}
    assert ModelCard(card(about(provenance=asked))).data.datasets == ["openai/gsm8k"]


# --- what it is, and how to run it ---


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, n_blocks=8)], ids=["as it is", "filled up"])
def test_the_parameters_of_the_table_are_those_of_the_file(about, shape, tokenizer, tmp_path):
    weights = Transformer(shape).init(0).state_dict()
    bundle = load_bundle(save_bundle(tmp_path / "bundle", shape, weights, tokenizer, {}))
    text = section(card(about(config=shape, format="deepseek-v3")), "The model")
    told = re.search(r"The file holds ([\d,]+) parameters", text)
    numbers = exported_weights(bundle, "deepseek-v3", torch.float32)
    stored = sum(each.numel() for name, each in numbers.items() if not name.endswith("e_score_correction_bias"))
    assert f"| parameters | {shape.total_parameters:,}, of which a token meets {shape.active_parameters:,} |" in text
    assert (told is None) == (Placement.of(shape).after == shape)
    assert stored == (int(told[1].replace(",", "")) if told else shape.total_parameters)


@pytest.mark.parametrize("run", ["pretrain", "grpo"])
@pytest.mark.parametrize("form", ["compact", "deepseek-v3"])
def test_the_lines_for_transformers_run(about, runs, run, form, tmp_path, capsys):
    bundle = load_bundle(runs / run / "bundle")
    write_model(tmp_path, bundle, form, torch.float32)
    write_tokenizer(tmp_path, bundle.tokenizer, SHAPE.context_length)
    told = {"address": str(tmp_path), "is_base": bundle.is_base, "provenance": bundle.provenance}
    text = card(about(format=form, **told))
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert ("messages" in lines) == (run == "grpo")
    exec(compile(lines, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_base_model_is_called_one_and_has_no_chat_format(about):
    base, chat = card(about(is_base=True)), card(about())
    assert "It continues texts; it was not taught to reply." in base
    assert "## Chat format" not in base
    assert "It replies to messages." in chat
    assert "<s><|system|>Answer briefly.<|end|><|user|>" in section(chat, "Chat format")


def test_vllm_is_named_only_where_it_has_kernels_for_the_shape(about):
    wide = replace(SHAPE, kv_lora_rank=256, qk_rope_head_dim=64)
    assert "vllm serve ada/tiny --dtype bfloat16" in card(about(format="deepseek-v3", config=wide))
    narrow = card(about(format="deepseek-v3"))
    assert "vllm serve" not in narrow
    assert "take a cache of 320 or 576 numbers per token and block, this model's has 24" in narrow


def test_a_gguf_is_run_by_its_name(about):
    text = card(about(name="ada/Tiny", format="gguf", dtype="q8_0", gguf="Tiny-q8_0.gguf"))
    assert "llama-server -m Tiny-q8_0.gguf" in text
    assert "ollama create tiny-q8_0 -f Modelfile" in text
    assert "transformers" not in section(text, "How to run it")
    assert ModelCard(text).data.library_name == "llama.cpp"
    assert "| format | gguf, q8_0 |" in text
