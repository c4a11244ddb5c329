import json

import pytest

from nanollm.sources import gsm8k, instructions, openwebtext

ANSWERS = {
    "He sold 48/2 = <<48/2=24>>24 clips.\n#### 1,080": "1,080",
    "Owed.\n#### -12": "-12",
    "Paid.\n#### 3.50": "3.50",
    "Paid.\n#### $5 ": "$5",
    "#### a mark inside\n#### 7": "7",
}


@pytest.fixture
def problems(tmp_path):
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"{split}?", "answer": answer}) for answer in ANSWERS]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize(("solution", "answer"), ANSWERS.items())
def test_answers_are_kept_exactly(solution, answer):
    assert gsm8k.extract_answer(solution) == answer


@pytest.mark.parametrize("solution", ["no mark: 7", "empty ####", ""])
def test_an_answer_without_its_mark_is_refused(solution):
    with pytest.raises(ValueError, match="ends in '#### <answer>'"):
        gsm8k.extract_answer(solution)


def test_a_problem_becomes_its_question_and_its_whole_solution(problems):
    talks = list(gsm8k.conversations([problems], "test", pytest.fail))
    assert [talk.messages[0].content for talk in talks] == ["test?"] * len(ANSWERS)
    assert [talk.messages[1].content for talk in talks] == list(ANSWERS)
    assert [message.role for message in talks[0].messages] == ["user", "assistant"]


def test_documents_and_instructions_come_from_files(tmp_path):
    (tmp_path / "owt.jsonl").write_text('{"text": "a document"}\n{"text": ""}\n')
    (tmp_path / "sni.csv").write_text("response,prompt\nyes,really?\n")
    bad = []
    assert list(openwebtext.documents([tmp_path / "owt.jsonl"], bad.append)) == ["a document"]
    assert [record.line for record in bad] == [2]
    (talk,) = instructions.conversations([tmp_path / "sni.csv"], "train", pytest.fail)
    assert [(message.role, message.content) for message in talk.messages] == [("user", "really?"), ("assistant", "yes")]


@pytest.mark.realdata
def test_all_problems_of_gsm8k_have_an_answer(shared_data):
    counts = {}
    for split in ("train", "test"):
        found = list(gsm8k.problems([shared_data / "gsm8k"], split, pytest.fail))
        counts[split] = len(found)
        assert all(each.answer.endswith(gsm8k.extract_answer(each.answer)) for each in found)
    assert counts == {"train": 7473, "test": 1319}


@pytest.mark.realdata
def test_all_instructions_are_read(shared_data):
    bad = []
    talks = instructions.conversations([shared_data / "supernatural-instructions"], "train", bad.append)
    assert sum(1 for _ in talks) + len(bad) == 46_693
