"""The tokens of a reply become its text, and what is said of each token is true."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.generate.request import TokenLogprobs
from nanollm.text.train_tokenizer import EOS_ID, FIRST_LEARNED_ID

pytest.importorskip("fastapi", reason='fastapi is not installed: pip install -e ".[serve]"')
from nanollm.serve.engine_thread import TokenEvent
from nanollm.serve.streaming import MIN_LOGPROB, Choice, Detokenizer, TextFormatter

BYTES = FIRST_LEARNED_ID - 256  # the id of the byte 0x00
SCORED = TokenLogprobs(-1.0, [(9, -1.0)], [[0]])


def events(ids, finish):
    """The tokens as the engine would hand them over."""
    return [
        TokenEvent(0, token, SCORED, finish if place == len(ids) - 1 else None, 0.0) for place, token in enumerate(ids)
    ]


def told(tokenizer, ids, finish="length", stops=(), cuts=()):
    """All parts of a reply that comes in pieces, joined: its text, its entries, why it ended."""
    choice, text, entries, reason = Choice(0, Detokenizer(tokenizer), stops), "", [], None
    arrived = events(ids, finish)
    borders = [0, *sorted(cuts), len(arrived)]
    for start, end in itertools.pairwise(borders):
        for delta in choice.take(arrived[start:end]):
            text += delta.text
            entries += delta.entries
            reason = delta.finish
    return text, entries, reason


any_byte = st.sampled_from(b"\xe2\x82\xac\xf0\x9f\x98\x80\xc3ab") | st.integers(0, 255)
any_id = any_byte.map(lambda byte: BYTES + byte) | st.integers(0, 640)


def spell(spelled):
    """Ids of byte pieces only."""
    return [BYTES + byte for byte in spelled]


@given(ids=st.lists(any_id, min_size=1, max_size=30), stop=st.text("ab\ufffd€ ", max_size=3), drawn=st.data())
@settings(max_examples=60, deadline=None)
def test_an_entry_stands_where_the_text_of_its_token_begins_and_never_behind_the_cut(tokenizer, ids, stop, drawn):
    whole = tokenizer.decode_drawn(ids)
    if whole and drawn.draw(st.booleans()):
        start = drawn.draw(st.integers(0, len(whole) - 1))
        stop = whole[start : start + 2]
    cuts = drawn.draw(st.lists(st.integers(0, len(ids)), max_size=4))
    text, entries, _ = told(tokenizer, ids, stops=[stop] if stop else [], cuts=cuts)
    assert text == (whole.partition(stop)[0] if stop else whole)
    assert [entry.token for entry in entries] == ids[: len(entries)]
    offsets = [entry.offset for entry in entries]
    assert offsets == sorted(offsets)
    if len(text) < len(whole):
        assert all(offset < len(text) for offset in offsets)
    else:
        assert len(entries) == len(ids)
    for entry in entries:
        spelled, rest = tokenizer.bytes_of(entry.token), whole[entry.offset :]
        if tokenizer.is_byte(entry.token):
            assert rest[0] == "\ufffd" or spelled in rest[0].encode()
        else:
            assert rest.startswith(spelled.decode())


@given(cuts=st.lists(st.integers(0, 6), max_size=4))
@settings(max_examples=20, deadline=None)
def test_what_a_tool_gave_comes_in_parts_of_its_own_wherever_the_reply_is_cut(tokenizer, cuts):
    """Its tokens have no log-probability; a character that is begun by a tool is the tool's."""
    arrived = [
        TokenEvent(0, token, None if given else SCORED, None, 0.0, is_given=given)
        for spelled, given in ((b"1+", False), ("2€".encode(), True), (b"3", False))
        for token in spell(spelled)
    ]
    arrived[-1] = replace(arrived[-1], finish="length")
    choice = Choice(0, Detokenizer(tokenizer), ())
    borders = [0, *sorted(cuts), len(arrived)]
    deltas = [delta for start, end in itertools.pairwise(borders) for delta in choice.take(arrived[start:end])]
    parts = {given: "".join(d.text for d in deltas if d.is_given is given) for given in (False, True)}
    assert parts == {False: "1+3", True: "2€"}
    assert "".join(delta.text for delta in deltas) == "1+2€3"
    assert [e.offset for d in deltas for e in d.entries] == [0, 1, 4]
    assert all(not delta.is_given for delta in deltas if delta.entries)
    assert [delta.finish for delta in deltas if delta.finish] == ["length"] and deltas[-1].finish == "length"


@pytest.mark.parametrize(
    ("spelled", "stops", "text", "offsets"),
    [
        (b"\xe2\x82ab", [], "\ufffd\ufffdab", [0, 1, 2, 3]),
        (b"\xe2\x82\xe2\x82abcd", ["cd"], "\ufffd\ufffd\ufffd\ufffdab", [0, 1, 2, 3, 4, 5]),
        (b"\xe2\x82\xace\xc3", [], "€e\ufffd", [0, 0, 0, 1, 2]),
    ],
)
def test_bytes_that_are_no_character_count_as_the_characters_they_become(tokenizer, spelled, stops, text, offsets):
    for cuts in ([], range(len(spelled))):
        told_text, entries, _ = told(tokenizer, spell(spelled), stops=stops, cuts=cuts)
        assert (told_text, [entry.offset for entry in entries]) == (text, offsets)


def test_an_end_token_is_neither_text_nor_told(tokenizer):
    ids = tokenizer.encode("The end")
    text, entries, reason = told(tokenizer, [*ids, EOS_ID], finish="end")
    assert (text, [entry.token for entry in entries], reason) == ("The end", ids, "stop")


def test_tokens_that_a_stop_text_cuts_off_are_not_told(tokenizer):
    ids = [token for char in "abcdef" for token in tokenizer.encode(char)]
    text, entries, reason = told(tokenizer, ids[:4], finish="stop", stops=["cd"], cuts=[1, 2, 3])
    assert (text, [entry.token for entry in entries], reason) == ("ab", ids[:2], "stop")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (EOS_ID, ("</s>", b"")),
        (20 + 0x41, ("A", b"A")),
        (20 + 0xE2, ("bytes:\\xe2", b"\xe2")),
        (70_000, ("<70000>", b"")),
    ],
)
def test_every_id_has_a_name(tokenizer, token, expected):
    assert Detokenizer(tokenizer).spell(token) == expected


def test_no_two_ids_share_a_name(tokenizer):
    names = [Detokenizer(tokenizer).spell(token)[0] for token in range(tokenizer.vocab_size + 2)]
    assert len(set(names)) == len(names)


def test_the_most_likely_tokens_are_all_there_though_two_spell_the_same_character(tokenizer):
    (learned,) = tokenizer.encode("a")
    scored = TokenLogprobs(-1.0, [(learned, -1.0), (BYTES + ord("a"), -2.0)], [])
    choice = Choice(0, Detokenizer(tokenizer), ())
    (delta,) = choice.take([TokenEvent(0, learned, scored, "length", 0.0)])
    told = TextFormatter("tiny", Detokenizer(tokenizer), has_logprobs=True).choice(delta)["logprobs"]
    assert told["top_logprobs"] == [{"a": -1.0, "bytes:\\x61": -2.0}]


def test_minus_infinity_becomes_a_number_that_json_has(tokenizer):
    choice = Choice(0, Detokenizer(tokenizer), ())
    scored = TokenLogprobs(float("-inf"), [(9, float("-inf"))], [])
    (delta,) = choice.take([TokenEvent(0, 300, scored, "length", 0.0)])
    told = TextFormatter("tiny", Detokenizer(tokenizer), has_logprobs=True).choice(delta)["logprobs"]
    assert told["token_logprobs"] == [MIN_LOGPROB] and list(told["top_logprobs"][0].values()) == [MIN_LOGPROB]
