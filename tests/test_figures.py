"""The pictures of the docs exist, are told in words, and show what was measured."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from nanollm.config import preset_names

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = DOCS / "figures"
ROOT = DOCS.parent
BY_HAND = {"architecture", "flow", "demo"}
CONCEPTS = sorted((DOCS / "concepts").glob("*.md"))


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install -e ".[dev]"')
    from docs.figures import draw

    return draw


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_a_concept_page_shows_pictures_that_exist_and_tells_in_words_what_is_on_them(page):
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert 1 <= len(shown) <= 4
    assert [file for _, file in shown if not (page.parent / file).is_file()] == []
    assert all(len(words) > 20 for words, _ in shown)


def test_every_picture_is_shown_and_every_chart_is_drawn_by_the_script(draw):
    text = "".join(page.read_text(encoding="utf-8") for page in [*CONCEPTS, DOCS / "index.md", ROOT / "README.md"])
    names = {file.stem for file in FIGURES.glob("*.svg")}
    assert names == draw.CHARTS.keys() | BY_HAND
    assert {name for name in names if f"figures/{name}.svg" not in text} == set()


@pytest.mark.long
def test_a_chart_drawn_again_is_the_committed_one(draw, capsys):
    if f"Matplotlib v{draw.mpl.__version__}," not in (FIGURES / "trade.svg").read_text(encoding="utf-8"):
        pytest.skip(f"drawn by another version than matplotlib {draw.mpl.__version__}")
    assert draw.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_chart_is_named(draw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw, "HERE", tmp_path)
    monkeypatch.setattr(draw, "CHARTS", {"grpo-clip": draw.CHARTS["grpo-clip"]})
    assert draw.main([]) == 0 and draw.main(["--check"]) == 0
    (tmp_path / "grpo-clip.svg").write_text("old", encoding="utf-8")
    assert draw.main(["--check"]) == 1
    assert "grpo-clip.svg: run python docs/figures/draw.py" in capsys.readouterr().out


def test_a_token_beyond_the_clip_pulls_no_more_and_cispo_only_limits_it(draw):
    clip, cispo = (draw.ObjectiveConfig(surrogate=kind) for kind in ("clip", "cispo"))
    assert draw.pulls([0.5, 1.0, 1.2, 1.3], 1.0, clip) == pytest.approx([0.5, 1.0, 1.2, 0.0])
    assert draw.pulls([0.5, 0.79, 0.81, 3.0], -1.0, clip) == pytest.approx([0.0, 0.0, -0.81, -3.0])
    assert draw.pulls([0.5, 1.3, 6.0], 1.0, cispo) == pytest.approx([0.5, 1.3, 5.0])


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_the_code_of_a_concept_page_runs(page):
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("file", sorted((FIGURES / "measured").glob("*.json")), ids=lambda file: file.stem)
def test_a_measured_file_names_its_model_commit_and_machine(file):
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert facts["model"] in preset_names("model")
    assert re.fullmatch(r"[0-9a-f]{12}\+?", facts["commit"])
    assert "torch" in facts["machine"] and "/" not in facts["machine"]


def test_the_tables_of_the_concept_pages_are_those_of_the_measured_files():
    experts, grpo = (json.loads((FIGURES / "measured" / f"{name}.json").read_text()) for name in ("experts", "grpo"))
    page = (DOCS / "concepts" / "experts.md").read_text(encoding="utf-8")
    for kind, found in experts["kinds"].items():
        if found["tokens"] > 0.005 * experts["read"]:
            shares = " | ".join(f"{100 * layer[0]:.0f}" for layer in found["shares"])
            assert f"| {kind} | {100 * found['tokens'] / experts['read']:.1f} | {shares} |" in page
    page = (DOCS / "concepts" / "grpo.md").read_text(encoding="utf-8")
    for each in grpo["group"]["replies"]:
        reply = each["reply"].replace("\n", " ").removeprefix("Anna has ")
        assert f"| `{reply}` | {each['reward']:.0f} | {each['advantage']:+.1f} |".replace("-0.5", "−0.5") in page


def test_what_the_demo_reaches_is_said_as_the_range_of_its_repetitions():
    repetitions = json.loads((FIGURES / "demo_repetitions.json").read_text(encoding="utf-8"))
    assert len(repetitions) >= 3

    def spread(split, moment):
        shares = [each[split][moment] for each in repetitions]
        return f"{min(shares):.0f} to {max(shares):.0f} %"

    before, after = spread("test", 0), spread("test", 1)
    for page in ("docs/results.md", "docs/tutorial.md", "configs/grpo/nano-1m-words.yaml"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert before in text, page
        assert after in text, page
    assert before in (ROOT / "configs/sft/nano-1m-words.yaml").read_text(encoding="utf-8")
    assert f"| {spread('heldout', 0)} | {spread('heldout', 1)} |" in (ROOT / "docs/tutorial.md").read_text("utf-8")
