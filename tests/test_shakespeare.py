"""Promises of benchmarks/shakespeare.py: the same text, the same measure, and a clock that is kept."""

import math
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
TINY = shakespeare.FAMILY | {
    "vocab_size": 20,
    "context_length": 16,
    "d_model": 16,
    "n_blocks": 2,
    "moe_every": 2,
    "n_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "d_ff": 32,
    "d_expert": 16,
}
RECIPE = Recipe(shape=TINY, rows=4, is_compiled=False, optim={"lr": 1e-2, "warmup_steps": 100})


class SteppedTime:
    """A second passes at every look."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 1.0
        return self.time


def test_the_split_is_that_of_nanogpt(shared_data):
    text = (shared_data / shakespeare.TEXT).read_text(encoding="utf-8")
    characters = split(text)
    assert (characters.vocabulary, len(characters.train), len(characters.val)) == (65, 1_003_854, 111_540)
    # The first ids that prepare.py writes: "First Citizen:" by the places of its characters in the sorted alphabet.
    assert characters.train[:14].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47, 64, 43, 52, 10]


def test_every_pass_reads_almost_every_character_once_from_another_place():
    ids, context = torch.arange(1000), 10
    batches = windows(ids, context, rows=3, seed=0)
    first = torch.cat([next(batches).tokens for _ in range(33)])  # 99 windows of at most 100
    assert first.unique().numel() == first.numel()
    again = torch.cat([next(batches).tokens for _ in range(33)])
    assert not torch.equal(first[:, 0].sort().values % context, again[:, 0].sort().values % context)


def test_windows_predict_the_character_after_each():
    batch = next(windows(torch.arange(1000), 10, rows=3, seed=0))
    assert torch.equal(batch.targets, batch.tokens + 1)


@pytest.mark.parametrize("count", [16 * 5 + 1, 16 * 5, 16 * 3 + 7, 9])
def test_the_loss_counts_each_character_but_the_first_once(count):
    ids = split(TEXT).train[:count]
    model = Transformer(RECIPE.model_config()).init(0)
    logits = [model(ids[b : b + 17][None, :-1])[0] for b in range(0, count - 1, 16)]
    expected = F.cross_entropy(torch.cat(logits), ids[1:])
    assert loss_per_character(model, ids, rows=2) == pytest.approx(expected.item(), abs=1e-5)


def test_training_learns_and_ends_within_its_clock():
    text, looks = split(TEXT), iter([1.0, 2.0, 3.0])
    state = start(RECIPE, 0, World())
    clock = Clock(0.0, 500.0, SteppedTime())
    facts = train(state, windows(text.train, 16, 4, 0), RECIPE.optim_config(), clock, lambda: next(looks))
    assert 490 < facts["seconds"] <= 500
    assert facts["steps"] > 400
    assert facts["characters"] == facts["steps"] * 4 * 16
    assert [look["val_loss"] for look in facts["curve"]] == [1.0, 2.0, 3.0]
    assert facts["train_loss"] < 0.5 < math.log(20)


def test_a_clock_that_ends_before_the_first_step_is_refused():
    state = start(RECIPE, 0, World())
    batches = windows(split(TEXT).train, 16, 4, 0)
    with pytest.raises(ValueError, match=r"the first step ended after 9\.0 s and the clock is 5\.0 s"):
        train(state, batches, RECIPE.optim_config(), Clock(-8.0, 5.0, SteppedTime()), lambda: 0.0)


def test_what_is_measured_while_training_is_not_on_the_clock():
    now = SteppedTime()
    clock = Clock(0.0, 100.0, now)
    before = clock.read()
    clock.stopped(lambda: [now() for _ in range(50)] and 0.0)
    assert clock.read() - before <= 2


def test_the_learning_rate_warms_up_and_ends_at_zero_with_the_clock_after_a_slow_first_step():
    state, rates = start(RECIPE, 0, World()), []
    state.optimizers[0].register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    clock = Clock(-1000.0, 1400.0, SteppedTime())  # most of it is over when training begins
    train(state, windows(split(TEXT).train, 16, 4, 0), RECIPE.optim_config(), clock, lambda: 0.0)
    at_peak = rates.index(max(rates))
    assert rates[0] < 0.02 * RECIPE.optim["lr"]
    assert rates[at_peak] > 0.97 * RECIPE.optim["lr"]
    assert at_peak / len(rates) == pytest.approx(RECIPE.optim["warmup_steps"] / MOMENTS, abs=0.02)
    assert rates[:at_peak] == sorted(rates[:at_peak])
    assert rates[-1] < 0.01 * RECIPE.optim["lr"]


@pytest.mark.parametrize("name", list(shakespeare.RECIPES))
def test_every_recipe_is_a_model_of_our_family_for_the_alphabet_and_an_optimizer(name):
    r = shakespeare.RECIPES[name]
    c = r.model_config()
    assert c.vocab_size == 65
    assert c.n_moe_blocks >= 1
    assert r.optim_config().schedule == "linear"


def test_a_block_begins_as_nothing():
    state = start(RECIPE, 0, World())
    tokens = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(0))
    embedded = state.model.trunk.embed(tokens)
    rows = state.model.trunk.embed.weight
    torch.testing.assert_close(rows.square().mean(-1), torch.ones(len(rows)), rtol=1e-2, atol=0)
    torch.testing.assert_close(state.model.trunk(tokens), state.model.trunk.norm(embedded))


def fake_checkout(folder: Path, train_py: str) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    (folder / "config" / "train_shakespeare_char.py").write_text("")
    (folder / "data" / "shakespeare_char" / "prepare.py").write_text(
        "from pathlib import Path\nassert Path('data/shakespeare_char/input.txt').exists()\n"
    )
    (folder / "train.py").write_text(train_py)
    return folder


def test_nanogpt_runs_in_a_copy_with_the_words_of_its_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "WHOLE_VAL_LOSS", 'print(\'{"val_loss": 1.9, "predicted": 3}\')')
    checkout = fake_checkout(
        tmp_path / "nanoGPT",
        "import sys, time\nassert '--max_iters=2000' in sys.argv\ntime.sleep(0.1)\nopen('trace', 'w').close()\n"
        "print('step 0: train loss 4.1, val loss 4.2')\nprint('step 2000: train loss 1.7, val loss 1.8857')\n",
    )
    text = tmp_path / "input.txt"
    text.write_text(TEXT)
    facts = run_nanogpt(checkout, text, tmp_path)
    assert facts["seconds"] >= 0.1
    assert (facts["printed_val_loss"], facts["val_loss"], facts["predicted"]) == (1.8857, 1.9, 3)
    assert not (checkout / "trace").exists()


def test_a_folder_that_is_no_checkout_and_a_command_that_fails_are_told(tmp_path):
    text = tmp_path / "input.txt"
    text.write_text(TEXT)
    with pytest.raises(ValueError, match="is no checkout of nanoGPT"):
        run_nanogpt(tmp_path / "nowhere", text, tmp_path)
    broken = fake_checkout(tmp_path / "broken", "raise SystemExit('no torch')")
    with pytest.raises(ValueError, match=r"train\.py ended with status 1: no torch"):
        run_nanogpt(broken, text, tmp_path)
    silent = fake_checkout(tmp_path / "silent", "print('nothing')")
    with pytest.raises(ValueError, match="printed no `val loss`: nothing"):
        run_nanogpt(silent, text, tmp_path)


def test_ours_gets_the_seconds_that_nanogpt_took_and_both_losses_are_told(tmp_path, monkeypatch):
    """The processes are replaced; what they are asked and what becomes of their answers is not."""
    asked = []

    def process(text_file: Path, cache: Path, **words: object) -> dict[str, object]:
        asked.append(words)
        numbers = dict.fromkeys(shakespeare.NUMBERS, 1.0) | {"seconds": 99.0, "val_loss": 1.5, "characters_per_s": 1e4}
        return {**numbers, "curve": [], "predicted": 111}

    theirs = {"seconds": 100.0, "printed_val_loss": 1.9, "val_loss": 2.0, "predicted": 111}
    monkeypatch.setattr(shakespeare, "in_a_process", process)
    monkeypatch.setattr(shakespeare, "run_nanogpt", lambda *_: theirs)
    monkeypatch.setattr(shakespeare, "matmul_roof", lambda *_: 400.0)
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / shakespeare.TEXT).write_text(TEXT)
    words = ["shakespeare", "--data", str(tmp_path), "--repeats", "2"]
    facts = shakespeare.measure(read_words([*words, "--nanogpt", "checkout"])["shakespeare"])
    assert [each["clock_s"] for each in asked] == [None, 100.0, 100.0]
    assert [each["seed"] for each in asked] == [0, 0, 1]
    assert facts["ratio"]["nanollm"]["median"] == 0.75
    assert facts["checks"]["same"] and facts["checks"]["within_the_clock"]

    asked.clear()
    facts = shakespeare.measure(read_words(words)["shakespeare"])
    assert [each["clock_s"] for each in asked] == [None, 104.0, 104.0]
    assert facts["sides"]["nanoGPT"]["median"] == 1.8857

    asked.clear()
    facts = shakespeare.measure(read_words([*words, "--minutes", "1"])["shakespeare"])
    assert {each["recipe"] for each in asked} == {"long"}
    assert not facts["checks"]["within_the_clock"]
