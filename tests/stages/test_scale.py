"""A ladder is trained by pretrain's own code, resumes, and is what plan and pretrain --budget go by."""

import dataclasses
import json
import shutil

import pytest

from nanollm import cli
from nanollm.config import parse_options, read_mapping, to_yaml
from nanollm.durable import read_json
from nanollm.hardware import Hardware
from nanollm.stages import plan, pretrain, scale
from nanollm.train.metrics import read_metrics
from nanollm.train.scaling import Ladder
from tests.stages.conftest import MODEL, interrupted


@pytest.fixture(autouse=True)
def pace(monkeypatch):
    """So many tokens per second are measured, however busy the machine is."""
    monkeypatch.setattr(scale, "LONGEST", 3_000)
    monkeypatch.setattr(pretrain, "measure", lambda c, guess: (250.0, 0.1))


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Three models of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("sizes")
    for width in (16, 32, 48):
        (folder / f"{width}.yaml").write_text(to_yaml(dataclasses.replace(MODEL, d_model=width)), encoding="utf-8")
    return sorted(folder.glob("*.yaml"))


@pytest.fixture
def ladder(token_files, tokenizer_path, sizes, tmp_path):
    def make(**options) -> scale.Config:
        given = {"budget": "2m", "models": [str(size) for size in sizes], "context_length": 32, "out": tmp_path / "l"}
        return scale.Config(data=token_files, tokenizer_path=tokenizer_path, **given | options)

    return make


@pytest.mark.long
def test_a_ladder_resumes_without_repeating_a_run_and_says_what_it_found(ladder, monkeypatch, capsys):
    c = ladder()
    with interrupted(monkeypatch, pretrain, "run", after=4):
        scale.run(c)
    with pytest.raises(ValueError, match="5 of its 9 runs are missing; nanollm scale goes on with them"):
        print(Ladder.read(c.out / "scale.json").law)
    before = {file: file.stat().st_mtime_ns for file in c.out.glob("*/bundle/model.safetensors")}
    assert len(before) == len(list(c.out.glob("??-*.json"))) == 4
    found = read_json(scale.run(c))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(found["runs"]) == len(list(c.out.glob("??-*.json"))) == 9
    for one in found["runs"]:
        last = read_metrics(c.out / one["name"])[-1]
        assert (last["step"], last["val_bpb"]) == (one["options"]["train.steps"], one["val_bpb"])
        assert read_json(c.out / f"{one['name']}.json") == one
        assert one["tokens"] == one["options"]["train.steps"] * one["options"]["train.batch_size"] * 32
    assert ("alpha" in found["law"]) != ("unknown" in found["law"])
    assert "log10 of tokens" in (c.out / "report.html").read_text(encoding="utf-8")
    assert "epochs of the text" in capsys.readouterr().err
    with pytest.raises(ValueError, match="choose another --out"):
        scale.run(dataclasses.replace(c, seed=1))


def test_a_budget_too_small_for_three_sizes_says_the_least_and_one_too_small_for_all_leaves_sizes_out(ladder, capsys):
    with pytest.raises(ValueError, match="--budget 20s is too small: 3 sizes take 1m here"):
        scale.run(ladder(budget="20s"))
    runs = list(scale.planned(ladder(budget="90s", models=[*scale.SIZES]), 10**6))
    assert len({one["parameters"] for one in runs}) in (3, 4, 5)
    assert len({one["name"] for one in runs}) == len(runs)
    assert "is left out, and what is larger" in capsys.readouterr().err


def test_a_text_too_small_for_a_ladder_is_refused_before_anything_is_trained(ladder, monkeypatch):
    monkeypatch.setattr(scale, "LONGEST", 60_000)
    with pytest.raises(ValueError, match=r"has 12,856 tokens: too few .* in at most 4 epochs; give it 15,000"):
        scale.run(ladder())


def test_fewer_than_three_sizes_are_no_ladder(ladder):
    with pytest.raises(ValueError, match="models: expected at least 3 different names, got nano-1m nano-5m"):
        ladder(models=["nano-1m", "nano-5m"])


# --- plan ---


@pytest.fixture
def scale_json(tmp_path):
    """A ladder of known coefficients, and one whose last run contradicts the others."""
    shape = {"vocab_size": 8192, "context_length": 1024}  # nano-20m's
    runs = [
        {"parameters": n, "seen": d, "val_bpb": 0.75 + 35 / n**0.35 + 26 / d**0.25, "model": shape}
        for n in (700_000, 1_700_000, 2_900_000, 5_300_000)
        for d in (4e5, 1.2e6, 3.6e6)
    ]
    holds, broken = tmp_path / "scale.json", tmp_path / "broken.json"
    holds.write_text(json.dumps({"text_tokens": 2e7, "runs": runs}))
    broken.write_text(json.dumps({"text_tokens": 2e7, "runs": [*runs[:-1], runs[-1] | {"val_bpb": 2.5}]}))
    return holds, broken


def test_plan_predicts_the_loss_with_an_interval_or_says_why_not(scale_json):
    holds, broken = scale_json

    def loss(**options):
        return json.loads(plan.run(plan.Config(model="nano-20m", gpu="h200", json=True, **options)))["loss"]

    found = loss(tokens=7e6, scale=holds)
    assert found["low"] < 0.75 + 35 / 16_623_616**0.35 + 26 / 7e6**0.25 < found["high"]
    assert (found["high"] - found["low"]) / 2 < 0.03 * found["bits_per_byte"]
    assert "epochs of the text" in loss(tokens=1e9, scale=holds)["unknown"]
    assert "the fit does not hold" in loss(tokens=7e6, scale=broken)["unknown"]
    assert loss(tokens=7e6) is None
    other = plan.run(plan.Config(model="nano-5m", gpu="h200", tokens=7e6, scale=holds))
    assert "unknown: the ladder's runs have vocab_size 8,192, this one has 4,096" in other
    text = plan.run(plan.Config(model="nano-20m", gpu="h200", tokens=7e6, scale=holds))
    assert "bits per byte, 80% interval" in text
    assert "--start fast --optim.warmup_steps 42" in text.splitlines()[-1]


# --- pretrain --budget ---


def words(token_files, tokenizer_path, out, *more: object) -> list[str]:
    paths = ["--data", token_files, "--tokenizer_path", tokenizer_path, "--out", out]
    return ["pretrain", *map(str, [*paths, *more])]


def model_words(tmp_path) -> list[str]:
    (tmp_path / "small.yaml").write_text(to_yaml(MODEL), encoding="utf-8")
    return ["--model", str(tmp_path / "small.yaml")]


@pytest.mark.long
def test_a_budget_chooses_what_is_not_given_says_what_to_expect_and_the_same_command_resumes(
    token_files, tokenizer_path, tmp_path, capsys, scale_json
):
    given = [
        "--budget",
        "5m",
        "--scale",
        str(scale_json[0]),
        *model_words(tmp_path),
        "--optim.lr",
        "0.005",
        "--train.batch_size",
        "6",
    ]
    command = words(token_files, tokenizer_path, tmp_path / "run", *given)
    assert cli.main(command) == 0
    said = capsys.readouterr().err
    assert "measuring how fast 83,936 parameters train here" in said
    assert said.index("tokens/s") < said.index("loss to expect: ") < said.index("step 0:")
    settings = read_mapping(tmp_path / "run" / "config.yaml")
    assert (settings["start"], settings["optim"]["lr"], settings["train"]["batch_size"]) == ("fast", 0.005, 6)
    assert settings["train"]["steps"] >= pretrain.MIN_STEPS
    assert settings["budget"] is None
    shutil.rmtree(tmp_path / "run" / "bundle")
    assert cli.main(command) == 0
    assert "was begun before: what was chosen then holds" in capsys.readouterr().err
    assert read_mapping(tmp_path / "run" / "config.yaml") == settings


def test_measuring_tells_tokens_per_second_and_leaves_nothing(run_config, tmp_path, monkeypatch):
    monkeypatch.undo()
    c = run_config()
    before = sorted(tmp_path.iterdir())
    rate, rest_s = pretrain.measure(c, 1.0)
    assert 0 < rate < 1e6 and rest_s > 0
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "10m", "--train.steps", "5"], "--budget chooses the number of steps; leave out --train.steps"),
        (["--budget", "soon"], "--budget: expected a time such as 90s, 10m or 1h30m, got soon"),
        (["--budget", "1s"], "--budget 1s is too small: 20 steps take"),
        (["--budget", "1m", "--scale", "nowhere.json"], "nowhere.json"),
        (["--scale", "nowhere.json"], "--train.steps"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_in_one_line(more, said, token_files, tokenizer_path, tmp_path, capsys):
    assert cli.main(words(token_files, tokenizer_path, tmp_path / "run", *model_words(tmp_path), *more)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_ladder_whose_fit_does_not_hold_chooses_nothing(token_files, tokenizer_path, tmp_path, capsys, scale_json):
    given = ["--budget", "1m", "--scale", str(scale_json[1])]
    assert cli.main(words(token_files, tokenizer_path, tmp_path / "run", *given)) == 2
    assert "the fit does not hold" in capsys.readouterr().err


def test_longer_budgets_choose_larger_presets_and_batches(
    token_files, tokenizer_path, tmp_path, monkeypatch, scale_json
):
    cores = Hardware(name="two cores", kind="cpu", memory=None, tflops=0.435)
    monkeypatch.setattr(plan, "this_machine", lambda cpu: cores)
    monkeypatch.setattr(pretrain, "read_manifest", lambda folder: [{"splits": {"train": {"tokens": 10**10}}}])
    monkeypatch.setattr(pretrain, "measure", lambda c, guess: (guess, 1.0))

    def chosen(budget: str, *more: str) -> pretrain.Config:
        given = words(token_files, tokenizer_path, tmp_path / "run", "--budget", budget, *more)
        return parse_options("pretrain", pretrain, given[1:])[0]

    runs = [chosen(budget) for budget in ("2m", "1h", "24h")]
    assert [c.model.d_model for c in runs] == [128, 192, 384]
    assert {c.model.vocab_size for c in runs} == {600}
    steps = [c.train.batch_size * c.model.context_length for c in runs]
    assert steps == sorted(steps) and len(set(steps)) == 3
    assert chosen("10m", "--scale", str(scale_json[0]), "--model", "nano-5m").model.d_model == 192
    by_ladder = chosen("10m", "--scale", str(scale_json[0])).model
    assert (by_ladder.d_model, by_ladder.context_length) == (128, 1024)
