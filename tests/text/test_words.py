import io
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.kernels import build
from nanollm.text import words as module
from nanollm.text.tokenizer import Tokenizer
from nanollm.text.train_tokenizer import train
from nanollm.text.words import Recipe, WordSpeller, kinds_of
from tests.text.test_tokenizer import HARD, STORY, texts

PROGRAM = Path(module.__file__).read_text(encoding="utf-8")
OTHER_SCRIPTS = (
    "Ὁ γέρων ἔφη· «naïve» 日本語、 日本、 日本語の本。 Ёлка — ёлки, ёж… "
    "שלום 한국어 👩‍🔬👩‍🔬 é e\u0301 №5½ \u2028\u00a0 "
)

CORPORA = {"story": STORY, "program": PROGRAM * 3, "scripts": (OTHER_SCRIPTS + "\n") * 30 + STORY[:4000]}


def speller(tokenizer: Tokenizer) -> WordSpeller:
    recipe = Recipe.of(tokenizer.serialized)
    assert recipe.is_cuttable
    try:
        return WordSpeller(recipe)
    except build.NoCompilerError as error:
        pytest.skip(str(error))


def spelled(way: WordSpeller, several: list[str]) -> list[list[int]]:
    ids, lengths = way.spell([text.encode() for text in several])
    assert len(lengths) == len(several) and lengths.sum() == len(ids)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths))[:-1]]


@pytest.fixture(scope="module", params=CORPORA)
def plain(request, tmp_path_factory) -> Tokenizer:
    """A tokenizer that asks SentencePiece about every text."""
    path = tmp_path_factory.mktemp("models") / "m.model"
    return train([CORPORA[request.param]], path, vocab_size=480)


@pytest.fixture(scope="module")
def way(plain) -> WordSpeller:
    return speller(plain)


@given(several=st.lists(texts, max_size=4))
@settings(max_examples=100, deadline=None)
def test_word_by_word_any_text_has_the_ids_of_sentencepiece(plain, way, several):
    assert spelled(way, several) == [plain.encode(text) for text in several]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_texts_of_what_the_model_knows_have_the_ids_of_sentencepiece(plain, way, data):
    pieces = [*Recipe.of(plain.serialized).learned.values()]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=60))).replace("\u2581", " ")
    assert spelled(way, [text, text]) == 2 * [plain.encode(text)]


def test_hard_texts_and_long_ones_have_the_ids_of_sentencepiece(plain, way):
    several = [*HARD, *CORPORA.values(), "=" * 3000, "ab" * 9000, "é日" * 500, " " * 70 + "end", "  \u2581  \u2581"]
    assert spelled(way, several) == [plain.encode(text) for text in several]


def test_words_that_were_forgotten_are_spelled_again(plain, monkeypatch):
    monkeypatch.setattr(module, "MAX_REMEMBERED", 2000)
    several = [STORY, PROGRAM, STORY]
    assert spelled(speller(plain), several) == [plain.encode(text) for text in several]


def test_kinds_hang_together_and_a_piece_that_goes_on_into_a_space_forbids_words():
    kinds = kinds_of(["ab", "bc", "!", "?!", "\u2581a", "\u2581\u2581", "\u25815", "9"])
    assert kinds is not None
    assert kinds["a"] == kinds["b"] == kinds["c"] != kinds["!"] == kinds["?"]
    assert set(kinds) == set("abc!?")
    assert kinds_of(["ab", "a\u2581"]) is None


def model(**options: object) -> bytes:
    settings = {
        "vocab_size": 400,
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        "minloglevel": 2,
    }
    file = io.BytesIO()
    sentences = iter((STORY + " the sea, the sea").splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=file, **settings | options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "is_cuttable"),
    [
        ({}, True),
        ({"split_by_unicode_script": False}, True),
        ({"split_by_number": False, "split_digits": False}, True),
        ({"split_by_whitespace": False}, False),
        ({"treat_whitespace_as_suffix": True}, False),
        ({"user_defined_symbols": ["the sea", "1"]}, False),
        ({"normalization_rule_name": "nmt_nfkc"}, False),
        ({"add_dummy_prefix": True}, False),
        ({"remove_extra_whitespaces": True}, False),
        ({"control_symbols": ["x"]}, False),
        ({"model_type": "unigram"}, False),
        ({"model_type": "char"}, False),
        ({"model_type": "word", "vocab_size": 300}, False),
    ],
)
def test_only_models_whose_texts_may_be_cut_are_spelled_word_by_word(options, is_cuttable):
    serialized = model(**options)
    recipe = Recipe.of(serialized)
    assert recipe.is_cuttable == is_cuttable
    if is_cuttable:
        processor, text = sentencepiece.SentencePieceProcessor(model_proto=serialized), STORY + PROGRAM
        assert spelled(WordSpeller(recipe), [text]) == [processor.encode(text)]


def test_a_tokenizer_that_remembers_words_gives_the_same_ids(plain):
    quick, several = Tokenizer(plain.serialized), [*HARD, STORY, *HARD]
    quick.remember_words()
    expected = [plain.encode(text) for text in several]
    assert [quick.encode(text) for text in several] == expected
    for tokenizer in (plain, quick):
        ids, lengths = tokenizer.encode_all(several)
        assert (ids.dtype, lengths.tolist()) == (np.int32, [*map(len, expected)])
        assert ids.tolist() == [token for ids in expected for token in ids]
        assert [len(part) for part in tokenizer.encode_all([])] == [0, 0]


def test_a_model_that_cannot_be_cut_is_left_to_sentencepiece(tmp_path, monkeypatch):
    unigram = train([STORY], tmp_path / "m.model", vocab_size=400, model_type="unigram")
    unigram.remember_words()
    monkeypatch.setattr("nanollm.text.tokenizer.Recipe.of", lambda _: pytest.fail("the model was read once more"))
    unigram.remember_words()
    assert unigram._words is None
    ids, lengths = unigram.encode_all([STORY, "the sea"])
    assert ids.tolist() == [*unigram.encode(STORY), *unigram.encode("the sea")]
    assert lengths.tolist() == [len(unigram.encode(STORY)), len(unigram.encode("the sea"))]


def test_without_a_compiler_sentencepiece_spells_and_that_is_said_once(plain, monkeypatch, capsys):
    def fail():
        raise build.NoCompilerError("no C++ compiler was found")

    monkeypatch.setattr(module, "library", fail)
    quick = Tokenizer(plain.serialized)
    for _ in range(2):
        quick.remember_words()
    assert capsys.readouterr().err.count("texts become ids several times as slowly: no C++ compiler was found") == 1
    assert quick.encode(STORY) == plain.encode(STORY)


def test_a_lone_surrogate_is_refused_with_its_place_in_the_text(plain):
    quick = Tokenizer(plain.serialized)
    quick.remember_words()
    for tokenizer in (plain, quick):
        for encode in (tokenizer.encode, lambda text, encode_all=tokenizer.encode_all: encode_all(["fine", text])):
            with pytest.raises(ValueError, match=r"character 5 of the text is the lone surrogate U\+DFFF"):
                encode("a\u2581bcd\udfff")


@pytest.mark.slow
@pytest.mark.realdata
def test_all_real_documents_have_the_ids_of_sentencepiece(shared_data, tmp_path):
    from nanollm.sources.datasets import openwebtext

    several = list(openwebtext([shared_data / "openwebtext"], on_bad=pytest.fail))
    rng = random.Random(0)
    mixed = ["".join(rng.choices("".join(rng.sample(several, 3)), k=5000)) for _ in range(500)]  # letters at random
    for vocab_size in (1000, 50_304):
        plain = train(several, tmp_path / "m.model", vocab_size=vocab_size)
        expected = [plain.encode(text) for text in several + mixed]
        assert spelled(speller(plain), several + mixed) == expected
