"""The variants are what their names say, and a campaign of them loses and repeats nothing."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablations, tokens_to_loss
from benchmarks.trial import Run, Text
from benchmarks.variants import (
    ROWS,
    SEARCH,
    TRIALS,
    GroupedAttention,
    ResidualLatentAttention,
    Tuning,
    active_flops_per_token,
    build_optimizers,
    head_cross_entropy_sum,
)
from nanollm.data.batches import IGNORE
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.settings import load_preset
from nanollm.stages import preprocess
from nanollm.text.tokenizer import Tokenizer
from nanollm.train import optim
from nanollm.train.loss import cross_entropy_sum
from nanollm.world import World

PRESET = load_preset("model", "nano-5m")
STORY = Path(__file__).parent / "story.txt"


def config_of(row: str, context_length: int = 256) -> ModelConfig:
    return ROWS[row].config(PRESET, context_length)


def built(row: str) -> Transformer:
    return ROWS[row].build(config_of(row), seed=0)


def ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(2048, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prepared(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes, but of a story and with the 600 pieces of the tests' tokenizer."""
    folder, words = tmp_path_factory.mktemp("prepared"), STORY.read_text(encoding="utf-8").split()
    documents = folder / "documents"
    (folder / "tokenizer-4096").mkdir()
    documents.mkdir()
    tokenizer.save(folder / "tokenizer-4096" / "bpe_tokenizer.model")
    for number in range(200):
        text = " ".join(words[(7 * number + 3 * i) % len(words)] for i in range(40))
        (documents / f"{number:03}.txt").write_text(text, encoding="utf-8")
    preprocess.run(
        preprocess.Config(
            kind="text",
            tokenizer_path=folder / "tokenizer-4096",
            save_dir=folder / "owt-4096",
            input=[documents],
            val_fraction=0.1,
        )
    )
    return folder


def words_of(prepared: Path, results: Path) -> list[str]:
    small = {"preset": "nano-1m", "context_length": 16, "tokens": 192, "validation_windows": 4}
    options = {**small, "prepared": prepared, "results": results, "seeds": 0}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# --- the campaign ---


def test_a_finished_run_is_never_done_again_and_one_without_a_file_is(prepared: Path, tmp_path: Path) -> None:
    words = words_of(prepared, tmp_path)
    (tmp_path / "muon_0.json").write_text("finished before", encoding="utf-8")
    assert ablations.main(["muon", "adamw", "--here", *words]) == 0
    assert (tmp_path / "muon_0.json").read_text(encoding="utf-8") == "finished before"
    run = json.loads((tmp_path / "adamw_0.json").read_bytes())
    assert (run["row"], run["seed"], run["tokens"]) == ("adamw", 0, 192)
    assert run["curve"][-1][0] == 192
    assert run["parameters"] == ModelConfig(**load_preset("model", "nano-1m") | {"vocab_size": 4096}).total_parameters


def test_the_driver_runs_each_missing_run_in_a_process_and_goes_on_with_all_rows_of_a_seed_first(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.nice", lambda by: by)  # the process of the tests keeps its priority
    words = words_of(prepared, tmp_path)
    assert ablations.main(["adamw", *words]) == 0
    assert ablations.main(["adamw", *words]) == 0  # nothing is left to do
    assert capfd.readouterr().out.count("adamw, seed 0") == 1
    options = argparse.Namespace(seeds=[0, 1], results=tmp_path)
    assert list(ablations.missing(["adamw", "muon"], options)) == [(0, "muon"), (1, "adamw"), (1, "muon")]


def test_an_unknown_row_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert ablations.main(["muno"]) == 2
    assert "unknown row muno; they are search, adamw, muon" in capsys.readouterr().err


def test_a_missing_corpus_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablations.main(["muon", "--corpus", str(tmp_path / "none"), "--prepared", str(tmp_path)]) == 2
    assert "is not a folder of Parquet files" in capsys.readouterr().err


def test_a_seed_decides_weights_and_windows_so_that_rows_are_pairs(prepared: Path) -> None:
    text = Text.open(prepared, 4096)
    config = ROWS["muon"].config(load_preset("model", "nano-1m"), 16)
    runs = [Run.start(ROWS[row], config, 3, text, World()) for row in ("adamw", "muon")]
    first, second = (run.state.masters for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(*(run.windows.micro_batches(0, 4, 4)[0].tokens for run in runs))


# --- the table ---


def results_of(values: dict[str, list[float]], **settings: Any) -> dict[str, dict[int, dict[str, Any]]]:
    shape = {"preset": "nano-5m", "context_length": 256, "tokens": 131_072, "validation_windows": 128}
    shape |= {
        "pieces": 4096,
        "dtype": "bfloat16",
        "threads": 1,
        "optim": {"name": "muon", "schedule": "linear", "lr": 1},
    }
    return {
        row: {
            seed: {
                "row": row,
                "about": "what changed",
                "against": (ROWS | SEARCH)[row].against,
                "bits_per_byte": value,
                "parameters": 5_608_640,
                "active_flops_per_token": 30e6,
                "cpu_s": 60.0,
                "settings": shape | settings,
                "versions": {"torch": "2.13.0"},
                "commit": "abc",
            }
            for seed, value in enumerate(seeds)
        }
        for row, seeds in values.items()
    }


def test_the_table_pairs_the_seeds_and_calls_what_lies_inside_their_spread_a_tie() -> None:
    text = ablations.table(
        results_of(
            {
                "adamw": [2.80, 2.90, 3.00],
                "muon": [2.60, 2.71, 2.79],  # every seed better by 0.2, though the seeds differ by as much
                "zero-init": [2.61, 2.70, 2.80],  # once better, twice worse
                "soft-cap": [2.70, 2.81, 2.89],
                "dense": [2.5],
            }
        )
    )
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| 2.7000 ± 0.0954 | 3 | adamw | -0.2000 ± 0.0100 | better |" in rows["muon"]
    assert "| muon | +0.0033 ± 0.0115 | tie |" in rows["zero-init"]
    assert "| muon | +0.1000 ± 0.0000 | worse |" in rows["soft-cap"]
    assert "| 2.5000 | 1 | muon | -0.1000 | one seed |" in rows["dense"]
    assert "gqa" not in rows


def test_runs_of_different_length_do_not_stand_in_one_table() -> None:
    runs = results_of({"adamw": [2.8]}) | results_of({"muon": [2.6]}, tokens=65_536)
    with pytest.raises(ValueError, match=r"runs of different tokens \[65536, 131072\] cannot stand in one table"):
        ablations.table(runs)


def test_another_tokenizer_is_compared_on_the_whole_split() -> None:
    runs = results_of({"muon": [2.6]}) | results_of({"tokenizer-8192": [9.0]}, pieces=8192)
    runs["muon"][0]["bits_per_byte_whole_split"] = 2.5
    runs["tokenizer-8192"][0]["bits_per_byte_whole_split"] = 2.4
    text = ablations.table(runs)
    assert "| 2.4000 | 1 | muon | -0.1000 | one seed |" in text
    assert "on the whole validation split" in text
    assert "on the whole validation split" not in ablations.table({"muon": runs["muon"]})


# --- the variants ---


@pytest.mark.parametrize("row", [*ROWS, *SEARCH, *TRIALS])
def test_every_row_learns_from_a_step(row: str, prepared: Path) -> None:
    v = dataclasses.replace((ROWS | SEARCH | TRIALS)[row], pieces=4096)
    config = v.config(load_preset("model", "nano-1m"), 16)
    run = Run.start(v, config, 0, Text.open(prepared, 4096), World())
    losses = [run.step(step, 12).loss for step in range(12)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("row", ["muon", "fine", "fine-wide"])
def test_flops_are_those_of_the_config_where_the_config_knows_them(row: str) -> None:
    assert active_flops_per_token(built(row), 256) == config_of(row).training_flops_per_token()


def test_rows_of_equal_parameters_and_equal_flops_are_equal() -> None:
    parameters = {row: sum(p.numel() for p in built(row).parameters()) for row in ("muon", "mha", "gqa", "fine")}
    flops = {row: active_flops_per_token(built(row), 256) for row in ("muon", "dense", "fine-wide")}
    for row in ("mha", "gqa", "fine"):
        assert parameters[row] == pytest.approx(parameters["muon"], rel=3e-3)
    for row in ("dense", "fine-wide"):
        assert flops[row] == pytest.approx(flops["muon"], rel=1e-3)


def test_grouped_attention_with_as_many_groups_as_heads_sees_only_what_came_before() -> None:
    model = built("gqa")
    assert isinstance(model.trunk.blocks[0].attention, GroupedAttention)
    changed = ids()
    changed[:, 12:] += 1
    before, after = model(ids()), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_with_zero_init_every_token_is_equally_likely_at_first() -> None:
    assert built("zero-init")(ids()).abs().max() == 0


def test_a_normed_embedding_is_a_table_of_normed_rows() -> None:
    model, plain = built("embed-norm"), built("muon")
    weights = model.state_dict()
    table = weights["trunk.embed.weight"]
    weights["trunk.embed.weight"] = torch.nn.functional.rms_norm(table, table.shape[1:], eps=1e-6)
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(ids()), plain(ids()))


def test_training_and_validation_see_capped_logits(prepared: Path) -> None:
    config = ROWS["soft-cap"].config(load_preset("model", "nano-1m"), 16)
    run = Run.start(ROWS["soft-cap"], config, 0, Text.open(prepared, 4096), World())
    with torch.no_grad():
        run.state.model.head.weight.mul_(1e4)
    # Two tokens whose logits are both within 15 are at most 30 nats apart.
    most = 30 + math.log(4096)
    assert most / 2 < run.step(0, 10).loss < most
    score = run.validate(4)
    assert most / 2 < score.nats / score.tokens < most


def test_calling_the_head_gives_the_loss_of_the_package() -> None:
    model = built("muon")
    hidden = torch.randn(2, 8, model.config.d_model, generator=torch.Generator().manual_seed(0))
    targets = ids(2, 8)
    targets[0, 3:5] = IGNORE
    expected = cross_entropy_sum(model.head, hidden, targets)
    torch.testing.assert_close(head_cross_entropy_sum(model.head, hidden, targets), expected)


def test_value_residual_with_share_zero_is_the_plain_model() -> None:
    model, plain = built("value-residual"), built("muon")
    shares = [m.share for m in model.modules() if isinstance(m, ResidualLatentAttention)]
    assert [share.item() for share in shares] == [0.5] * model.config.n_blocks
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if not n.endswith("share")})
    assert not torch.allclose(model(ids()), plain(ids()), atol=1e-3)
    with torch.no_grad():
        for share in shares:
            share.zero_()
    torch.testing.assert_close(model(ids()), plain(ids()), atol=1e-5, rtol=1e-4)


def test_factors_of_one_are_the_packages_optimizers() -> None:
    c = ROWS["muon"].optim
    ours, theirs = (
        {n: torch.nn.Parameter(p.detach().clone()) for n, p in built("muon").named_parameters()} for _ in range(2)
    )
    pairs = (
        (ours, build_optimizers(ours, c, Tuning(), torch.float32)),
        (theirs, optim.build_optimizers(theirs, c, torch.float32)),
    )
    for masters, optimizers in pairs:
        for name, parameter in masters.items():
            parameter.grad = torch.full_like(parameter, 0.01 * len(name))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_factor_moves_the_embedding_by_so_much_more() -> None:
    moved = []
    for factor in (1.0, 3.0):
        masters = {"trunk.embed.weight": torch.nn.Parameter(torch.zeros(4, 2))}
        c = dataclasses.replace(ROWS["muon"].optim, weight_decay=0.0)
        (optimizer,) = build_optimizers(masters, c, Tuning(embed_lr=factor), torch.float32)
        for _ in range(2):  # train_step sets the rate anew before each step
            masters["trunk.embed.weight"].grad = torch.ones(4, 2)
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
        moved.append(masters["trunk.embed.weight"].detach().clone())
    torch.testing.assert_close(moved[1], 3 * moved[0])


def test_momentum_rises_to_its_value() -> None:
    tuning, c = Tuning(momentum_from=0.85, momentum_steps=10), ROWS["muon"].optim
    assert [tuning.momentum_at(step, c) for step in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert Tuning().momentum_at(0, c) == c.momentum


# --- tokens to loss ---


def test_tokens_to_loss_gives_ours_no_more_tokens_than_the_ratio_allows(prepared: Path) -> None:
    parser = argparse.ArgumentParser()
    tokens_to_loss.add_options(parser)
    small = ["--minutes", "0.02", "--preset", "nano-1m", "--context_length", "16", "--validation_windows", "4"]
    facts = tokens_to_loss.measure(parser.parse_args([*small, "--prepared", str(prepared)]))
    baseline, *ours = facts["runs"].values()
    for ratio, side in zip((1.6, 2.2), ours, strict=True):
        assert 0 < side["tokens"] <= baseline["tokens"] / ratio
        held = side["nats_per_token"] <= baseline["nats_per_token"]
        assert facts["holds"][f"{ratio:g} x fewer tokens"] is held
    assert all(facts["checks"].values())
