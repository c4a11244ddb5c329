import pytest

from nanollm.sources import instructions, openwebtext


def test_documents_and_instructions_come_from_files(tmp_path):
    (tmp_path / "owt.jsonl").write_text('{"text": "a document"}\n{"text": ""}\n')
    (tmp_path / "sni.csv").write_text("response,prompt\nyes,really?\n")
    bad = []
    assert list(openwebtext.documents([tmp_path / "owt.jsonl"], bad.append)) == ["a document"]
    assert [record.line for record in bad] == [2]
    (talk,) = instructions.conversations([tmp_path / "sni.csv"], "train", pytest.fail)
    assert [(message.role, message.content) for message in talk.messages] == [("user", "really?"), ("assistant", "yes")]


@pytest.mark.realdata
def test_all_instructions_are_read(shared_data):
    bad = []
    talks = instructions.conversations([shared_data / "supernatural-instructions"], "train", bad.append)
    assert sum(1 for _ in talks) + len(bad) == 46_693
