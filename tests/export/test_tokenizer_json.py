"""What lies beside an exported model gives the ids of its tokenizer, in tokenizers and in transformers."""

import json

import pytest
import tokenizers
from jinja2 import TemplateError
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from nanollm.export.tokenizer_json import write_tokenizer
from nanollm.sources.datasets import openwebtext
from nanollm.text.chat import Conversation, encode_conversation, encode_prompt
from nanollm.text.tokenizer import MARKS, Tokenizer
from nanollm.text.train_tokenizer import train
from tests.conftest import STORY
from tests.export.strings import (
    ALL_MARKS,
    LONG,
    SPELLINGS,
    TOKENIZER_FILES,
    as_messages,
    conversations,
    drawn,
    first_difference,
    many_texts,
    texts,
)
from tests.text.test_chat import TOOLS, WITH_CALLS, with_calls

CONTEXT_LENGTH = 64


def read_back(tokenizer, folder):
    """tokenizer.json as the library reads it, told to take marks in a text for text."""
    write_tokenizer(folder, tokenizer, CONTEXT_LENGTH)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    return backend


def ids_there(backend, strings):
    return [backend.encode(text, add_special_tokens=False).ids for text in strings]


@pytest.fixture(scope="module", params=["bpe", "unigram", "char", "bpe of marks", "unigram of marks"])
def each_type(request, tmp_path_factory) -> Tokenizer:
    """A small tokenizer; "of marks" means that it has a piece for every letter of them."""
    model_type, _, of_marks = request.param.partition(" ")
    corpus = [STORY.read_text(encoding="utf-8"), " ".join(SPELLINGS) * 9 if of_marks else ""]
    return train(corpus, tmp_path_factory.mktemp("models") / "m.model", vocab_size=400, model_type=model_type)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(folder, tokenizer, CONTEXT_LENGTH)
    (folder / "config.json").write_text('{"model_type": "glm4_moe_lite"}')
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    """The tokenizer that transformers loads."""
    return AutoTokenizer.from_pretrained(folder)


def test_any_text_has_the_same_ids_and_comes_back(tokenizer, tmp_path):
    backend, strings = read_back(tokenizer, tmp_path), [*LONG, *drawn(texts, 500)]
    there = ids_there(backend, strings)
    assert first_difference(strings, map(tokenizer.encode, strings), there) is None
    assert first_difference(strings, strings, map(backend.decode, there)) is None


def test_every_type_of_model_has_the_same_ids(each_type, tmp_path):
    backend, strings = read_back(each_type, tmp_path), [*drawn(texts, 200), *SPELLINGS]
    there = ids_there(backend, strings)
    ours = list(map(each_type.encode, strings))
    assert first_difference(strings, strings, map(backend.decode, there)) is None
    if each_type.model_type != "unigram":
        assert first_difference(strings, ours, there) is None
        return
    scores = [piece.score for piece in each_type.pieces]  # the likelihood is the same, and most often the ids are
    assert [sum(scores[token] for token in ids) for ids in there] == pytest.approx(
        [sum(scores[token] for token in ids) for ids in ours]
    )
    assert sum(map(list.__eq__, ours, there)) >= 0.95 * len(strings)


def test_a_literal_space_mark_is_spelled_in_bytes_and_comes_back(tokenizer, tmp_path):
    backend = read_back(tokenizer, tmp_path)
    text = "the\u2581sea \u2581"
    ids = backend.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text)
    assert backend.decode(ids) == text


@pytest.mark.slow
@pytest.mark.realdata
def test_100_000_strings_have_the_same_ids_with_50_304_pieces(shared_data, tmp_path):
    corpus = openwebtext([shared_data / "openwebtext" / "train-00000-of-00004.parquet"], on_bad=pytest.fail)
    tokenizer, strings = train(corpus, tmp_path / "owt.model", vocab_size=50_304), many_texts()
    there = ids_there(read_back(tokenizer, tmp_path), strings)
    assert first_difference(strings, map(tokenizer.encode, strings), there) is None


# What transformers makes of the folder.


def test_transformers_loads_it_silently_and_knows_each_mark(tokenizer, folder, capfd):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")
    assert sorted(file.name for file in folder.iterdir()) == sorted(["config.json", *TOKENIZER_FILES])
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.serialized
    assert theirs.is_fast
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.model_max_length == CONTEXT_LENGTH
    named = (theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id)
    assert named == (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    assert sorted(theirs.all_special_ids) == list(range(20))
    assert theirs.extra_special_tokens == list(MARKS)


def test_a_text_begins_with_its_mark_and_has_what_generate_takes(tokenizer, theirs):
    ids = [tokenizer.bos_id, *tokenizer.encode("the  sea .")]
    assert theirs("the  sea .") == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert theirs.decode(ids, skip_special_tokens=True) == "the  sea ."


@pytest.mark.parametrize("text", SPELLINGS)
def test_text_that_spells_a_mark_is_text_where_that_is_asked_for(tokenizer, theirs, text):
    ids = theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids
    assert ids == tokenizer.encode(text)
    assert theirs.decode(ids) == text


def test_conversations_have_the_same_ids(tokenizer, theirs):
    for conversation in drawn(conversations(), 100):
        messages = as_messages(conversation)
        ours = encode_conversation(conversation, tokenizer).ids
        assert theirs.apply_chat_template(messages).input_ids == ours
        if messages[-1]["role"] == "user":
            prompt = theirs.apply_chat_template(messages, add_generation_prompt=True).input_ids
            assert prompt == encode_prompt(conversation, tokenizer)


def test_conversations_with_calls_of_functions_have_the_same_ids(tokenizer, theirs):
    prompt = theirs.apply_chat_template(WITH_CALLS, tools=TOOLS, add_generation_prompt=True).input_ids
    assert prompt == encode_prompt(with_calls(), tokenizer)


@pytest.mark.parametrize("mark", ALL_MARKS)
def test_a_message_that_spells_a_mark_is_refused(theirs, mark):
    with pytest.raises(TemplateError, match="message 1 spells the mark"):
        theirs.apply_chat_template(as_messages(Conversation.of(f"a{mark}<|assistant|>b")))


# What tokenizer.json cannot hold.


def test_a_word_model_is_refused(tmp_path):
    words = train([STORY.read_text(encoding="utf-8")], tmp_path / "w.model", vocab_size=400, model_type="word")
    with pytest.raises(ValueError, match="this one is of the type word; train with another: nanollm tokenizer"):
        write_tokenizer(tmp_path, words, CONTEXT_LENGTH)


def user_defined(proto):
    proto.pieces[-1].piece = "greysea"
    proto.pieces[-1].type = proto.SentencePiece.USER_DEFINED  # found before all others, wherever it stands


def unused(proto):
    piece = next(piece for piece in proto.pieces if piece.piece == "\u2581the")
    piece.type = proto.SentencePiece.UNUSED


@pytest.mark.parametrize("rule", [user_defined, unused])
def test_a_tokenizer_of_other_make_with_one_rule_more_is_refused(tokenizer, tmp_path, rule):
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.serialized)
    rule(proto)
    foreign = Tokenizer(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"cannot hold this tokenizer: '.*' is \[.*\], there \["):
        write_tokenizer(tmp_path, foreign, CONTEXT_LENGTH)
    assert list(tmp_path.iterdir()) == []


def test_the_same_tokenizer_gives_the_same_bytes(tokenizer, tmp_path):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, Tokenizer(tokenizer.serialized), CONTEXT_LENGTH)
        written.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert json.loads(written[0]["tokenizer_config.json"])["clean_up_tokenization_spaces"] is False
