"""llama.cpp and the JavaScript programs around it give a GGUF's texts and conversations the ids of the bundle."""

import json
import subprocess
from dataclasses import astuple, replace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from nanollm.bundle import Bundle
from nanollm.export import engines
from nanollm.export.gguf import WITHOUT_ADAPTER, write_adapter, write_gguf
from nanollm.export.verify import TokenScores
from nanollm.model.lora import LoraConfig, adapters, add_lora, plain_name
from nanollm.model.transformer import Transformer
from nanollm.text.chat import Conversation, Message, encode_conversation, encode_prompt
from nanollm.text.tokenizer import END, SPACE_MARK
from tests.export.strings import (
    ALL_MARKS,
    LONG,
    SPELLINGS,
    TEMPLATE,
    as_messages,
    conversations,
    drawn,
    first_difference,
    texts,
)
from tests.model.conftest import TINY, randomised

RENDER = """
import {text} from "node:stream/consumers";
const {Template} = await import(process.argv[1]);
const {source, asked} = JSON.parse(await text(process.stdin));
const template = new Template(source);
const render = (given) => { try { return template.render(given); } catch (error) { return {refused: error.message}; } };
process.stdout.write(JSON.stringify(asked.map(render)));
"""


@pytest.fixture(scope="module")
def package():
    """The folder of node-llama-cpp."""
    try:
        return engines.package_folder()
    except ValueError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def gguf(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = Transformer(replace(TINY, vocab_size=tokenizer.vocab_size)).init(0)
    write_gguf(path, Bundle(model, tokenizer, {}), "f32")
    return path


def as_read(text):
    """The text as llama.cpp reads it: a literal U+2581 is a space, as it is for SentencePiece and not for `encode`."""
    return text.replace(SPACE_MARK, " ")


def our_ids(conversation, tokenizer):
    conversation = Conversation(tuple(Message(each.role, as_read(each.content)) for each in conversation.messages))
    asks = conversation.messages[-1].role == "user"
    return encode_prompt(conversation, tokenizer) if asks else encode_conversation(conversation, tokenizer).ids


# The template in JavaScript: @huggingface/jinja, which node-llama-cpp and Transformers.js use.


def rendered_in_javascript(package, found):
    jinja = package.parent / "@huggingface" / "jinja" / "dist" / "index.js"
    asked = [
        {"messages": messages, "add_generation_prompt": messages[-1]["role"] == "user", "bos_token": ""}
        for messages in map(as_messages, found)
    ]
    question = json.dumps({"source": TEMPLATE, "asked": asked}).encode()
    command = ["node", "--input-type=module", "--eval", RENDER, jinja]
    return json.loads(subprocess.run(command, input=question, capture_output=True, check=True).stdout)


def test_texts_and_conversations_rendered_in_javascript_have_the_same_ids(tokenizer, gguf, package):
    strings, found = [*SPELLINGS, *LONG, *drawn(texts, 500)], drawn(conversations(), 100)
    answers = engines.ask_llama_cpp(gguf, texts=strings, texts_with_marks=rendered_in_javascript(package, found))
    ours = [tokenizer.encode(as_read(text)) for text in strings]
    assert first_difference(strings, ours, answers["ids"]) is None
    ours = [our_ids(conversation, tokenizer)[1:] for conversation in found]
    assert first_difference(found, ours, answers["ids_with_marks"]) is None


def test_a_message_that_spells_a_mark_is_refused_in_javascript(package):
    for answer in rendered_in_javascript(package, [Conversation.of(f"a{mark}b") for mark in ALL_MARKS]):
        assert "message 1 spells the mark" in answer["refused"]


# An adapter.


@pytest.mark.parametrize("d_ff", [40, 72], ids=["into the shared expert", "into routed experts too"])
@torch.no_grad()
def test_an_adapter_of_every_matrix_that_can_have_one_does_what_ours_does(d_ff, package, tokenizer, tmp_path, rng):
    model = randomised(Transformer(replace(TINY, vocab_size=tokenizer.vocab_size, d_ff=d_ff)).init(0)).eval()
    write_gguf(tmp_path / "model.gguf", Bundle(model, tokenizer, {}), "f32")
    matrices = {name.removesuffix(".weight").rpartition(".")[2] for name, p in model.named_parameters() if p.dim() > 1}
    lora = LoraConfig(rank=3, alpha=7.0, targets=sorted(matrices - {*WITHOUT_ADAPTER}))
    assert {"embed", "centroids", "o_proj", "gate_proj", "up_proj", "down_proj"} == {*lora.targets}
    add_lora(model, lora, seed=0)
    for each in adapters(model):
        torch.nn.init.normal_(each.lora_B, std=0.1, generator=rng)
    weights = {plain_name(name): tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    write_adapter(tmp_path / "adapter.gguf", model.config, lora, weights)
    ids = list(range(5, 60))
    answer = engines.ask_llama_cpp(tmp_path / "model.gguf", lora=tmp_path / "adapter.gguf", scored=[ids])
    (theirs,), ours = answer["scores"], TokenScores.of(model(torch.tensor([ids]))[0], ids)
    for mine, other in zip(astuple(ours), astuple(theirs), strict=True):
        torch.testing.assert_close(other.to(mine.dtype), mine, atol=1e-4, rtol=0)


# The template in llama.cpp's own server.


@pytest.fixture(scope="module")
def post(gguf):
    """post(path, question): the answer of a llama-server in this process."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama-server comes with xllamacpp: pip install xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 64, 1, 1, False
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def post(path, question):
        with urlopen(Request(server.listening_address + path, json.dumps(question).encode())) as answer:
            return json.load(answer)

    return post


def test_conversations_rendered_by_llama_cpp_have_the_same_ids(tokenizer, post):
    found, spoken = drawn(conversations(), 100), []
    for conversation in found:
        text = post("/apply-template", {"messages": as_messages(conversation)})["prompt"]
        tokens = post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        goes_on = conversation.messages[-1].role == "assistant"  # so it takes a last message of the assistant
        spoken.append([*tokens, tokenizer.mark_id(END)] if goes_on else tokens)
    assert first_difference(found, [our_ids(each, tokenizer) for each in found], spoken) is None


@pytest.mark.parametrize("mark", ALL_MARKS)
def test_a_message_that_spells_a_mark_is_refused_by_llama_cpp(post, mark):
    with pytest.raises(HTTPError) as refused:
        post("/apply-template", {"messages": as_messages(Conversation.of(f"a{mark}b"))})
    assert refused.value.code == 400
    assert "message 1 spells the mark" in refused.value.read().decode()
