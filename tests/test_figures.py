"""Do the pictures show what was measured, and can everybody read them?"""

import itertools
import json
import re

import pytest
import torch

from docs.figures import charts, draw, measure, of_architecture, of_grpo, picture, probes, screenshots
from nanollm.data.batches import Batch
from nanollm.evals.bits_per_byte import bits_per_byte
from nanollm.rl.loss import ObjectiveConfig
from nanollm.rl.rollout import RolloutConfig
from nanollm.settings import preset_names
from nanollm.sources.tasks import TaskConfig
from nanollm.stages import eval as evaluate
from nanollm.stages import grpo, pretrain
from nanollm.train.optim import OptimConfig
from tests.model.conftest import TINY, rng, tiny_model
from tests.stages.conftest import bundle, run_config, token_files, tokenizer_path

__all__ = ["bundle", "rng", "run_config", "tiny_model", "token_files", "tokenizer_path"]

CONCEPTS = sorted((draw.ROOT / "docs" / "concepts").glob("*.md"))
MEASURED = sorted(measure.MEASURED.glob("*.json"))


# --- pages and files ---


@pytest.mark.parametrize("name", draw.PICTURES)
def test_a_picture_drawn_again_has_the_committed_bytes(name):
    assert (draw.HERE / f"{name}.svg").read_text(encoding="utf-8") == draw.PICTURES[name]().svg()


def test_every_svg_is_drawn_by_the_script():
    assert {file.stem for file in draw.HERE.glob("*.svg")} == draw.PICTURES.keys()


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_a_concept_page_shows_pictures_that_exist_and_tells_in_words_what_is_on_them(page):
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert 2 <= len(shown) <= 4
    assert [file for _, file in shown if not (page.parent / file).is_file()] == []
    assert all(len(words) > 20 for words, _ in shown)


def test_every_measured_picture_is_shown_on_a_concept_page():
    text = "".join(page.read_text(encoding="utf-8") for page in CONCEPTS)
    assert [name for name in draw.PICTURES if name != "flow" and f"figures/{name}.svg" not in text] == []


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_the_code_of_a_concept_page_runs(page):
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_a_measured_file_names_its_model_commit_and_machine(file):
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert facts["model"] in preset_names("model")
    assert re.fullmatch(r"[0-9a-f]{12}\+?", facts["commit"])
    assert "torch" in facts["machine"] and "/" not in facts["machine"]


# --- for everybody's eyes ---

# What people see who lack one kind of cone: Machado, Oliveira and Fernandes 2009, severity 1, linear RGB.
EYES = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "no green": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "no blue": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def contrast(first: str, second: str) -> float:
    """WCAG 2.2: from 1, alike, to 21."""
    low, high = sorted(charts.luminance(charts.channels(colour)) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def seen_as(colour: str, eyes: str) -> list[float]:
    """CIE L*a*b* of a colour for such eyes."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in charts.channels(colour)]
    rgb = [min(1, max(0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in EYES[eyes]]
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(a * b for a, b in zip(row, rgb, strict=True)) for row in rows]
    x, y, z = (
        t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (xyz[0] / 0.95047, xyz[1], xyz[2] / 1.08883)
    )
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_and_lines_stand_out_from_what_is_behind_them(scheme):
    ground = picture.GROUND[scheme]
    grounds = [ground, *(fill[scheme] for fill, _ in picture.BOXES.values())]
    for ink in picture.INK.values():
        assert min(contrast(ink[scheme], behind) for behind in grounds) >= 4.5
    lines = [picture.LINE, *picture.SERIES, *(edge for _, edge in picture.BOXES.values())]
    assert min(contrast(line[scheme], ground) for line in lines) >= 3


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_no_two_series_look_alike_to_any_eyes(scheme, eyes):
    for first, second in itertools.combinations(picture.SERIES, 2):
        a, b = seen_as(first[scheme], eyes), seen_as(second[scheme], eyes)
        assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 20, (first, second)


def test_words_in_a_cell_can_be_read_whatever_its_value():
    for series, pair in enumerate(picture.SERIES):
        for share in range(101):
            chosen = charts.ink_on(series, share / 100)
            for scheme in (0, 1):
                top, ground = charts.channels(pair[scheme]), charts.channels(picture.GROUND[scheme])
                mixed = [a * share / 100 + b * (1 - share / 100) for a, b in zip(top, ground, strict=True)]
                ink = 1.0 if chosen[2 + scheme] == "1" else 0.0
                low, high = sorted((charts.luminance(mixed), ink))
                assert (high + 0.05) / (low + 0.05) >= 4.5


BOXES_OF_TEXT = """texts => texts.map(text => {
    const box = text.getBoundingClientRect();
    return [text.textContent, box.left, box.top, box.right, box.bottom, parseFloat(getComputedStyle(text).fontSize)];
})"""


@pytest.mark.parametrize("name", draw.PICTURES)
def test_words_stay_inside_their_picture_apart_from_each_other_and_large_enough(name, browser):
    page = browser.new_page()
    drawn = draw.PICTURES[name]()
    page.set_content(f"<body style='margin:0'>{drawn.svg()}</body>")
    texts = page.locator("svg text").evaluate_all(BOXES_OF_TEXT)
    page.close()
    assert len(texts) > 5
    for words, left, top, right, bottom, size in texts:
        assert left >= 0 and top >= 0 and right <= drawn.width and bottom <= drawn.height, words
        assert size * min(1, 700 / drawn.width) >= 10, words
    for (words, *a, _), (others, *b, _) in itertools.combinations(texts, 2):
        across = min(a[2], b[2]) - max(a[0], b[0])
        down = min(a[3], b[3]) - max(a[1], b[1])
        assert across <= 1 or down <= 4, (words, others)  # a line of text has some air above and below


# --- what is measured ---


@pytest.fixture
def tokens(rng):
    return torch.randint(1, TINY.vocab_size, (2, 24), generator=rng)


@torch.inference_mode()
def test_attention_that_is_shown_is_the_attention_that_the_model_uses(tiny_model, tokens):
    answers, values = [], []
    attentions = [block.attention for block in tiny_model.trunk.blocks]
    with (
        probes.leaving(attentions, lambda _, answer: answers.append(answer)),
        probes.leaving([each.kv_b_proj for each in attentions], lambda _, kv: values.append(kv)),
    ):
        weights = probes.weights_of(tiny_model, tokens)
    # Each latent passes kv_b_proj twice: for the picture, then for the model.
    for attention, shown, answer, kv in zip(attentions, weights, answers, values[1::2], strict=True):
        v = kv.unflatten(-1, (TINY.n_heads, -1))[..., TINY.qk_nope_head_dim :]  # (B, S, H, V)
        torch.testing.assert_close(attention.o_proj(torch.einsum("bhts,bshv->bthv", shown, v).flatten(-2)), answer)


def test_what_could_be_said_after_the_last_block_is_what_the_model_says(tiny_model, tokens):
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    token_bytes = torch.arange(TINY.vocab_size) % 4  # some are marks without bytes
    found = probes.streams(tiny_model, [batch], token_bytes)
    expected = bits_per_byte(tiny_model, [batch], token_bytes.numpy()).value
    assert len(found["bits_per_byte"]) == TINY.n_blocks + 1
    assert found["bits_per_byte"][-1] == pytest.approx(expected, rel=1e-5)
    assert found["bits_per_byte"][0] != pytest.approx(expected, rel=1e-3)


@torch.inference_mode()
def test_experts_that_are_counted_are_those_that_the_model_chooses(tiny_model, tokens, tokenizer):
    _, routings = tiny_model.trunk.routed(tokens)
    routing = probes.Routing(tiny_model, tokenizer).read(tiny_model, [Batch(tokens, tokens)])
    for chosen_by, counts in zip(routings, routing.counts, strict=True):
        assert counts.sum(0).tolist() == chosen_by.experts.flatten().bincount(minlength=TINY.n_routed_experts).tolist()
        chosen = chosen_by.experts[tokens == tokens[0, 0]].flatten()
        assert counts[tokens[0, 0]].tolist() == chosen.bincount(minlength=TINY.n_routed_experts).tolist()
    assert not torch.equal(routing.counts, routing.unsteered)


def test_habits_of_heads_are_looked_for_where_they_are():
    #                  a  b  c  a  a  d  b
    row = torch.tensor([[1, 2, 3, 1, 1, 4, 2]])
    found = probes.targets_of(row)
    assert found["before"].tolist() == [[-1, 0, 1, 2, 3, 4, 5]]
    # Behind the last a, b: the first repeated a points at b; the second at itself, so it does not count.
    assert found["repeat"].tolist() == [[-1, -1, -1, 1, -1, -1, 2]]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "small word"),
        ("ing", "piece of a word"),
        (" The", "capital letter first"),
        ("self", "word of code"),
        ("7", "digit"),
        (".\n\n", "punctuation"),
        (" {\n", "sign, bracket"),
        ("    ", "space, new line"),
        ("", "mark, as <s>"),
        ("�", "other"),
    ],
)
def test_tokens_are_sorted_by_what_they_are(text, kind):
    assert probes.kind_of(text) == kind


@pytest.mark.parametrize("name", preset_names("model"))
def test_the_parts_of_a_preset_are_all_of_it(name):
    from docs.figures.facts import presets

    c = presets()[name]
    parts = of_architecture.parts_of(c)
    assert sum(parts) == c.total_parameters and min(parts) > 0


def test_a_token_beyond_the_clip_pulls_no_more_and_cispo_only_limits_it():
    assert of_grpo.pulls([0.5, 1.0, 1.2, 1.3], 1.0, ObjectiveConfig()) == pytest.approx([0.5, 1.0, 1.2, 0.0])
    assert of_grpo.pulls([0.5, 0.79, 0.81, 3.0], -1.0, ObjectiveConfig()) == pytest.approx([0.0, 0.0, -0.81, -3.0])
    cispo = ObjectiveConfig(surrogate="cispo")
    assert of_grpo.pulls([0.5, 1.3, 6.0], 1.0, cispo) == pytest.approx([0.5, 1.3, 5.0])


# --- the commands ---


def test_a_run_can_be_measured_and_what_comes_out_can_be_drawn(run_config, tmp_path, monkeypatch):
    c = run_config(steps=3)
    base = pretrain.run(c)
    monkeypatch.setattr(measure, "DOCUMENT_TOKENS", 40)
    out = tmp_path / "measured"
    words = ["--base", str(base), "--data", str(c.data), "--run", str(c.out), "--out", str(out)]
    assert measure.main(words) == 0
    files = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*.json")}
    assert files.keys() == {"residual", "attention", "experts", "training"}
    assert all(facts["tokens_seen"] == 3 * 4 * c.model.context_length for facts in files.values())
    assert files["training"]["steps"] == [1, 2, 3] and list(files["training"]["bias"])[-1] == "3"
    assert all(str(tmp_path) not in json.dumps(facts) for facts in files.values())
    monkeypatch.setattr("docs.figures.facts.MEASURED", out)
    for name in ("residual", "heads", "patterns", "expert-load", "expert-tokens", "expert-choice"):
        assert draw.PICTURES[name]().svg() != (draw.HERE / f"{name}.svg").read_text(encoding="utf-8")


TASK = """
from nanollm.sources.gsm8k import Problem

class Even:
    def problems(self, split):
        return [Problem(f"Say {n}!", "1") for n in range(20)]

    def grade(self, problem, reply):
        return len(reply) % 2 == 0
"""


def test_reinforcement_can_be_measured_and_what_comes_out_can_be_drawn(bundle, tmp_path, monkeypatch):
    (tmp_path / "even.py").write_text(TASK, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    grpo.run(
        grpo.Config(
            bundle=bundle,
            out=tmp_path / "run",
            task=TaskConfig(name="even:Even"),
            train=grpo.GrpoTrainConfig(steps=3, validate_every=3, save_every=3),
            rollout=RolloutConfig(prompts=3, group_size=4, max_tokens=10),
            optim=OptimConfig(name="adamw", lr=1e-3, warmup_steps=1, balance_rate=0.0),
            validation_problems=5,
            dtype="float32",
        )
    )
    task = evaluate.EvalTask(name="even:Even")
    evaluate.run(
        evaluate.Config(
            bundle=tmp_path / "run" / "bundle", task=task, n=5, max_tokens=10, against=bundle, dtype="float32"
        )
    )
    assert measure.main(["--grpo", str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "grpo.json").read_text(encoding="utf-8"))
    assert facts["steps"] == [1, 2, 3] and [check["step"] for check in facts["checks"]] == [0, 3]
    (compared,) = facts["evaluations"]
    assert compared["split"] == "test" and compared["before"]["n"] == compared["after"]["n"] == 5
    replies = facts["group"]["replies"]
    assert len(replies) == 4 and len({reply["reward"] for reply in replies}) == 2
    assert sum(reply["advantage"] for reply in replies) == pytest.approx(0)
    monkeypatch.setattr("docs.figures.facts.MEASURED", tmp_path)
    for name in ("grpo-group", "grpo-steps"):
        assert draw.PICTURES[name]().svg() != (draw.HERE / f"{name}.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure: give --base BUNDLE --data FOLDER, --run RUN or --grpo RUN"),
        (["--base", "b"], "--base needs --data FOLDER, the token files that the model was trained on"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(words, message, capsys):
    assert measure.main(words) == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_a_stale_picture_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw, "HERE", tmp_path)
    monkeypatch.setattr(draw, "PICTURES", {"flow": draw.PICTURES["flow"]})
    assert draw.main([]) == 0 and draw.main(["--check"]) == 0
    (tmp_path / "flow.svg").write_text("old", encoding="utf-8")
    assert draw.main(["--check"]) == 1
    assert capsys.readouterr().err == "flow.svg: not what the script draws; run python docs/figures/draw.py\n"


def test_a_report_is_taken_in_both_schemes_and_one_that_asks_the_network_is_refused(tmp_path, browser):
    page = tmp_path / "report.html"
    page.write_text("<!doctype html><meta name=color-scheme content='light dark'><h1>A run</h1>", encoding="utf-8")
    screenshots.report(browser, page, tmp_path)
    assert (tmp_path / "report-light.png").read_bytes() != (tmp_path / "report-dark.png").read_bytes()
    page.write_text("<!doctype html><img src='https://nowhere.invalid/a.png'>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"report\.html complained: .*https://nowhere\.invalid/a\.png"):
        screenshots.report(browser, page, tmp_path)


def test_pictures_of_what_is_not_there_are_refused_in_a_line(tmp_path, capsys):
    assert screenshots.main([]) == 2
    assert capsys.readouterr().err == "nothing to look at: give --chat BUNDLE or --report RUN\n"
