"""A model's replies are its own, in order, and judged by the function that gives rewards."""

from dataclasses import replace

import pytest

from nanollm.evals.problems import Accuracy, Attempt, accuracy, graders, judge, majority, solve
from nanollm.evals.results import reply_figures
from nanollm.evals.stats import wilson
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.transformer import Transformer
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import Gsm8k
from nanollm.sources.word_problems import WordProblems
from nanollm.text.chat import Conversation, encode_prompt, reply_ends, reply_text
from tests.stages.conftest import MODEL

SHAPE = replace(MODEL, context_length=64)
QUESTIONS = ["the king", "no", "once upon a time there was a king", "why", "a"]
PROBLEMS = [Problem(question, f"#### {len(question)}") for question in QUESTIONS]
CHANCE = SamplingConfig(temperature=1.0)


class EvenLength:
    """A reply is right if it has an even number of characters: easy to compute again."""

    def problems(self, split):
        return PROBLEMS

    def grade(self, problem, reply):
        return len(reply) % 2 == 0


@pytest.fixture(scope="module")
def model():
    return Transformer(SHAPE).init(1)


def test_each_problem_gets_the_reply_that_the_engine_gives_it_alone(model, tokenizer):
    attempts = solve(model, tokenizer, PROBLEMS, max_tokens=12)
    assert [attempt.problem for attempt in attempts] == PROBLEMS
    for attempt in attempts:
        prompt = encode_prompt(Conversation.of(attempt.problem.question), tokenizer)
        (alone,) = generate(
            model, [prompt], SamplingConfig(temperature=0), max_tokens=12, stop_token_ids=reply_ends(tokenizer)
        )
        assert attempt.replies == [reply_text(alone.ids, tokenizer)]
        assert (attempt.finish, attempt.tokens) == ([alone.finish], [len(alone.ids)])


@pytest.mark.parametrize(("sampling", "samples"), [(SamplingConfig(temperature=0), 1), (CHANCE, 3)])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_replies_do_not_depend_on_how_many_are_sampled_at_once(model, tokenizer, sampling, samples, rows):
    together = solve(model, tokenizer, PROBLEMS, sampling, max_tokens=8, samples=samples, seed=3)
    apart = solve(model, tokenizer, PROBLEMS, sampling, max_tokens=8, samples=samples, seed=3, rows=rows)
    assert apart == together
    assert all(len(attempt.replies) == samples for attempt in apart)


def test_the_samples_of_a_problem_differ_and_another_seed_gives_others(model, tokenizer):
    first, other = (solve(model, tokenizer, PROBLEMS, CHANCE, max_tokens=8, samples=4, seed=s) for s in (0, 100))
    assert all(len(set(attempt.replies)) > 1 for attempt in first)
    assert [attempt.replies for attempt in first] != [attempt.replies for attempt in other]


def test_a_question_that_fills_the_context_counts_as_wrong_and_is_told(model, tokenizer):
    long = Problem("why " * 100, "#### 1")
    attempts = solve(model, tokenizer, [PROBLEMS[0], long, PROBLEMS[1]], CHANCE, max_tokens=4, samples=2)
    assert attempts[1] == Attempt(long, ["", ""], ["no room"] * 2, [0, 0])
    judged = judge(attempts, {"any": lambda problem, reply: True})
    assert judged.verdicts["any"] == [[True, True], [False, False], [True, True]]
    assert reply_figures(judged)["no_room"] == 1


def test_an_id_that_the_tokenizer_does_not_know_says_nothing(tokenizer):
    wide = replace(SHAPE, vocab_size=6000)  # nine of ten draws are beyond the tokenizer's 600
    model = Transformer(wide).init(0)
    attempts = solve(model, tokenizer, PROBLEMS, CHANCE, max_tokens=10)
    assert [attempt.tokens for attempt in attempts] == [[10]] * len(PROBLEMS)


def test_accuracy_is_the_share_of_right_replies_with_its_interval(model, tokenizer):
    replies = [attempt.replies[0] for attempt in solve(model, tokenizer, PROBLEMS, max_tokens=8)]
    right = sum(len(reply) % 2 == 0 for reply in replies)
    score = accuracy(model, tokenizer, EvenLength(), PROBLEMS, max_tokens=8, rows=2)
    assert score == Accuracy(len(PROBLEMS), right, *wilson(right, len(PROBLEMS)))
    assert score.value == right / len(PROBLEMS)


def test_no_problems_have_no_accuracy(model, tokenizer):
    with pytest.raises(ValueError, match="at least one problem"):
        accuracy(model, tokenizer, EvenLength(), [], max_tokens=8)


def attempt(*replies, finish="end"):
    return Attempt(Problem("How many?", "#### 12"), list(replies), [finish] * len(replies), [3] * len(replies))


NOTED = "6*2=<<6*2=12>>12\n#### 12"
ODD_NOTE = "6*2=<<6*2=13>>13\n#### 12"


@pytest.mark.parametrize("task", [WordProblems(), Gsm8k()])
def test_our_tasks_are_read_in_three_ways_at_once(task):
    replies = ["#### 12", "It is 12", "#### 13", "#### 12 of 14", NOTED, ODD_NOTE, "<<6*2=12>>\n<<?\n#### 12"]
    assert judge([attempt(*replies)], graders(task)).verdicts == {
        "strict": [[True, False, False, False, True, True, True]],
        "flexible": [[True, True, False, False, True, True, True]],
        "checked": [[False, False, False, False, True, False, False]],
    }


@pytest.mark.parametrize(
    ("replies", "strict", "flexible"),
    [
        (["#### 13", "#### 12", "so #### 12.0"], True, True),
        (["#### 12", "#### 13", "#### 13"], False, False),
        (["#### 12", "#### 13"], True, True),  # equally common: the first
        (["#### 13", "#### 12"], False, False),
        (["it is 12", "it is 12", "#### 13"], False, True),
        (["", "#### 12", ""], True, True),  # no number, no vote
        (["", "no idea"], False, False),
    ],
)
def test_the_commonest_answer_is_elected(replies, strict, flexible):
    judged = judge([attempt(*replies)], graders(Gsm8k()))
    assert (majority(judged, "strict"), majority(judged, "flexible")) == ([strict], [flexible])
    assert majority(judged, "checked") is None


def test_a_task_of_your_own_is_asked_alone():
    judged = judge([attempt("four"), attempt("three")], graders(EvenLength()))
    assert judged.verdicts == {"correct": [[True], [False]]}
    assert judged.first("correct") == [True, False]


def test_a_grader_that_raises_counts_as_wrong_and_is_told_once(capsys):
    def grade(problem, reply):
        return 1 / len(reply) < 1

    judged = judge([attempt("", "ok", ""), attempt("ok")], {"correct": grade})
    assert judged.verdicts == {"correct": [[False, True, False], [True]]}
    assert judged.faults == 2
    said = capsys.readouterr().err
    assert said.count("ZeroDivisionError") == 1
    assert "'How many?'" in said


def test_what_replies_are_like_is_told():
    judged = judge([attempt("a", "b"), attempt("c", "d", finish="length")], {})
    assert reply_figures(judged) == {"ended": 0.5, "mean_tokens": 3.0, "no_room": 0, "grader_faults": judged.faults}


@pytest.mark.realdata
def test_how_many_worked_solutions_of_gsm8k_pass_each_of_its_graders(shared_data):
    task = Gsm8k((shared_data / "gsm8k",))
    attempts = [Attempt(problem, [problem.answer], ["end"], [1]) for problem in task.problems("test")]
    judged = judge(attempts, graders(task))
    passed = {name: sum(judged.first(name)) for name in judged.verdicts}
    assert (len(attempts), passed) == (1319, {"strict": 1319, "flexible": 1319, "checked": 1237})
