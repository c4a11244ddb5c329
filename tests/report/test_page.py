"""The page of a run says what was in its folder, and nothing else."""

import dataclasses
import json
import re

import pytest

from nanollm.cli import main
from nanollm.report.folder import read_run
from nanollm.report.page import moe_blocks, render, write_report
from nanollm.stages import pretrain, report
from nanollm.train.metrics import read_metrics
from nanollm.world import World
from tests.report.conftest import metrics
from tests.stages.conftest import MODEL


def page_of(*folders, **options):
    return render([read_run(folder) for folder in folders], **options)


def words_of(html):
    """The text of a page without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_a_run_ends_with_its_page(run_config):
    config = run_config(steps=4)
    pretrain.run(config)
    text = words_of((config.out / "report.html").read_text("utf-8"))
    lines = read_metrics(config.out)
    assert "steps 4 of 4 (done)" in text
    assert f"bits per byte {lines[0]['val_bpb']:.4f} → {lines[-1]['val_bpb']:.4f}" in text
    assert json.loads((config.out / "inputs.json").read_bytes())["data"][:16] in text
    start = json.loads((config.out / "starts.jsonl").read_bytes())
    assert start["processor"] in text and f"torch {start['torch']}" in text
    assert "Speed tokens/s" in text and "Peak memory GB" in text
    assert "started 1 time(s)" in text


def test_the_page_asks_for_nothing_and_runs_nothing(write_run, grpo_run):
    for html in (page_of(write_run()), page_of(grpo_run)):
        head = html[: html.index("</head>")]
        assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in head
        assert re.findall(r"<(?:script|img|iframe|object|link rel=\"stylesheet\")\b", html) == []
        assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", html) == []
        assert "&lt;script&gt;" in html


def test_experts_that_get_nothing_are_named(write_run):
    assert "Next to nothing at the end: block 8 · 2" in words_of(page_of(write_run()))


def test_time_is_that_of_all_lines(write_run):
    assert "time 1 h 00 min, until the last line" in words_of(page_of(write_run()))


def test_updates_that_were_left_out_are_told(write_run):
    lines = [line | ({"skipped": True} if line["step"] in (3, 7) else {}) for line in metrics(100)]
    assert "skipped updates 2, the last in step 7" in words_of(page_of(write_run(lines=lines)))


def test_grpo_shows_rewards_replies_and_problems_solved_with_intervals(grpo_run):
    html = page_of(grpo_run)
    text = words_of(html)
    assert "problems solved 50.0 % (40.0 to 60.0) → 83.3 % (73.3 to 93.3)" in text
    for title in ("Reward mean per reply", "Parts of the reward", "Groups without a signal", "Entropy", "Distance"):
        assert title in text
    assert html.count('class="s0 band"') == 1
    assert "What is 2 + 3?" in text and "What is dull?" not in text
    assert "62.0 % (60.0 to 64.0)" in text and "50.0 % (60.0 to 64.0)" in text
    assert "grpo minus runs/sft/bundle: words test, strict: +12.0 points (+8.0 to +16.0), p 0.0012" in text
    assert "1 of 500 questions share 13 words in a row" in text


def test_the_title_tells_what_came_of_a_run(write_run, grpo_run):
    run = write_run()
    solved, learned = (re.search(r"<h1>(.*)</h1>", page_of(folder))[1] for folder in (grpo_run, run))
    assert solved == "GRPO on word problems: 50.0 % to 83.3 % of 200 test problems"
    assert learned == "Pretraining: bits per byte 4.0000 to 2.0000"
    begun = read_run(write_run("begun", lines=[{"step": 0, "val_loss": 3.5}], bundle="gone/bundle"))
    assert "<h1>Instruction tuning: validation loss 3.5000</h1>" in render([begun])
    assert "<h1>run and grpo</h1>" in page_of(run, grpo_run)


def test_what_was_0_throughout_is_said_and_not_drawn(grpo_run):
    text = words_of(page_of(grpo_run))
    assert "0 throughout, and not drawn: Clipped." in text and "Clipped share of tokens" not in text


def test_what_another_stage_calls_so_is_not_said_of_it(grpo_run):
    lines = [json.loads(line) | {"kl": 0.0} for line in (grpo_run / "metrics.jsonl").read_text("utf-8").splitlines()]
    (grpo_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert "0 throughout, and not drawn: Distance to the reference, Clipped." in words_of(page_of(grpo_run))


def test_the_runs_before_it_are_linked_from_wherever_the_page_lies(write_run, tmp_path):
    base = write_run("base")
    tuned = write_run("tuned & so", bundle=str(base / "bundle"))
    last = write_run("last", bundle=str(tuned / "bundle"))
    report.run(report.Config(run=last))
    page = (last / "report.html").read_text("utf-8")
    links = '<a href="../base/report.html">base</a> → <a href="../tuned%20%26%20so/report.html">tuned &amp; so</a>'
    assert links in page
    report.run(report.Config(run=last, out=tmp_path / "page.html"))
    assert '<a href="base/report.html">base</a>' in (tmp_path / "page.html").read_text("utf-8")
    assert '<p class="about">After' not in page_of(base)


def test_runs_are_compared_by_colour_dashes_and_settings(write_run):
    first = write_run("first")
    second = write_run("second", lines=list(metrics(100, loss=1)), train={"steps": 100, "batch_size": 8})
    html = page_of(first, second)
    assert "train.batch_size 4 8" in words_of(html)
    assert "train.steps" not in words_of(html[: html.index('id="Learning"')])
    assert html.count('class="s0 line d0"') == html.count('class="s1 line d1"') > 5
    assert "over tokens" in html  # a step of the second has twice as many


def test_a_line_that_is_being_written_is_left_out(write_run):
    folder = write_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "lo')
    assert read_run(folder).step == 100


def test_watching_ends_when_the_run_does(write_run, monkeypatch):
    folder, waits = write_run(lines=list(metrics(100))[:51]), []

    def finish(seconds):
        waits.append(seconds)
        page = (folder / "report.html").read_text("utf-8")
        assert '<meta http-equiv="refresh" content="10">' in page and "50 of 100 (50%)" in page
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(100)))

    monkeypatch.setattr("time.sleep", finish)
    report.run(report.Config(run=folder, watch=True))
    assert waits == [10]
    assert 'http-equiv="refresh"' not in (folder / "report.html").read_text("utf-8")


def test_watching_waits_for_a_run_to_begin(write_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: write_run())
    report.run(report.Config(run=tmp_path / "run", watch=True))
    assert "waiting for the run to begin" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").exists()


def test_a_run_does_not_fail_because_of_its_page(write_run, capsys):
    folder = write_run()
    (folder / "eval" / "mine").mkdir(parents=True)
    (folder / "eval" / "mine" / "eval.json").write_text("{")
    write_report(folder, World.start("cpu"))
    assert "the page could not be written (ValueError" in capsys.readouterr().err


def test_numbers_that_were_not_finite_and_runs_of_few_lines_have_a_page(write_run, grpo_run):
    rollouts = grpo_run / "rollouts" / "step-00000100.jsonl"
    rollouts.write_text(rollouts.read_text().replace('"reward": 0.0', '"reward": null'))
    assert "reward –" in words_of(page_of(grpo_run))
    lines = [{"step": 0, "val_bpb": None, "samples": None}, {"step": 1, "loss": None, "grad_norm": 0.0}]
    text = words_of(page_of(write_run("short", lines=lines)))
    assert "1 of 100 (1%)" in text and "Gradient norm L2 norm before clipping steps" not in text
    assert "logarithmic" not in text  # 0 has no logarithm


def test_blocks_are_numbered_as_the_model_has_them(write_run):
    model = dataclasses.replace(MODEL, n_blocks=8, n_dense_first=4)
    run = read_run(write_run(model=model, lines=[{"step": 1, "expert_load": [[0.5, 0.5]]}]))
    assert moe_blocks(run, 1) == ["block 8"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}"], "is not the folder of a run: it has no config.yaml; give one such as {damaged}, {run}"),
        (["{run}/none"], "is not the folder of a run: it has no config.yaml; give one such as runs/NAME"),
        (["{run}/bundle"], "is not the folder of a run: it has no config.yaml; give one such as {run}"),
        (["{run}", "--compare", "{tmp}/none"], "is not the folder of a run: it has no config.yaml"),
        (["{damaged}"], "metrics.jsonl, line 2 is damaged (KeyError('step')); remove that line"),
    ],
)
def test_a_mistake_is_one_line(words, message, write_run, tmp_path, capsys):
    places = {"tmp": tmp_path, "run": write_run(), "damaged": write_run("damaged", lines=[{"step": 0}, {"loss": 1}])}
    (places["run"] / "bundle").mkdir()
    (places["run"] / "bundle" / "provenance.json").write_text("{}")
    assert main(["report", *(word.format(**places) for word in words)]) == 2
    told = capsys.readouterr().err
    assert message.format(**places) in told and told.count("\n") == 1


def test_a_run_of_an_earlier_version_is_drawn_by_todays_names(write_run):
    old = {
        "reward": 0.5,
        "reward_grade": 0.25,
        "reply_tokens": 40.0,
        "finished": 0.75,
        "groups": 8,
        "groups_dropped": 2,
    }
    lines = [{"step": step, "engine_logprob_difference": 0.01} | old for step in range(3)]
    numbers = read_run(write_run("grpo", lines=lines, rollout={"prompts": 8}, bundle="runs/sft/bundle")).numbers
    expected = {"rewards/grade/mean": 0.25, "completions/mean_length": 40.0, "completions/clipped_ratio": 0.25}
    expected |= {"frac_reward_zero_std": 0.25, "sampling/sampling_logp_difference/mean": 0.01}
    assert {name: numbers[name][-1][1] for name in expected} == expected
