"""Promises of benchmarks/shakespeare.py: the same text, the same measure, and a clock that is kept."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import shakespeare
from benchmarks.run import read_words
from benchmarks.shakespeare import MOMENTS, Clock, Recipe, loss_per_character, run_nanogpt, split, start, train, windows
from nanollm.model.transformer import Transformer
from nanollm.world import World

TEXT = "To be, or not to be: that is the question.\n" * 60
WIDTHS = ("q_lora_rank", "kv_lora_rank", "v_head_dim")
TINY = shakespeare.FAMILY | dict.fromkeys(WIDTHS, 8) | dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 4)
TINY |= {"vocab_size": 20, "context_length": 16, "d_model": 16, "d_ff": 32, "d_expert": 16}
TINY |= {"n_blocks": 2, "moe_every": 2, "n_heads": 2}
RECIPE = Recipe(shape=TINY, rows=4, is_compiled=False, optim={"lr": 1e-2, "warmup_steps": 100})


class SteppedTime:
    """A second passes at every look."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 1.0
        return self.time


def test_the_split_is_that_of_nanogpt(shared_data):
    characters = split((shared_data / shakespeare.TEXT).read_text(encoding="utf-8"))
    assert (characters.vocabulary, len(characters.train), len(characters.val)) == (65, 1_003_854, 111_540)
    # The first ids that prepare.py writes: "First Citizen:" by the places of its characters in the sorted alphabet.
    assert characters.train[:14].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47, 64, 43, 52, 10]


def test_every_pass_reads_almost_every_character_once_from_another_place_and_predicts_the_next():
    ids, context = torch.arange(1000), 10
    batches = windows(ids, context, rows=3, seed=0)
    first, again = ([next(batches) for _ in range(33)] for _ in range(2))  # 99 windows of at most 100
    tokens, later = (torch.cat([batch.tokens for batch in part]) for part in (first, again))
    assert tokens.unique().numel() == tokens.numel()
    assert not torch.equal(tokens[:, 0].sort().values % context, later[:, 0].sort().values % context)
    assert all(torch.equal(batch.targets, batch.tokens + 1) for batch in first)


@pytest.mark.parametrize("count", [16 * 5 + 1, 16 * 5, 16 * 3 + 7, 9])
def test_the_loss_counts_each_character_but_the_first_once(count):
    ids = split(TEXT).train[:count]
    model = Transformer(RECIPE.model_config()).init(0)
    logits = [model(ids[b : b + 17][None, :-1])[0] for b in range(0, count - 1, 16)]
    expected = F.cross_entropy(torch.cat(logits), ids[1:])
    assert loss_per_character(model, ids, rows=2) == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.long
def test_training_learns_within_its_clock_which_stands_still_while_it_is_measured():
    state, rates, now = start(RECIPE, 0, World()), [], SteppedTime()
    state.optimizers[0].register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    looks = iter([1.0, 2.0, 3.0])
    # Most of the clock is over when training begins; each look takes 50 s that do not count.
    facts = train(
        state,
        windows(split(TEXT).train, 16, 4, 0),
        RECIPE.optim_config(),
        Clock(-1000.0, 1400.0, now),
        lambda: [now() for _ in range(50)] and next(looks),
    )
    assert 1390 < facts["seconds"] <= 1400
    assert facts["characters"] == facts["steps"] * 4 * 16
    assert [look["val_loss"] for look in facts["curve"]] == [1.0, 2.0, 3.0]
    assert facts["train_loss"] < 0.5
    at_peak = rates.index(max(rates))
    assert at_peak / len(rates) == pytest.approx(RECIPE.optim["warmup_steps"] / MOMENTS, abs=0.02)
    assert rates[:at_peak] == sorted(rates[:at_peak])
    assert rates[-1] < 0.01 * max(rates)


def test_a_clock_that_ends_before_the_first_step_is_refused():
    batches = windows(split(TEXT).train, 16, 4, 0)
    with pytest.raises(ValueError, match=r"the first step ended after 9\.0 s and the clock is 5\.0 s"):
        train(start(RECIPE, 0, World()), batches, RECIPE.optim_config(), Clock(-8.0, 5.0, SteppedTime()), lambda: 0.0)


@pytest.mark.parametrize("name", list(shakespeare.RECIPES))
def test_every_recipe_is_a_model_of_our_family_for_the_alphabet_and_an_optimizer(name):
    c = shakespeare.RECIPES[name].model_config()
    assert (c.vocab_size, c.n_moe_blocks) == (65, 1)
    assert shakespeare.RECIPES[name].optim_config().schedule == "linear"


def fake_checkout(folder: Path, train_py: str) -> Path:
    files = {
        "config/train_shakespeare_char.py": "",
        "data/shakespeare_char/prepare.py": "open('data/shakespeare_char/input.txt').close()\n",
        "train.py": train_py,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_nanogpt_runs_in_a_copy_with_the_words_of_its_readme_and_what_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "WHOLE_VAL_LOSS", 'print(\'{"val_loss": 1.9, "predicted": 3}\')')
    text = tmp_path / "input.txt"
    text.write_text(TEXT)
    checkout = fake_checkout(
        tmp_path / "nanoGPT",
        "import sys, time\nassert '--max_iters=2000' in sys.argv\ntime.sleep(0.1)\nopen('trace', 'w').close()\n"
        "print('step 0: train loss 4.1, val loss 4.2')\nprint('step 2000: train loss 1.7, val loss 1.8857')\n",
    )
    facts = run_nanogpt(checkout, text, tmp_path)
    assert facts["seconds"] >= 0.1
    assert (facts["printed_val_loss"], facts["val_loss"], facts["predicted"]) == (1.8857, 1.9, 3)
    assert not (checkout / "trace").exists()
    with pytest.raises(ValueError, match="is no checkout of nanoGPT"):
        run_nanogpt(tmp_path / "nowhere", text, tmp_path)
    with pytest.raises(ValueError, match=r"train\.py ended with status 1: no torch"):
        run_nanogpt(fake_checkout(tmp_path / "broken", "raise SystemExit('no torch')"), text, tmp_path)
    with pytest.raises(ValueError, match="printed no `val loss`: nothing"):
        run_nanogpt(fake_checkout(tmp_path / "silent", "print('nothing')"), text, tmp_path)


def test_ours_gets_the_seconds_that_nanogpt_took_and_both_losses_are_told(tmp_path, monkeypatch):
    """The processes are replaced; what they are asked and what becomes of their answers is not."""
    asked = []

    def process(text_file: Path, cache: Path, **words: object) -> dict[str, object]:
        asked.append(words)
        numbers = dict.fromkeys(shakespeare.NUMBERS, 1.0) | {"seconds": 99.0, "val_loss": 1.5, "characters_per_s": 1e4}
        return {**numbers, "curve": [], "predicted": 111}

    def measured(*more: str) -> dict:
        asked.clear()
        words = ["shakespeare", "--data", str(tmp_path), "--repeats", "2", *more]
        return shakespeare.measure(read_words(words)["shakespeare"])

    theirs = {"seconds": 100.0, "printed_val_loss": 1.9, "val_loss": 2.0, "predicted": 111}
    monkeypatch.setattr(shakespeare, "in_a_process", process)
    monkeypatch.setattr(shakespeare, "run_nanogpt", lambda *_: theirs)
    monkeypatch.setattr(shakespeare, "matmul_roof", lambda *_: 400.0)
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / shakespeare.TEXT).write_text(TEXT)
    facts = measured("--nanogpt", "checkout")
    assert [(each["clock_s"], each["seed"]) for each in asked] == [(None, 0), (100.0, 0), (100.0, 1)]
    assert facts["ratio"]["nanollm"]["median"] == 0.75
    assert facts["checks"]["same"] and facts["checks"]["within_the_clock"]
    facts = measured()
    assert [each["clock_s"] for each in asked] == [None, 104.0, 104.0]
    assert facts["sides"]["nanoGPT"]["median"] == 1.8857
    facts = measured("--minutes", "1")
    assert {each["recipe"] for each in asked} == {"long"}
    assert not facts["checks"]["within_the_clock"]
