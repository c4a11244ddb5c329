import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanollm.sources import gsm8k, instructions, openwebtext
from nanollm.sources.hub import stream_rows


def dataset(folder, columns, split="train"):
    """A local folder that `datasets` opens like a dataset of the hub."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_rows_are_streamed_and_bad_ones_reported_by_row(tmp_path):
    name = dataset(tmp_path / "owt", {"id": [1, 2, 3, 4], "text": ["a", None, "", "b"]})
    bad = []
    assert list(stream_rows(name, "train", ["text"], bad.append)) == [("a",), ("b",)]
    assert [(record.path, record.line, record.reason) for record in bad] == [
        (f"{name}:train", 2, "text is missing"),
        (f"{name}:train", 3, "text is empty"),
    ]


def test_openwebtext_instructions_and_problems_have_their_schemas(tmp_path):
    owt = dataset(tmp_path / "owt", {"text": ["a document"]})
    sni = dataset(tmp_path / "sni", {"prompt": ["p"], "response": ["r"]})
    problems = {"question": ["q"], "answer": ["1 + 1 = 2\n#### 2"]}
    gsm = dataset(tmp_path / "gsm", problems, "test")
    assert list(openwebtext.documents(None, pytest.fail, name=owt)) == ["a document"]
    (talk,) = instructions.conversations(None, "train", pytest.fail, name=sni)
    assert [message.content for message in talk.messages] == ["p", "r"]
    rows = stream_rows(gsm, "test", gsm8k.COLUMNS, pytest.fail)
    assert list(rows) == [("q", "1 + 1 = 2\n#### 2")]


def test_a_wrong_column_names_those_that_are_there(tmp_path):
    name = dataset(tmp_path / "owt", {"id": ["1"], "body": ["a"]})
    with pytest.raises(ValueError, match="has no column text, only id, body; choose with --text_column"):
        list(stream_rows(name, "train", ["text"], pytest.fail))


def test_a_missing_split_or_dataset_is_the_users_to_mend(tmp_path):
    name = dataset(tmp_path / "owt", {"text": ["a"]})
    with pytest.raises(ValueError, match=r"cannot open the dataset .*owt \(tests\): .*check the name, the split"):
        list(stream_rows(name, "tests", ["text"], pytest.fail))
    with pytest.raises(ValueError, match="cannot open the dataset"):
        list(stream_rows(str(tmp_path / "nothing"), "train", ["text"], pytest.fail))
    with pytest.raises(ValueError, match=r"cannot open the dataset Skylion007/openwebtext \(train\)"):
        next(openwebtext.documents(None, pytest.fail))


def test_a_dataset_that_breaks_off_says_at_which_row(tmp_path):
    name = dataset(tmp_path / "owt", {"text": [f"document {n} " * 500 for n in range(2000)]})
    file = tmp_path / "owt" / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"owt \(train\) broke off at row 1: "):
        list(stream_rows(name, "train", ["text"], pytest.fail))


@pytest.mark.realdata
def test_real_parquet_is_streamed_as_from_the_hub(shared_data):
    rows = stream_rows(str(shared_data / "openwebtext"), "train", ["text"], pytest.fail)
    assert sum(len(text) > 0 for _, (text,) in zip(range(500), rows, strict=False)) == 500
