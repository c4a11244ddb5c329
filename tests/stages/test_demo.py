"""The demo runs, from nothing to a model that is better than before, and goes on where it stopped."""

import dataclasses
import itertools
import json
import re
import shutil
from statistics import fmean

import pytest

from nanollm import cli
from nanollm.bundle import load_bundle
from nanollm.evals.problems import Attempt, judge, solve
from nanollm.export.card import find_evaluations
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.tools import tool_caller
from nanollm.sources import builtin
from nanollm.sources.gsm8k import Problem, grade
from nanollm.sources.word_problems import NAMES, WordProblems
from nanollm.stages import demo, preprocess
from nanollm.text.chat import Conversation, Message, encode_prompt, reply_ends, reply_text
from tests.test_figures import ROOT

SHORT = {"sft_steps": 2, "grpo_steps": 1, "exam": 4}
STEPS = {"corpus", "problems", "tokenizer", "preprocess", "pretrain", "lessons", "sft", "grpo", "exam"}


@pytest.fixture
def short_corpus(monkeypatch):
    """The first documents of the real built-in corpus."""
    documents = list(itertools.islice(builtin.documents(), 120))
    monkeypatch.setattr(demo, "documents", lambda: iter(documents))


def test_the_demo_runs_offline_and_the_model_learns(short_corpus, tmp_path, capsys):
    path = demo.run(demo.Config(out=tmp_path / "demo", steps=6, **SHORT))
    summary = json.loads(path.read_text())
    assert path == tmp_path / "demo" / "summary.json"
    assert set(summary["seconds"]) == STEPS
    assert 0 < summary["pretrain"]["val_bpb_after"] < summary["pretrain"]["val_bpb_before"]
    assert len(summary["pretrain"]["samples_after"]) == len(demo.PROMPTS)
    assert summary["sft"]["accuracy_after"] == summary["grpo"]["accuracy_before"]
    assert summary["sft"]["n"] == summary["grpo"]["n"] == 4
    for low, high in (summary["grpo"]["accuracy_after_interval"], summary["sft"]["accuracy_before_interval"]):
        assert 0 <= low < high <= 1
    assert summary["new_stories"]["n"] == 4
    assert load_bundle(tmp_path / "demo" / "grpo" / "bundle").tools == ["calculator"]
    said = capsys.readouterr().err
    for model, splits in {"sft": 2, "grpo": 2}.items():
        found = find_evaluations(tmp_path / "demo" / model / "bundle")
        assert [each["bundle"]["greedy"]["scores"]["strict"]["n"] for each in found] == [4] * splits
        page = (tmp_path / "demo" / model / "report.html").read_text("utf-8")
        assert "words heldout, strict, greedy" in page and "words test, strict: " in page
    assert f"nanollm generate {tmp_path / 'demo' / 'pretrain' / 'bundle'}" in said
    assert f"nanollm chat {tmp_path / 'demo' / 'grpo' / 'bundle'}" in said
    assert "[5/9] nano-1m: 1,206,016 parameters learn to write" in said


def test_what_is_shown_as_solved_is_worked_as_the_solution_is():
    """3 * 4 + 8 is 20: two wrong steps can give that, too."""
    problem = Problem("How many?", "3*4=<<3*4=12>>12\n12+8=<<12+8=20>>20\n#### 20")
    lucky = "3+4=<<3+4=7>>7\n12+8=<<12+8=20>>20\n#### 20"
    replies = {
        "pretrain": ["", "", ""],
        "sft": ["#### 1", "#### 1", lucky],
        "grpo": [lucky, problem.answer, problem.answer],
    }

    def judged(model):
        attempts = [Attempt(problem, [reply], ["end"], [9]) for reply in replies[model]]
        return judge(attempts, {"strict": lambda problem, reply: reply.endswith("#### 20")})

    summary = demo.report(*[{model: judged(model) for model in demo.MODELS}] * 2)
    assert [solved["grpo"] for solved in summary["solved_now"]] == [problem.answer]
    assert summary["grpo"]["accuracy_after"] == 1
    assert summary["ask"] == problem.question


@pytest.mark.long
def test_an_interrupted_demo_goes_on_where_it_stopped(short_corpus, tmp_path, capsys, monkeypatch):
    c = demo.Config(out=tmp_path / "demo", steps=2, **SHORT)
    with monkeypatch.context() as broken:
        broken.setattr(preprocess, "run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            demo.run(c)
    demo.run(c)
    assert "done before" in capsys.readouterr().err
    assert set(json.loads((c.out / "summary.json").read_text())["seconds"]) == STEPS


@pytest.mark.long
def test_another_demo_does_not_pass_for_this_one(short_corpus, tmp_path):
    c = demo.Config(out=tmp_path / "demo", steps=1, **SHORT)
    demo.run(c)
    with pytest.raises(ValueError, match="choose another --out"):
        demo.run(dataclasses.replace(c, seed=1))
    shutil.rmtree(c.out / "pretrain")
    demo.run(c)  # what is gone is made again
    assert (c.out / "pretrain" / "bundle").is_dir()


ASKED = re.compile(rf"\b(?:{'|'.join(NAMES)}) (?:has|have|had|buys|gets|makes) [^\n\"`]*?\?")
QUESTIONS = {  # that the documents and the demo ask, and their answers
    "Tom has 4 boxes with 6 cups in each. How many cups does he have in all?": "24",
    "Tom has 25 cups. Rosa has 14 more cups than Tom. How many cups do Tom and Rosa have together?": "64",
    demo.QUESTION: "20",
    "Anna has 34 apples. Tom gives her 15 more. How many apples does Anna have now?": "49",
}


def test_the_documents_ask_no_other_questions(capsys):
    docs = ROOT / "docs"  # its concepts show what a model once said, and ask nothing
    pages = [ROOT / "README.md", *docs.glob("*.md"), *docs.glob("howto/*.md"), ROOT / "configs/sft/nano-1m-words.yaml"]
    assert {"tutorial.md", "serve.md", "export.md"} < {page.name for page in pages}
    texts = {page: page.read_text("utf-8") for page in pages if page.name != "log.md"}
    for verb in cli.all_verbs():
        assert cli.main([verb, "--help"]) == 0
        texts[verb] = " ".join(capsys.readouterr().out.split())
    asked = {question for text in texts.values() for question in ASKED.findall(text)}
    assert asked | {demo.QUESTION} == set(QUESTIONS)


def share_of_second_questions(bundle, count=100):
    """Share of new problems that are solved as the second question of a chat, after another and its solution."""
    problems = WordProblems(levels=(2,), largest=demo.LARGEST).problems("test")[: 2 * count]
    prompts = [
        encode_prompt(Conversation((*first.conversation.messages, Message("user", second.question))), bundle.tokenizer)
        for first, second in zip(problems[::2], problems[1::2], strict=True)
    ]
    greedy, ends = SamplingConfig(temperature=0), reply_ends(bundle.tokenizer)
    tool = tool_caller(bundle)
    replies = generate(bundle.model, prompts, greedy, max_tokens=96, stop_token_ids=ends, tool=tool)
    texts = [reply_text(reply.ids, bundle.tokenizer) for reply in replies]
    return fmean(grade(text, each.answer) for text, each in zip(texts, problems[1::2], strict=True))


@pytest.mark.slow
def test_a_finished_demo_answers_every_question_of_the_documents(tmp_path):
    summary = json.loads(demo.run(demo.Config(out=tmp_path / "demo")).read_text())
    bundle = load_bundle(tmp_path / "demo" / "grpo" / "bundle")
    problems = [Problem(question, f"#### {answer}") for question, answer in QUESTIONS.items()]
    attempts = solve(bundle.model, bundle.tokenizer, problems, max_tokens=96, tool=tool_caller(bundle))
    wrong = [each.replies[0] for each in attempts if not grade(each.replies[0], each.problem.answer)]
    assert wrong == []
    assert share_of_second_questions(bundle) > 0.5  # nearly none, where all lessons are one question each
    assert summary["grpo"]["accuracy_after"] > summary["sft"]["accuracy_after"] > 0.7
    assert len(summary["solved_now"]) == demo.SHOWN
