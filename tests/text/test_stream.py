"""Text appears token by token, and is what decoding all ids at once gives, up to the first stop text."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanollm.text.stream import TextStream
from nanollm.text.tokenizer import Tokenizer
from nanollm.text.train_tokenizer import FIRST_LEARNED_ID, train
from tests.conftest import STORY

BYTES = FIRST_LEARNED_ID - 256  # the id of the byte 0x00
VOCAB = 400

any_byte = st.integers(0, 255) | st.sampled_from(b"\xe2\x96\x81\xf0\x9f\x98\x80\xc3\xa9\xed\xa0\xe0\xf4\x90\xc0\xff")
any_id = st.integers(0, VOCAB + 40) | any_byte.map(lambda byte: BYTES + byte) | st.just(BYTES + ord("a"))
ids_drawn = st.lists(any_id, max_size=40)
few_letters = st.text("ab\u2581\ufffd ", min_size=1, max_size=5)


@pytest.fixture(scope="module", params=["bpe", "unigram", "char", "word"])
def each_type(request, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.model"
    return train([STORY.read_text("utf-8")], path, vocab_size=VOCAB, model_type=request.param)


def pushed(stream, ids):
    """What comes out for each id, and last what is left."""
    return [*(stream.push(token) for token in ids), stream.close()]


def cut(text, stops):
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def spell(text):
    """Ids of byte pieces only: every character of several bytes has token borders inside."""
    return [BYTES + byte for byte in text.encode()]


@given(ids=ids_drawn)
@example(ids=[BYTES + 0xE2, VOCAB + 1, BYTES + 0x96, BYTES + 0x81])  # an id beyond the tokenizer ends no character
@example(ids=[BYTES + 0xC3, 5, BYTES + 0xA9])  # a mark does
@settings(max_examples=100, deadline=None)
def test_any_ids_pushed_one_by_one_give_what_decoding_them_gives(each_type, ids):
    stream = TextStream(each_type)
    assert "".join(pushed(stream, ids)) == stream.text == each_type.decode_drawn(ids)
    assert not stream.is_stopped


@given(ids=ids_drawn, stops=st.lists(few_letters, max_size=3), drawn=st.data())
@settings(max_examples=100, deadline=None)
def test_any_ids_are_cut_at_the_first_of_any_stop_texts(each_type, ids, stops, drawn):
    text = each_type.decode_drawn(ids)
    if text:  # stop texts that are in the text, too
        start = drawn.draw(st.integers(0, len(text) - 1))
        stops = [*stops, text[start : drawn.draw(st.integers(start + 1, len(text)))]]
    stream = TextStream(each_type, stops)
    assert "".join(pushed(stream, ids)) == stream.text == cut(text, stops)
    assert stream.is_stopped == any(stop in text for stop in stops)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
@settings(max_examples=500, deadline=None)
def test_stop_texts_that_overlap_or_begin_alike_are_told_apart(tokenizer, text, stops):
    for ids in (tokenizer.encode(text), spell(text)):
        stream = TextStream(tokenizer, stops)
        assert "".join(pushed(stream, ids)) == cut(text, stops)


@given(text=st.text(max_size=20), stops=st.lists(few_letters, max_size=3))
@settings(max_examples=300, deadline=None)
def test_nothing_handed_out_is_half_a_character_or_is_taken_back(tokenizer, text, stops):
    stream, whole = TextStream(tokenizer, stops), cut(text, stops)
    for token in spell(text):
        stream.push(token)
        assert whole.startswith(stream.text)


@given(ids=ids_drawn)
@example(ids=[BYTES + 0xE2, VOCAB + 1, BYTES + 0x96, BYTES + 0x81])
@example(ids=[BYTES + 0xE2, BYTES + 0x82, BYTES + ord("a"), 5])
@settings(max_examples=100, deadline=None)
def test_each_id_begins_at_the_character_of_its_first_byte(each_type, ids):
    stream = TextStream(each_type)
    pushed(stream, ids)
    assert len(stream.begins) == len(ids) and stream.begins == sorted(stream.begins)
    for token, begin in zip(ids, stream.begins, strict=True):
        spelled = each_type.bytes_of(token)
        if each_type.is_byte(token):
            assert stream.text[begin] == "\ufffd" or spelled in stream.text[begin].encode()
        else:
            assert stream.text[begin:].startswith(spelled.decode())


def test_where_an_id_begins_is_told_when_its_character_is_certain(tokenizer):
    stream, told = TextStream(tokenizer), []
    for byte in b"\xe2\x82\xac\xe2\x82a\xc3":
        stream.push(BYTES + byte)
        told.append(list(stream.begins))
    assert told == [[], [], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3]]
    stream.close()
    assert stream.begins == [0, 0, 0, 1, 2, 3, 4]


def test_a_character_appears_with_its_last_byte(tokenizer):
    assert pushed(TextStream(tokenizer), spell("é😀")) == ["", "é", "", "", "", "😀", ""]


def test_a_space_mark_that_was_spelled_stays_one_and_a_learned_one_is_a_space(tokenizer):
    ids = tokenizer.encode("the \u2581 sea")
    assert "".join(pushed(TextStream(tokenizer), ids)) == "the \u2581 sea"
    assert "".join(pushed(TextStream(tokenizer, ["\u2581"]), ids)) == "the "


def test_text_that_may_become_a_stop_text_waits_and_nothing_else_does(tokenizer):
    stream = TextStream(tokenizer, ["END"])
    assert [stream.push(token) for token in spell("aEENx")] == ["a", "", "E", "", "ENx"]
    assert stream.push(spell("E")[0]) == "" and stream.close() == "E"
    assert not stream.is_stopped


def test_a_stop_text_that_begins_another_ends_the_text_at_once(tokenizer):
    stream = TextStream(tokenizer, ["abc", "ab"])
    assert [stream.stops_at(token) for token in spell("xab")] == [False, False, True]
    assert stream.text == "x"


def test_an_empty_stop_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a stop text needs at least one character"):
        TextStream(tokenizer, ["x", ""])
