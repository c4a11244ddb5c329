"""The variants are what their names say, a campaign of them loses and repeats nothing, and the page is its table."""

import argparse
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import ablations, tokens_to_loss
from benchmarks.trial import Run, Text
from benchmarks.variants import (
    ROWS,
    ResidualLatentAttention,
    Tuning,
    active_flops_per_token,
    build_optimizers,
    head_cross_entropy_sum,
)
from nanollm.config import load_preset
from nanollm.data.batches import IGNORE
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.text.tokenizer import Tokenizer
from nanollm.train import optim
from nanollm.train.loss import cross_entropy_sum
from nanollm.world import World
from tests.stages.conftest import token_files, tokenizer_path

__all__ = ["token_files", "tokenizer_path"]

RUNS = ablations.read_runs(ablations.RESULTS)


def built(row: str) -> Transformer:
    return ROWS[row].build(ROWS[row].config(load_preset("model", "nano-5m"), 256), seed=0)


def started(row: str, prepared: Path, seed: int = 0) -> Run:
    v = dataclasses.replace(ROWS[row], pieces=4096)
    return Run.start(v, v.config(load_preset("model", "nano-1m"), 16), seed, Text.open(prepared, 4096), World())


def ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(2048, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prepared(tokenizer: Tokenizer, token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes, but of a story and with the 600 pieces of the tests' tokenizer."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer.save(folder / "tokenizer-4096" / "bpe_tokenizer.model")
    shutil.copytree(token_files, folder / "owt-4096")
    return folder


# --- the campaign and its page ---


def test_the_page_is_the_table_of_the_committed_runs() -> None:
    runs = [run for run in RUNS if run.tokens == 131_072]
    assert ablations.TABLE.read_text(encoding="utf-8") == ablations.table(runs)
    assert len(RUNS) == 103


@pytest.mark.long
def test_a_campaign_runs_what_is_missing_in_processes_and_never_repeats_a_finished_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.nice", lambda by: by)  # the process of the tests keeps its priority
    results = tmp_path / "runs.csv"
    shape = {"preset": "nano-1m", "context_length": 16, "tokens": 192, "validation_windows": 4}
    options = {**shape, "prepared": prepared, "results": results, "seeds": 0}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ablations.append_run(results, dataclasses.replace(RUNS[0], row="muon", **shape))
    ablations.append_run(results, dataclasses.replace(RUNS[0], row="adamw"))  # of another shape
    for _ in range(2):
        assert ablations.main(["muon", "adamw", *words]) == 0
    assert capfd.readouterr().out.count("adamw, seed 0") == 1
    before, other, run = ablations.read_runs(results)
    assert (before.date, other.tokens) == (RUNS[0].date, 131_072)
    assert (run.row, run.seed, run.tokens, run.optimizer, run.steps) == ("adamw", 0, 192, "adamw", 3)
    assert run.parameters == ModelConfig(**load_preset("model", "nano-1m") | {"vocab_size": 4096}).total_parameters
    o = argparse.Namespace(seeds=[0, 1], results=results, **shape)
    assert list(ablations.missing(["adamw", "muon"], o)) == [(1, "adamw"), (1, "muon")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["muno"], "unknown row muno; they are search, adamw, muon"),
        (["muon", "--corpus", "none", "--prepared", "none"], "is not a folder of Parquet files"),
        (["--table", "--preset", "none"], "there are no results yet"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_runs(words, said, capsys) -> None:
    assert ablations.main(words) == 2
    assert said in capsys.readouterr().err


def test_differences_are_taken_seed_by_seed_and_are_a_tie_inside_their_spread() -> None:
    assert ablations.compare([-0.20, -0.19, -0.21]) == ("-0.2000 ± 0.0100", "better")
    assert ablations.compare([0.01, -0.01, 0.01]) == ("+0.0033 ± 0.0115", "tie")
    assert ablations.compare([0.1, 0.1, 0.1])[1] == "worse"
    assert ablations.compare([-0.1]) == ("-0.1000", "one seed")


def test_a_seed_decides_weights_and_windows_so_that_rows_are_pairs(prepared: Path) -> None:
    runs = [started(row, prepared, seed=3) for row in ("adamw", "muon")]
    first, second = (run.state.masters for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(*(run.windows.micro_batches(0, 4, 4)[0].tokens for run in runs))


# --- the variants ---


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS)
def test_every_row_learns(row: str, prepared: Path) -> None:
    run = started(row, prepared)
    losses = [run.step(step, 16).loss for step in range(16)]
    assert losses[-1] < losses[0]


def test_rows_of_equal_parameters_and_equal_flops_are_equal() -> None:
    models = {row: built(row) for row in ("muon", "mha", "gqa", "fine", "dense", "fine-wide")}
    parameters = {row: sum(p.numel() for p in model.parameters()) for row, model in models.items()}
    flops = {row: active_flops_per_token(model, 256) for row, model in models.items()}
    assert all(parameters[row] == pytest.approx(parameters["muon"], rel=3e-3) for row in ("mha", "gqa", "fine"))
    assert all(flops[row] == pytest.approx(flops["muon"], rel=1e-3) for row in ("dense", "fine-wide"))
    assert all(flops[row] == models[row].config.training_flops_per_token() for row in ("muon", "fine", "fine-wide"))


def test_each_change_to_the_model_is_what_its_name_says() -> None:
    plain = built("muon")
    assert built("zero-init")(ids()).abs().max() == 0  # every token is equally likely at first
    assert built("soft-cap")(1000 * ids() % 2048).abs().max() <= 15
    changed, grouped = ids(), built("gqa")
    changed[:, 12:] += 1
    torch.testing.assert_close(grouped(ids())[:, :12], grouped(changed)[:, :12])  # sees only what came before
    normed = built("embed-norm")
    weights = normed.state_dict()
    table = weights["trunk.embed.weight"]
    weights["trunk.embed.weight"] = torch.nn.functional.rms_norm(table, table.shape[1:], eps=1e-6)
    plain.load_state_dict(weights)
    torch.testing.assert_close(normed(ids()), plain(ids()))


def test_value_residual_with_share_zero_is_the_plain_model() -> None:
    model, plain = built("value-residual"), built("muon")
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if not n.endswith("share")})
    assert not torch.allclose(model(ids()), plain(ids()), atol=1e-3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResidualLatentAttention):
                module.share.zero_()
    torch.testing.assert_close(model(ids()), plain(ids()), atol=1e-5, rtol=1e-4)


def test_calling_the_head_gives_the_loss_of_the_package() -> None:
    model = built("muon")
    hidden = torch.randn(2, 8, model.config.d_model, generator=torch.Generator().manual_seed(0))
    targets = ids(2, 8)
    targets[0, 3:5] = IGNORE
    expected = cross_entropy_sum(model.head, hidden, targets)
    torch.testing.assert_close(head_cross_entropy_sum(model.head, hidden, targets), expected)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_factor_moves_the_embedding_by_so_much_more_and_the_rest_as_the_package_does(factor: float) -> None:
    c = dataclasses.replace(ROWS["muon"].optim, weight_decay=0.0)
    weights = dict(built("muon").named_parameters())
    ours, theirs = ({n: torch.nn.Parameter(p.detach().clone()) for n, p in weights.items()} for _ in range(2))
    for masters, optimizers in (
        (ours, build_optimizers(ours, c, Tuning(embed_lr=factor), torch.float32)),
        (theirs, optim.build_optimizers(theirs, c, torch.float32)),
    ):
        for name, parameter in masters.items():
            parameter.grad = torch.full_like(parameter, 0.01 * len(name))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
    embed = "trunk.embed.weight"
    torch.testing.assert_close(ours[embed] - weights[embed], factor * (theirs[embed] - weights[embed]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != embed)


def test_momentum_rises_to_its_value() -> None:
    tuning, c = Tuning(momentum_from=0.85, momentum_steps=10), ROWS["muon"].optim
    assert [tuning.momentum_at(step, c) for step in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert Tuning().momentum_at(0, c) == c.momentum


def test_tokens_to_loss_gives_ours_no_more_tokens_than_the_ratio_allows(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_to_loss, "step_seconds", lambda *_: 0.2)  # six steps, however busy the machine is
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
