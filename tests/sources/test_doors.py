"""Whatever a file holds, each of its records is kept or named: nothing else happens to one."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.sources.datasets import chats
from nanollm.sources.files import read_texts

GOOD = "good"
FAULTS = {  # of a record: how the line looks in .jsonl
    "no object": '"x"',
    "no JSON": '{"text": ',
    "no text": '{"body": "x"}',
    "null": '{"text": null}',
    "a number": '{"text": 5}',
    "empty": '{"text": " "}',
    "a lone surrogate": '{"text": "\\ud800"}',
}
IN_CELLS = {"null": None, "empty": " "}  # those that a cell of .parquet can have
CHAT_FAULTS = {
    "no messages": '{"text": "x"}',
    "no list": '{"messages": "x"}',
    "two questions": '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
    "a role": '{"messages": [{"role": "judge", "content": "a"}]}',
    "nothing said": '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}',
    "a tool call": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [1]}]}',
}
TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "%d"}]}'


def records(faults):
    return st.lists(st.sampled_from([GOOD, GOOD, *faults]), min_size=1, max_size=40)


def check(kinds, read):
    """Kept are the good records, in order; named are all others, each once, with its line."""
    bad = []
    kept = list(read(bad.append))
    assert kept == [number for number, kind in enumerate(kinds, start=1) if kind == GOOD]
    assert [record.line for record in bad] == [number for number, kind in enumerate(kinds, start=1) if kind != GOOD]
    assert all(record.reason for record in bad)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
@given(kinds=records(FAULTS))
@settings(max_examples=40, deadline=None)
def test_lines_and_elements(tmp_path_factory, suffix, kinds):
    if suffix == ".json":  # what is no JSON ends the list
        kinds = [kind for kind in kinds if kind != "no JSON"] or [GOOD]
    lines = [FAULTS.get(kind, json.dumps({"text": str(number)})) for number, kind in enumerate(kinds, start=1)]
    path = tmp_path_factory.mktemp("door") / f"in{suffix}"
    text = "[" + ",\n".join(lines) + "]" if suffix == ".json" else "\n".join(lines)
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    check(kinds, lambda on_bad: map(int, read_texts([path], "text", on_bad)))


@given(kinds=records(["empty", "too many", "too few"]))
@settings(max_examples=40, deadline=None)
def test_rows_of_csv(tmp_path_factory, kinds):
    cells = {"empty": '1," "', "too many": "1,2,3", "too few": "1"}
    rows = [cells.get(kind, f"0,{number}") for number, kind in enumerate(kinds, start=1)]
    path = tmp_path_factory.mktemp("door") / "in.csv"
    path.write_text("\n".join(["id,text", *rows]))
    check(kinds, lambda on_bad: map(int, read_texts([path], "text", on_bad)))


@given(kinds=records(IN_CELLS))
@settings(max_examples=40, deadline=None)
def test_rows_of_parquet(tmp_path_factory, kinds):
    cells = [IN_CELLS.get(kind, str(number)) for number, kind in enumerate(kinds, start=1)]
    path = tmp_path_factory.mktemp("door") / "in.parquet"
    pq.write_table(pa.table({"text": pa.array(cells, pa.string())}), path, row_group_size=7)
    check(kinds, lambda on_bad: map(int, read_texts([path], "text", on_bad)))


@given(kinds=records(CHAT_FAULTS))
@settings(max_examples=40, deadline=None)
def test_conversations(tmp_path_factory, kinds):
    lines = [CHAT_FAULTS.get(kind, TALK % number) for number, kind in enumerate(kinds, start=1)]
    path = tmp_path_factory.mktemp("door") / "in.jsonl"
    path.write_text("\n".join(lines))
    check(kinds, lambda on_bad: (int(talk.messages[-1].content) for talk in chats([path], on_bad)))
