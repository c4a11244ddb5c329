"""A card says what is recorded and measured of this very model, nothing else, and what it tells to type works."""

import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from nanollm.bundle import Bundle, build_model, load_bundle
from nanollm.evals import results
from nanollm.export.card import card, find_evaluations
from nanollm.export.dense_to_moe import exported_shape
from nanollm.export.hf import exported_weights, write_model
from nanollm.export.provenance import public
from nanollm.export.tokenizer_json import write_tokenizer
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
WIDE = replace(SHAPE, kv_lora_rank=256, qk_rope_head_dim=64)
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
    shared = {"optim": OptimConfig(lr=3e-3, warmup_steps=1), "dtype": "float32", "device": "cpu"}
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
            validation_problems=8,
            **shared,
        )
    )
    return home


@pytest.fixture(scope="module")
def bundle(runs):
    return load_bundle(runs / "grpo" / "bundle")


@pytest.fixture
def written(bundle):
    """written(**changes): the card of the reinforced model in the format compact."""

    def write(form="compact", dtype="f32", of=bundle, **changes):
        return card(of, form, dtype, **{"name": "ada/tiny", "license": "mit"} | changes)

    return write


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1].strip()


# --- where it comes from ---


def test_every_stage_is_told_with_its_data_and_its_length(written):
    told = section(written(), "How it was made").splitlines()
    assert [line.split()[3] for line in told if re.match(r"\d\. `nanollm ", line)] == ["pretrain,", "sft,", "grpo,"]
    assert "   - data: `tokens`" in told
    assert "   - 2 optimizer steps, 1,024 tokens" in told
    assert "   - 2 optimizer steps, 4 conversations" in told
    assert "   - 2 optimizer steps, 8 replies" in told
    assert "   - task: `words`" in told


def test_the_owner_of_the_machine_is_named_nowhere(written, bundle, runs, tmp_path):
    text = runs / "notes.txt"
    text.write_text("The king rode out.")
    asked = {"text": [text], "task": EvalTask(name="words"), "contamination": [text], "ngram": 1, "n": 2}
    measured = measure(runs, out=tmp_path, **asked)
    shown = written(evaluations=[measured])
    assert OWNER in json.dumps(bundle.provenance)
    assert OWNER in json.dumps(measured)
    assert OWNER not in json.dumps(public(bundle.provenance))
    assert OWNER not in shown
    assert "notes.txt, " in shown


@pytest.mark.parametrize("odd", [{"config": {"train": {}}}, {"config": {"task": 3}}])
def test_a_history_that_cannot_be_read_is_said_to_be_so(written, bundle, odd):
    told = written(of=replace(bundle, provenance={"made_by": "grpo\n## Results\n99 %"} | odd))
    lines = "1. `grpo ## Results 99 %`\n   - what is recorded of this step cannot be read"
    assert section(told, "How it was made").startswith(lines)


# --- how good it is ---


def measure(runs, **settings):
    """The content of an eval.json beside the reinforced model."""
    given = {"bundle": runs / "grpo" / "bundle", "max_tokens": 4, "dtype": "float32", "device": "cpu"}
    return json.loads(evaluation.run(evaluation.Config(**given | settings, json=True)))


def test_the_card_has_the_lines_of_nanollm_eval_about_this_very_bundle(written, runs, capsys):
    text = runs / "story.txt"
    text.write_text("The king rode out. " * 9)
    mine = measure(runs, task=EvalTask(name="words", levels=[1]), text=[text], n=3, against=runs / "sft" / "bundle")
    measure(runs, bundle=runs / "sft" / "bundle", text=[text], out=runs / "grpo" / "eval" / "sft")
    capsys.readouterr()
    found = find_evaluations(runs / "grpo" / "bundle")
    assert found == [mine]
    other = runs / "grpo" / "eval" / "sft" / "eval.json"
    assert capsys.readouterr().err.startswith(f"{other} is about another model than")
    told = section(written(evaluations=found), "Results").splitlines()
    alone = {name: each for name, each in mine.items() if name in ("bundle", "settings")}
    assert told[2:-1] == [f"- {line}" for line in results.lines(public(alone))]
    assert any(re.fullmatch(r"- story.txt, 171 bytes: \d\.\d{4} bits per byte, n 1", line) for line in told)
    assert "sft" not in " ".join(told)


def test_without_an_evaluation_the_card_has_the_last_validation_and_says_where_it_is_recorded(written, runs):
    told = section(written(), "Results")
    assert "There is no eval.json of this model." in told and "`metrics` in `provenance.json`" in told
    assert told.endswith("- 0.0 % (0.0 to 32.4) of 8 test problems solved, greedily")
    assert re.search(
        r"- \d\.\d{4} nats per token$", section(written(of=load_bundle(runs / "sft" / "bundle")), "Results")
    )


def test_without_any_figures_nothing_is_said_to_be_measured(written, bundle):
    unmeasured = replace(bundle, provenance={"made_by": "a test"})
    assert section(written(of=unmeasured), "Results") == "Nothing was measured: there is no eval.json of this model."


# --- what it is, and how to run it ---


def test_the_hub_reads_the_metadata_as_it_was_meant(written):
    read = ModelCard(written(language="en")).data
    assert (read.license, read.language, read.pipeline_tag) == ("mit", "en", "text-generation")
    assert (read.library_name, read.eval_results) == ("transformers", None)
    assert {"nanollm", "mixture-of-experts"} <= set(read.tags)


@pytest.mark.parametrize(
    "shape",
    [WIDE, SHAPE, replace(WIDE, n_blocks=8)],
    ids=["as it is", "widened", "filled up"],
)
def test_the_parameters_of_the_table_are_those_of_the_file(written, shape, tokenizer):
    bundle = Bundle(build_model(shape), tokenizer, {})
    text = section(written(form="deepseek-v3", of=bundle), "The model")
    told = re.search(r"The file holds ([\d,]+) parameters", text)
    bundle.model.to_empty(device="cpu").init(0)
    numbers = exported_weights(bundle, "deepseek-v3", torch.float32)
    stored = sum(each.numel() for name, each in numbers.items() if not name.endswith("e_score_correction_bias"))
    assert f"| parameters | {shape.total_parameters:,}, of which a token meets {shape.active_parameters:,} |" in text
    assert (told is None) == (exported_shape(shape, "deepseek-v3") == shape)
    assert ("widened to a latent of 512" in text) == (shape.kv_lora_rank != 256)
    assert stored == (int(told[1].replace(",", "")) if told else shape.total_parameters)


@pytest.mark.parametrize(("run", "form"), [("pretrain", "compact"), ("grpo", "deepseek-v3")])
def test_the_lines_for_transformers_run(written, runs, run, form, tmp_path, monkeypatch, capsys):
    bundle = load_bundle(runs / run / "bundle")
    write_model(tmp_path, bundle, form, torch.float32)
    write_tokenizer(tmp_path, bundle.tokenizer, SHAPE.context_length)
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", written(form=form, of=bundle, name="tiny"), re.DOTALL)
    assert ("messages" in lines) == (run == "grpo")
    exec(compile(lines, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_card_says_what_the_model_was_tuned_for(written, bundle, runs):
    text = written()
    assert len(bundle.examples) == 3
    assert "\n".join(f"- `{question}`" for question in bundle.examples) in text
    assert json.dumps(bundle.examples[0]) in section(text, "How to run it")
    assert "It was tuned for" not in written(of=load_bundle(runs / "pretrain" / "bundle"))


def test_a_base_model_is_called_one_and_has_no_chat_format(written, runs):
    base, chat = written(of=load_bundle(runs / "pretrain" / "bundle")), written()
    assert "It continues texts; it was not taught to reply." in base
    assert "## Chat format" not in base
    assert "It replies to messages." in chat
    assert "<s><|system|>Answer briefly.<|end|><|user|>" in section(chat, "Chat format")


def test_vllm_is_named_only_where_it_has_kernels_for_the_shape(written, tokenizer):
    wide = Bundle(build_model(WIDE), tokenizer, {})
    narrow = Bundle(build_model(SHAPE), tokenizer, {})
    for of, widen, runs in ((wide, "off", True), (narrow, "auto", True), (narrow, "off", False)):
        text = written(form="deepseek-v3", of=of, widen=widen)
        assert ("vllm serve ada/tiny --dtype bfloat16" in text) == runs


def test_a_gguf_is_run_by_its_name(written):
    text = written(form="gguf", dtype="q8_0", file="Tiny-q8_0.gguf")
    assert "llama-server -m Tiny-q8_0.gguf" in text
    assert "ollama create tiny-q8_0 -f Modelfile" in text
    assert "transformers" not in section(text, "How to run it")
    assert ModelCard(text).data.library_name == "llama.cpp"
    assert "| format | gguf, q8_0 |" in text


def test_a_card_says_what_other_engines_lack(runs):
    bundle = load_bundle(runs / "grpo" / "bundle")
    text = card(bundle, "compact", "f32", name="x", license="mit")
    assert "add_special_tokens=False" in text
    assert "calculator" not in text
    with_tool = replace(bundle, tools=["calculator"])
    assert "a tool that other engines do not have (calculator)" in card(
        with_tool, "compact", "f32", name="x", license="mit"
    )
