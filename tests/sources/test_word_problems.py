import pickle
import re
from collections import Counter
from fractions import Fraction
from itertools import combinations
from operator import add, mul, sub, truediv
from random import Random

import pytest

from nanollm.sources.gsm8k import extract_answer
from nanollm.sources.word_problems import (
    BOXES,
    ITEMS,
    LENGTH,
    LEVELS,
    PEOPLE,
    SPLITS,
    STORIES,
    STORIES_OF,
    Story,
    WordProblems,
    lessons,
)

SUM = re.compile(r"([0-9]+)([-+*/])([0-9]+)=<<([^<>]*)>>([0-9]+)")
WORK_OUT = {"+": add, "-": sub, "*": mul, "/": truediv}


def some(split, count=400, **config):
    return WordProblems(**{"levels": LEVELS, **config}).problems(split)[:count]


def numbers_in(text):
    return [int(number) for number in re.findall(r"[0-9]+", text)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("largest", [5, 20, 1000])
def test_every_step_is_a_true_sum_and_the_last_one_is_the_answer(split, largest):
    """Worked out here with fractions, by none of the code that made them."""
    for problem in some(split, largest=largest):
        *steps, final = problem.answer.split("\n")
        for step in steps:
            (left, operator, right, note, shown), *more = SUM.findall(step)
            assert not more
            assert note == f"{left}{operator}{right}={shown}"
            assert WORK_OUT[operator](Fraction(left), Fraction(right)) == int(shown)
        assert final == f"#### {shown}"


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_uses_the_question_and_the_steps_before_it_and_nothing_else(split):
    """Twice, and half, are said in words; all else in numbers."""
    for problem in some(split):
        known = {*numbers_in(problem.question), 2}
        for left, _, right, _, shown in SUM.findall(problem.answer):
            assert {int(left), int(right)} <= known, problem
            known.add(int(shown))


@pytest.mark.parametrize("largest", [5, 20, 100])
def test_no_number_is_below_2_or_above_5_times_the_largest(largest):
    numbers = {number for each in some("train", largest=largest) for number in numbers_in(each.question + each.answer)}
    assert min(numbers) == 2
    assert 4 * largest < max(numbers) <= 5 * largest


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.question[:40])
def test_each_story_finds_numbers_for_any_largest(story):
    for largest in (5, 6, 8, 13, 20, 1000):
        for seed in range(20):
            story.draw_numbers(Random(seed), largest)


def test_two_problems_of_five_are_two_turns_of_one_lesson_and_none_is_lost():
    problems = list(some("train", count=14))
    turns = [[message.content for message in lesson.messages] for lesson in lessons(problems)]
    assert [len(each) // 2 for each in turns] == [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1]
    assert [text for each in turns for text in each] == [
        text for problem in problems for text in (problem.question, problem.answer)
    ]


def test_there_are_enough_stories_and_some_of_each_level_are_heldout():
    counts = {key: len(stories) for key, stories in STORIES_OF.items()}
    assert {level: (counts[level, False], counts[level, True]) for level in LEVELS} == {
        1: (35, 4),
        2: (46, 6),
        3: (9, 3),
        4: (6, 2),
    }
    assert len({story.question for story in STORIES}) == len(STORIES) == 111


def test_a_story_is_written_out_as_its_text_says():
    story = Story.of("{name} has {t=a*k} {items}.", "[x=t/k].", "{He} has [y=x*2] {items}.")
    assert story.drawn == ("a", "k")
    values = story.draw_numbers(Random(0), 20)
    values = {**values, "name": "Mia", "He": "She", "items": "eggs"}
    a, k = values["a"], values["k"]
    assert story.question.format_map(values) == f"Mia has {a * k} eggs."
    assert story.solution.format_map(values) == (
        f"{a * k}/{k}=<<{a * k}/{k}={a}>>{a}.\nShe has {a}*2=<<{a}*2={2 * a}>>{2 * a} eggs.\n#### {2 * a}"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_levels_come_equally_often_and_are_the_number_of_steps(split):
    steps = Counter(each.answer.count("\n") for each in some(split, 1200, levels=(1, 3, 4)))
    assert steps.keys() == {1, 3, 4}
    assert all(330 < count < 470 for count in steps.values())


@pytest.mark.parametrize("split", SPLITS)
def test_a_problem_depends_on_seed_split_and_place_only(split):
    problems = WordProblems(seed=3).problems(split)
    forwards = [problems[place] for place in range(50)]
    assert [problems[place] for place in reversed(range(50))] == forwards[::-1]
    assert list(WordProblems(seed=3).problems(split)[:50]) == forwards
    assert list(pickle.loads(pickle.dumps(problems))[:50]) == forwards
    assert [WordProblems(seed=4).problems(split)[place] for place in range(50)] != forwards


def test_problems_are_the_same_on_every_machine_and_for_ever():
    """Whatever was measured on them was measured on these. A new template changes them: say so in the change log."""
    far = {split: WordProblems(levels=LEVELS).problems(split)[10**6] for split in SPLITS}
    assert far["train"].question == (
        "Lucy has 4 letters. Carl has 3 times as many. They put all of them together and then give 7 away. "
        "How many letters are left?"
    )
    assert far["test"].answer == (
        "Ella has 8+19=<<8+19=27>>27 marbles.\nThat is 27-6=<<27-6=21>>21 marbles more than Ben.\n#### 21"
    )
    assert far["heldout"].question == (
        "A box holds 17 keys. Noah takes 10 keys out of it. How many keys are still in the box?"
    )


def test_a_question_is_never_in_two_splits_whatever_the_seeds():
    """Small numbers, so that questions do come twice."""
    seen = {
        split: {each.question for seed in range(2) for each in some(split, 1000, levels=(1,), largest=5, seed=seed)}
        for split in SPLITS
    }
    assert all(len(questions) < 1990 for questions in seen.values())  # of 2,000
    assert all(first.isdisjoint(second) for first, second in combinations(seen.values(), 2))


DRAWN_WORDS = {name for name, _ in PEOPLE} | {f"{item}s" for item in ITEMS} | {*BOXES, "he", "she", "him", "her"}


def without_words(question):
    """A question without names and things."""
    return re.sub(r"\w+", lambda word: "_" if {word[0], word[0].lower()} & DRAWN_WORDS else word[0], question)


def test_new_numbers_asks_for_other_numbers_and_not_for_other_names_only():
    train, test, new = (
        {without_words(each.question) for each in some(split, 1500, levels=(1,))} for split in SPLITS[:3]
    )
    assert len(new) < 1000  # so that all of them have come, again and again
    assert new.isdisjoint(train | test)
    assert not train.isdisjoint(test)


def test_heldout_tells_other_stories():
    def stories(split):
        return {re.sub("[0-9]+", "0", without_words(each.question)) for each in some(split, 2500)}

    assert stories("train") == stories("test") == stories("new_numbers")
    assert stories("train").isdisjoint(stories("heldout"))
    assert (len(stories("train")), len(stories("heldout"))) == (96, 15)


def test_problems_are_a_sequence_that_is_as_good_as_endless():
    problems = WordProblems().problems("train")
    assert len(problems) == LENGTH == 2**31 - 1
    assert problems[-1] == problems[LENGTH - 1]
    assert list(problems[4:10:2]) == [problems[4], problems[6], problems[8]]
    assert problems[10:][-1] == problems[-1]
    with pytest.raises(IndexError):
        problems[LENGTH]


def test_a_problem_is_graded_by_its_number():
    words = WordProblems()
    for problem in words.problems("test")[:50]:
        assert words.grade(problem, problem.answer)
        assert words.grade(problem, f"I think\n#### {extract_answer(problem.answer)}.00 apples")
        assert not words.grade(problem, problem.answer + "0")
        assert not words.grade(problem, problem.answer.replace("####", ""))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="words has no split 'val'; it has train, test, new_numbers, heldout"):
        WordProblems().problems("val")
