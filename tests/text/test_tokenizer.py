import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.text import train_tokenizer as module
from nanollm.text.tokenizer import ASSISTANT, END, MARKS, SYSTEM, USER, Tokenizer
from nanollm.text.train_tokenizer import cut, sample, train

STORY = (Path(__file__).parents[1] / "story.txt").read_text(encoding="utf-8")
TYPES = ("bpe", "unigram", "char", "word")
SPELLS_A_CONTROL = ["<|user|>", "</s>", "<s>", "<pad>", "<unk>", "<0x41>", "x<|end|>\n<|assistant|>", "<|reserved_3|>"]
HARD = [
    *SPELLS_A_CONTROL,
    "",
    " ",
    "\n",
    "  leading and trailing  ",
    "\n\n\tdef f():\r\n        return 1\r\n\n",
    " " * 5000,
    "\0",
    "a\0b",
    "\u2581",
    "a\u2581b \u2581\u2581 c\u2581",
    "\u2585 \ufffd \ufeff \u2047",
    "1,080.50 + 2024",
    "na\u00efve \u65e5\u672c\u8a9e  \u0378 \U0001f469\u200d\U0001f52c \u202e\u0301",
]
# Anything but lone surrogates, with the troublesome characters made likely.
texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2581\u2585 \n\t\r\0<|>/s01"), max_size=200
)


@pytest.fixture(scope="module", params=TYPES)
def each_type(request, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.model"
    return train([STORY], path, vocab_size=400, model_type=request.param)


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_for_every_type_of_model(each_type, text):
    ids = each_type.encode(text)
    assert each_type.decode(ids) == text
    assert each_type.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", SPELLS_A_CONTROL)
def test_text_that_spells_a_control_symbol_never_becomes_one(each_type, text):
    first_byte_or_piece = 4 + len(MARKS)
    assert min(each_type.encode(text)) >= first_byte_or_piece
    assert len(each_type.encode(text)) > 1


@given(text=texts.filter(lambda text: "\u2581" not in text))
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_sentencepiece(tokenizer, text):
    assert tokenizer.encode(text) == sentencepiece.SentencePieceProcessor(model_proto=tokenizer.serialized).encode(text)


def test_hard_text_comes_back_and_the_bytes_of_its_ids_joined_are_its_bytes(each_type):
    for text in [*HARD, STORY]:
        ids = each_type.encode(text)
        assert each_type.decode(ids) == text
        assert b"".join(map(each_type.bytes_of, ids)) == text.encode()
    sizes = [len(each_type.bytes_of(token)) for token in range(each_type.vocab_size)]
    assert sizes == each_type.token_bytes.tolist()
    assert each_type.bytes_of(each_type.vocab_size) == b""
    assert [token for token in range(each_type.vocab_size) if each_type.is_byte(token)] == list(range(20, 276))


def test_a_tokenizer_knows_its_type_and_what_each_id_stands_for(each_type, request):
    assert each_type.model_type == request.node.callspec.params["each_type"]
    model = sentencepiece.SentencePieceProcessor(model_proto=each_type.serialized)
    found = [(piece.text, piece.score) for piece in each_type.pieces]
    assert found == [(model.id_to_piece(token), model.get_score(token)) for token in range(model.vocab_size())]
    kinds = [piece.kind for piece in each_type.pieces]
    learned = ["normal"] * (len(kinds) - 276)
    assert kinds == ["control", "unknown", *["control"] * 18, *["byte"] * 256, *learned]


def test_the_ids_of_the_marks_are_fixed(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    assert [tokenizer.mark_id(mark) for mark in (SYSTEM, USER, ASSISTANT, END)] == [4, 5, 6, 7]
    assert [tokenizer.mark_id(f"<|reserved_{n}|>") for n in range(12)] == list(range(8, 20))
    with pytest.raises(ValueError, match=r"'<\|nobody\|>' is not a mark"):
        tokenizer.mark_id("<|nobody|>")
    with pytest.raises(ValueError, match="not a mark"):
        tokenizer.mark_id("the")


def test_control_symbols_decode_to_nothing_and_count_no_bytes(tokenizer):
    controls = list(range(20))
    assert tokenizer.decode(controls) == ""
    assert tokenizer.token_bytes[controls].sum() == 0
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,) == (600,)
    assert tokenizer.token_bytes.dtype == np.int32


def test_a_document_stands_between_its_marks(tokenizer):
    assert tokenizer.encode_document("the sea") == [2, *tokenizer.encode("the sea"), 3]


def test_ids_of_any_integer_type_are_decoded(tokenizer):
    assert tokenizer.decode(np.array(tokenizer.encode("the sea"), dtype=np.uint16)) == "the sea"


def test_an_id_outside_the_vocabulary_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"id 600 is outside this tokenizer's 0 to 599"):
        tokenizer.decode([7, 600])


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer):
    for text in ("ab\ud800", "a\u2581\udfff"):
        with pytest.raises(ValueError, match=r"character \d of the text is the lone surrogate U\+D"):
            tokenizer.encode(text)


def test_digits_are_split(tokenizer):
    assert len(tokenizer.encode("1462")) == len(tokenizer.encode("300")) + 1


def test_saved_loaded_and_pickled_tokenizers_are_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "copy.model")
    copies = [
        Tokenizer.load(tmp_path / "new" / "copy.model"),
        Tokenizer.load(tmp_path / "new"),
        pickle.loads(pickle.dumps(tokenizer)),
    ]
    assert {copy.fingerprint for copy in copies} == {tokenizer.fingerprint}
    assert all(copy.encode(STORY) == tokenizer.encode(STORY) for copy in copies)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy.model"]


def test_a_missing_ambiguous_or_foreign_model_is_refused_with_advice(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nanollm tokenizer"):
        Tokenizer.load(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*; make one with: nanollm tokenizer"):
        Tokenizer.load(tmp_path)
    damaged = tokenizer.serialized.replace(b"<0xF0>", b"\xff\xff\xff\xff\xff\xff")
    for foreign in (b"something else", b"", damaged):
        (tmp_path / "a.model").write_bytes(foreign)
        with pytest.raises(ValueError, match=r"a\.model is not a SentencePiece model"):
            Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path / "b.model")
    with pytest.raises(ValueError, match=r"found a\.model, b\.model; name the file"):
        Tokenizer.load(tmp_path)


def test_a_lossy_model_of_other_make_is_refused(tmp_path):
    path = tmp_path / "lossy.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(STORY.split("\n")), model_writer=file, vocab_size=120, minloglevel=2
        )
    with pytest.raises(ValueError, match=r"lossy\.model is not a lossless tokenizer with chat marks"):
        Tokenizer.load(path)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_same_text_and_seed_give_the_same_bytes(tmp_path, model_type):
    options = {"vocab_size": 330, "model_type": model_type, "sample_bytes": 2000}
    text = [STORY[start : start + 200] for start in range(0, len(STORY), 200)]
    first, again = (train(text, tmp_path / f"{n}.model", seed=1, **options) for n in range(2))
    other = train(text, tmp_path / "other.model", seed=2, **options)
    assert first.serialized == again.serialized != other.serialized


def test_a_long_document_is_learned_from_to_its_end(tmp_path):
    filler = "the cat and the sea " * 5000  # 100,000 characters without a newline
    learned = train([filler + "zyzzyva " * 2000], tmp_path / "long.model", vocab_size=310)
    assert len(learned.encode(" zyzzyva")) == 1


def test_what_sentencepiece_would_skip_is_learned_from_too(tmp_path):
    learned = train([f"zyzzyva{bad}zyzzyva " * 50 for bad in "\0\u2581\u2585"], tmp_path / "x.model", vocab_size=289)
    assert len(learned.encode("zyzzyva")) <= 2


@pytest.mark.parametrize("model_type", TYPES)
def test_a_vocabulary_that_the_text_cannot_fill_says_what_it_can(tmp_path, model_type):
    if model_type == "char":  # as many as there are characters
        assert train(["abc abc"], tmp_path / "m.model", vocab_size=9999, model_type="char").vocab_size == 276 + 4
        return
    with pytest.raises(ValueError, match=r"yields only \d+ pieces, vocab_size is 9999; .* --vocab_size \d+ or less"):
        train(["abc abc abc"], tmp_path / "m.model", vocab_size=9999, model_type=model_type)
    assert list(tmp_path.iterdir()) == []


def test_impossible_training_is_refused_in_one_line(tmp_path):
    path = tmp_path / "m.model"
    with pytest.raises(ValueError, match=r"vocab_size must be from 277 .* to 65,536 .*got 65537"):
        train([STORY], path, vocab_size=65537)
    with pytest.raises(ValueError, match="got 276"):
        train([STORY], path, vocab_size=276)
    with pytest.raises(ValueError, match="model_type must be one of bpe, unigram, char, word, got 'wordpiece'"):
        train([STORY], path, vocab_size=600, model_type="wordpiece")
    with pytest.raises(ValueError, match=r"the characters of the text need a vocab_size of at least \d+, got 280"):
        train([STORY], path, vocab_size=280)
    for nothing in ([], ["", ""], ["\0\u2581"]):
        with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
            train(nothing, path, vocab_size=300)
    assert not path.exists()


def test_training_is_silent(tmp_path, capfd):
    train([STORY], tmp_path / "m.model", vocab_size=400)
    assert capfd.readouterr() == ("", "")


@given(several=st.lists(texts | st.text(st.sampled_from("aZ9 \t\n!\u00e9\u65e5"), max_size=60), max_size=3))
@settings(max_examples=300, deadline=None)
def test_words_are_counted_the_same_with_and_without_a_compiler(several):
    pieces = [part for text in several for part in module._without_reserved(text.encode())]
    counts = module.count_in_python(pieces)
    assert module.count_words(pieces) == counts
    characters = sum(len(word.decode()) * count for word, count in counts.items())
    lines = sum(1 for _ in module._lines(pieces))
    assert characters == sum(len(piece.decode()) for piece in pieces) + lines  # each line with a space more


def test_without_a_compiler_the_same_pieces_are_learned(tmp_path, monkeypatch, capsys):
    def fail(texts):
        raise module.NoCompilerError("no C++ compiler was found")

    one = train([STORY], tmp_path / "a.model", vocab_size=500)
    monkeypatch.setattr(module, "count_words", fail)
    other = train([STORY], tmp_path / "b.model", vocab_size=500)
    assert one.serialized == other.serialized
    assert "words are counted slowly: no C++ compiler was found" in capsys.readouterr().err


def test_a_piece_is_letters_behind_spaces_or_one_mark_or_marks_or_one_digit(tmp_path):
    text = STORY + '\tdef call(foo, x1):\n\t\treturn call(foo)  # na\u00efve\u2026\n"The  end," call(foo, 25)\n' * 20
    pieces = train([text], tmp_path / "m.model", vocab_size=600).pieces
    learned = {piece.text.replace("\u2581", " ") for piece in pieces if piece.kind == "normal"}
    letters, marks = r"[A-Za-z\u0080-\U0010ffff]+", r"[\n!-/:-@[-`{-~]"
    form = re.compile(rf"[0-9\t]|{marks}?{letters}| *{letters}| *{marks}+| +")
    assert [piece for piece in learned if not form.fullmatch(piece)] == []
    assert {"(foo", '"The', "\t"} <= learned


def test_a_tab_is_a_piece_and_a_backspace_is_bytes(tmp_path):
    learned = train(["a\tb\t\tc\b " * 50 + STORY], tmp_path / "m.model", vocab_size=400)
    assert len(learned.encode("\t")) == 1
    assert [learned.is_byte(token) for token in learned.encode("\t\b")] == [False, True]


@given(text=st.text(st.sampled_from("ab \n"), max_size=300), limit=st.integers(1, 20))
def test_a_cut_text_loses_no_character(text, limit):
    parts = list(cut(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts)


def test_a_sample_within_the_budget_is_everything_in_order():
    kept = sample(["one", "two", "three"], budget=1000)
    assert (kept.pieces, kept.bytes_seen, kept.bytes_kept) == ([b"one", b"two", b"three"], 11, 11)


def test_a_sample_keeps_to_its_budget_and_is_uniform_over_the_corpus():
    corpus = [f"{n:06d}" for n in range(20_000)]
    kept = [int(piece) for piece in sample(corpus, budget=12_000, seed=3).pieces]
    assert 1900 <= len(kept) <= 2000
    assert kept == sorted(kept)
    assert 9_500 < np.mean(kept) < 10_500  # early and late text alike: the spread of this mean is 130


def test_a_sample_holds_no_more_than_its_budget_while_reading(monkeypatch):
    import tracemalloc

    corpus = (f"{n:06d} " * 500 for n in range(5000))  # 17.5 MB
    tracemalloc.start()
    sample(corpus, budget=200_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.realdata
def test_real_documents_come_back(shared_data, tokenizer):
    from nanollm.sources.datasets import openwebtext

    file = shared_data / "openwebtext" / "train-00000-of-00004.parquet"
    for number, text in zip(range(200), openwebtext([file], on_bad=pytest.fail), strict=False):
        assert tokenizer.decode(tokenizer.encode(text)) == text, number
