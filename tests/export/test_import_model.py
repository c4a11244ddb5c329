"""What others trained computes the same as a bundle, and what an export wrote comes back."""

import dataclasses
import json
from typing import get_args

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from nanollm.bundle import Bundle, build_model
from nanollm.durable import sha256_of
from nanollm.export.hf import DTYPES, HfFormat, write_model
from nanollm.export.import_model import import_model, import_tokenizer, read_checkpoint, with_rows
from nanollm.model.transformer import Transformer
from nanollm.text.chat import Conversation, encode_prompt
from nanollm.text.tokenizer import ASSISTANT, END, MARKS, SYSTEM, USER
from tests.export.foreign import CLASSES, PIECES, STORY, save_foreign, sentencepiece_model
from tests.model.conftest import TINY, randomised

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2581\u2585 \n\t\r\0<|>/s01"), max_size=80)
EVEN = dataclasses.replace(TINY, n_blocks=6, moe_every=2, n_dense_first=2)  # its dense blocks fit the shared expert
SPLIT = dataclasses.replace(EVEN, n_shared_experts=1, d_ff=72, d_expert=24)  # channels go into routed experts, too


@pytest.fixture(scope="module", params=CLASSES)
def foreign(request, tmp_path_factory):
    """(folder, transformers' model) of each class."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_foreign(folder, request.param)


def model_of(adopted, dtype=torch.float32):
    model = build_model(adopted.config)
    model.load_state_dict(adopted.weights, assign=True)
    return model.to(dtype).eval()


@torch.no_grad()
def assert_computes_as(adopted, theirs):
    """The logits of all ids that transformers' model knows, in float32."""
    known = theirs.config.vocab_size
    tokens = torch.randint(known, (2, 33), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(model_of(adopted)(tokens)[..., :known], expected, atol=1e-4, rtol=1e-4)


# --- weights ---


def test_a_model_of_others_gives_the_logits_it_gave(foreign):
    folder, theirs = foreign
    adopted = import_model(read_checkpoint(folder))
    assert [adopted.config.is_moe(block) for block in range(3)] == [False, True, True]
    assert adopted.config.vocab_size == PIECES + 5
    assert_computes_as(adopted, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_type_and_the_routers_bias_is_float32(tmp_path, dtype):
    save_foreign(tmp_path, dtype=dtype)
    adopted = import_model(read_checkpoint(tmp_path))
    assert {weight.dtype for name, weight in adopted.weights.items() if "balance_bias" not in name} == {dtype}
    assert {weight.dtype for name, weight in adopted.weights.items() if "balance_bias" in name} == {torch.float32}
    assert_computes_as(adopted, DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())


def test_shards_are_one_model(foreign, tmp_path):
    folder, theirs = foreign
    save_foreign(tmp_path, theirs.config.model_type, shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, sharded = (import_model(read_checkpoint(place)) for place in (folder, tmp_path))
    assert whole.weights.keys() == sharded.weights.keys()
    assert all(torch.equal(weight, sharded.weights[name]) for name, weight in whole.weights.items())


def test_a_tied_head_is_a_copy_of_the_embedding_and_said(tmp_path):
    theirs = save_foreign(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    adopted = import_model(read_checkpoint(tmp_path))
    assert torch.equal(adopted.weights["head.weight"], adopted.weights["trunk.embed.weight"])
    assert any("tie_word_embeddings" in note for note in adopted.notes)
    assert_computes_as(adopted, theirs)


def test_layers_for_further_tokens_are_left_out_and_said(tmp_path):
    theirs = save_foreign(tmp_path)  # its config.json says num_nextn_predict_layers 1
    path = tmp_path / "model.safetensors"
    extra = {f"model.layers.3.{name}.weight": torch.ones(40) for name in ("enorm", "hnorm", "input_layernorm")}
    save_file(load_file(path) | extra, path)
    adopted = import_model(read_checkpoint(tmp_path))
    assert any("num_nextn_predict_layers" in note for note in adopted.notes)
    assert_computes_as(adopted, theirs)


def test_another_epsilon_than_that_of_the_latents_is_said(tmp_path):
    save_foreign(tmp_path, "glm4_moe_lite", rms_norm_eps=1e-5)
    adopted = import_model(read_checkpoint(tmp_path))
    assert (
        "rms_norm_eps 1e-05 holds for the norms of the latents as well, where transformers takes 1e-06" in adopted.notes
    )


def test_new_rows_are_the_mean_of_all():
    matrix = torch.arange(6.0).reshape(3, 2).bfloat16()
    torch.testing.assert_close(with_rows(matrix, 2)[3:], torch.tensor([[2.0, 3.0]] * 2).bfloat16())
    torch.testing.assert_close(with_rows(matrix, 2)[:3], matrix)


# --- there and back ---


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("form", get_args(HfFormat))
@pytest.mark.parametrize("shape", [TINY, EVEN, SPLIT], ids=["tiny", "even", "split"])
def test_export_import_export_gives_the_same_bytes(tmp_path, tokenizer, shape, form, dtype):
    shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    bundle = Bundle(randomised(Transformer(shape).init(0)).eval(), tokenizer, {})
    write_model(first, bundle, form, DTYPES[dtype])
    tokenizer.save(first / "tokenizer.model")
    adopted = import_model(read_checkpoint(first))
    assert (adopted.config, adopted.tokenizer.serialized, adopted.notes) == (shape, tokenizer.serialized, ())
    write_model(second, Bundle(model_of(adopted), adopted.tokenizer, {}), form, DTYPES[dtype])
    names = {file.name for file in first.iterdir()} - {"tokenizer.model"}
    assert {name: sha256_of(second / name) for name in names} == {name: sha256_of(first / name) for name in names}


def test_an_export_that_was_trained_on_stays_a_mixture_of_experts_and_computes_the_same(tmp_path, tokenizer):
    shape = dataclasses.replace(EVEN, vocab_size=tokenizer.vocab_size)
    bundle = Bundle(randomised(Transformer(shape).init(0)).eval(), tokenizer, {})
    write_model(tmp_path, bundle, "deepseek-v3", torch.float32)
    tokenizer.save(tmp_path / "tokenizer.model")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.4.mlp.experts.1.up_proj.weight"] += 0.1  # a dense block's, where an export leaves zeros
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    adopted = import_model(read_checkpoint(tmp_path))
    assert (adopted.config.moe_every, adopted.config.n_dense_first) == (1, 3)
    assert any("stay Mixtures of Experts" in note for note in adopted.notes)
    assert_computes_as(adopted, DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval())


# --- the tokenizer ---


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pair(request):
    """(another's SentencePiece model, what it becomes with no spare ids)."""
    serialized = sentencepiece_model(model_type=request.param)
    return sentencepiece.SentencePieceProcessor(model_proto=serialized), import_tokenizer(serialized, PIECES, {}, [])


def test_ids_keep_their_pieces_and_texts_that_begin_with_a_space_their_ids(pair):
    theirs, adopted = pair
    assert [piece.text for piece in adopted.pieces[:PIECES]] == theirs.id_to_piece(list(range(PIECES)))
    assert (adopted.unk_id, adopted.bos_id, adopted.eos_id) == (0, 1, 2)
    for line in STORY.split("\n"):
        text = " ".join(line.split())  # what their normaliser leaves as it is
        assert adopted.encode(f" {text}") == theirs.encode(text) or not text


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_from_an_adopted_tokenizer(pair, text):
    _, adopted = pair
    ids = adopted.encode(text)
    assert adopted.decode(ids) == text
    assert b"".join(map(adopted.bytes_of, ids)) == text.encode()
    assert adopted.token_bytes[ids].sum() == len(text.encode())


def test_every_id_stands_for_the_bytes_that_are_counted(pair):
    _, adopted = pair
    spelled = [adopted.bytes_of(token) for token in range(adopted.vocab_size)]
    assert list(map(len, spelled)) == adopted.token_bytes.tolist()
    assert [token for token, text in enumerate(spelled) if not text] == [0, 1, 2, *range(PIECES, PIECES + 5)]


def test_a_conversation_can_be_encoded_and_no_text_spells_a_mark(pair):
    _, adopted = pair
    assert [adopted.pad_id, *map(adopted.mark_id, MARKS[:4])] == [PIECES + n for n in range(5)]
    assert MARKS[:4] == (SYSTEM, USER, ASSISTANT, END)
    ids = encode_prompt(Conversation.of("<|end|><s></s><|assistant|><pad>"), adopted)
    assert [token for token in ids if token in adopted.symbols] == [1, PIECES + 2, PIECES + 4, PIECES + 3]


def test_marks_take_ids_that_the_model_has_and_its_tokenizer_does_not_use():
    notes = []
    added = {0: "<unk>", PIECES: "<|im_start|>", PIECES + 3: END, PIECES + 900: SYSTEM, 7: "a piece"}
    adopted = import_tokenizer(sentencepiece_model(), PIECES + 16, added, notes)
    assert [piece.text for piece in adopted.pieces[PIECES:]] == [
        "<|im_start|>",
        "<pad>",
        SYSTEM,
        END,
        USER,
        ASSISTANT,
    ]
    assert {piece.kind for piece in adopted.pieces[PIECES:]} == {"control"}
    assert f"the ids from {PIECES} on are control symbols: <|im_start|>, <pad>" in notes[-1]


def test_a_mark_that_the_model_knows_keeps_its_id_beyond_a_gap():
    adopted = import_tokenizer(sentencepiece_model(), PIECES + 16, {PIECES + 6: USER}, [])
    assert [*adopted.symbols.values()][-3:] == [f"<|unused_{PIECES + 4}|>", f"<|unused_{PIECES + 5}|>", USER]
    assert adopted.mark_id(USER) == PIECES + 6


def test_spare_rows_become_marks_without_a_change_of_the_weights(tmp_path):
    theirs = save_foreign(tmp_path, vocab_size=PIECES + 32)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(PIECES + 1): {"content": "<|im_end|>", "special": True}}})
    )
    adopted = import_model(read_checkpoint(tmp_path))
    assert adopted.config.vocab_size == PIECES + 32
    assert torch.equal(adopted.weights["head.weight"], theirs.lm_head.weight)
    assert adopted.tokenizer.symbols[PIECES + 1] == "<|im_end|>"
    assert_computes_as(adopted, theirs)


def test_a_mark_that_text_could_spell_becomes_a_control_symbol():
    notes = []
    adopted = import_tokenizer(sentencepiece_model(user_defined_symbols=f"{USER},<x>"), PIECES, {}, notes)
    assert f"{USER} is a control symbol: no text can spell it" in notes
    assert adopted.mark_id(USER) not in adopted.encode(f"a {USER} b")
    assert adopted.decode(adopted.encode(f"a {USER} <x> b")) == f"a {USER} <x> b"


def test_a_tokenizer_of_ours_is_taken_as_it_is(tokenizer):
    notes = []
    assert import_tokenizer(tokenizer.serialized, 700, {650: "<|other|>"}, notes).serialized == tokenizer.serialized
    assert notes == []


@pytest.mark.parametrize(
    ("serialized", "message"),
    [
        (b"", "is not a SentencePiece model"),
        (b"something else", "is not a SentencePiece model"),
        (sentencepiece_model(byte_fallback=False, vocab_size=200), r"has no piece for every byte \(byte_fallback\)"),
        (sentencepiece_model(bos_id=-1), "has no <s>, with which"),
        (sentencepiece_model(bos_id=-1, eos_id=-1), "has no </s> and no <s>, with which"),
        (sentencepiece_model(vocab_size=PIECES + 1), "has 481 pieces, the model only 480 ids"),
    ],
)
def test_a_tokenizer_that_cannot_be_adopted_is_refused_with_the_reason(serialized, message):
    with pytest.raises(ValueError, match=f"tokenizer.model {message}"):
        import_tokenizer(serialized, PIECES, {}, [])
