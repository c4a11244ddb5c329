"""A question that stands in the training text is found, and one that does not is not accused."""

import random

import pytest

from nanollm.evals import contamination
from nanollm.evals.contamination import search

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
OTHER = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"


def numbered(*texts):
    return [(f"document {number}", text) for number, text in enumerate(texts, start=1)]


def test_a_planted_question_is_found_with_its_document():
    found = search([OTHER, QUESTION], numbered("Nothing here.", f"Before it. {QUESTION} And after it.", "Nor here."))
    (overlap,) = found.overlaps
    assert (overlap.question, overlap.share, overlap.where) == (2, 1.0, "document 2")
    assert overlap.ngram == "natalia sold clips to 48 of her friends in april and then she"
    assert (found.questions, found.documents, found.unsearched) == (2, 3, 0)


def test_case_punctuation_and_spacing_hide_nothing():
    disguised = QUESTION.upper().replace(" ", " \n-- ").replace("48", "(48)")
    assert search([QUESTION], numbered(disguised)).overlaps[0].share == 1.0


def test_a_part_of_a_question_counts_by_its_n_grams():
    words = QUESTION.split()
    found = search([QUESTION], numbered(" ".join(words[5:20])))  # 15 words: three 13-grams of 16
    assert found.overlaps[0].share == pytest.approx(3 / (len(words) - 12))
    assert found.overlaps[0].ngram.startswith("of her friends")


def test_twelve_words_in_common_are_no_hit_for_13_and_are_for_12():
    documents = numbered(" ".join(QUESTION.split()[:12]) + " however")
    assert search([QUESTION], documents).overlaps == []
    assert len(search([QUESTION], documents, n=12).overlaps) == 1


def test_the_same_words_in_another_order_are_no_hit():
    rng = random.Random(0)
    words = QUESTION.split()
    assert search([QUESTION], numbered(*(" ".join(rng.sample(words, len(words))) for _ in range(200)))).overlaps == []


def test_an_n_gram_does_not_reach_from_one_document_into_the_next():
    words = QUESTION.split()
    assert search([QUESTION], numbered(" ".join(words[:10]), " ".join(words[10:20]))).overlaps == []


def test_a_question_shorter_than_n_is_searched_as_a_whole():
    question = "How many legs do three dogs and two hens have?"  # 10 words
    found = search([question], numbered("x how many legs do three dogs and two hens have y"))
    assert found.overlaps[0].share == 1.0
    assert search([question], numbered("how many legs do three dogs and two hens")).overlaps == []


def test_a_question_below_eight_words_is_not_searched_and_counted():
    found = search(["What is it?", QUESTION], numbered("What is it? Who knows."))
    assert (found.unsearched, found.overlaps) == (1, [])
    assert search(["What is it?"], numbered("What is it? Who knows."), n=3).overlaps[0].share == 1.0


def test_the_worst_come_first():
    half = " ".join(QUESTION.split()[:14])
    found = search([QUESTION, OTHER], numbered(f"{half} nothing else", OTHER))
    assert [overlap.question for overlap in found.overlaps] == [2, 1]


def test_long_documents_and_many_short_ones_are_searched_to_their_ends(monkeypatch):
    monkeypatch.setattr(contamination, "PIECE_CHARS", 50)
    filler = "word " * 100
    long = f"{filler}{QUESTION} {filler}"
    documents = numbered(*["too short"] * 20, long, "", *["too short"] * 20)
    assert search([QUESTION, OTHER], documents).overlaps[0].where == "document 21"
    assert search([OTHER], documents).overlaps == []


def test_the_training_text_is_counted_and_read_once():
    documents = iter(numbered("Grüße", "", "ab"))
    found = search([QUESTION], documents)
    assert (found.documents, found.text_bytes) == (3, 9)
    assert next(documents, None) is None


@pytest.mark.realdata
def test_the_test_of_gsm8k_stands_nowhere_in_the_training_text_beside_the_project(shared_data):
    from nanollm.sources.files import find_files, read_rows, read_texts

    (test,) = find_files([shared_data / "gsm8k" / "test.jsonl"])
    questions = [question for question, _ in read_rows([test], ["question", "answer"], pytest.fail)]
    files = find_files([shared_data / "tinyshakespeare"])
    texts = list(read_texts(files, "text", pytest.fail))
    assert search(questions, numbered(*texts)).overlaps == []
    found = search(questions, numbered(*texts, questions[7]))
    assert [overlap.question for overlap in found.overlaps] == [8]
