"""lm-evaluation-harness hears from our adapter what the model says, and what its own `hf` says of the export."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from nanollm.bundle import load_bundle, save_bundle
from nanollm.evals import documents
from nanollm.model.transformer import Transformer
from tests.evals.harness_tasks import TEXTS, write_tasks
from tests.model.conftest import randomised
from tests.stages.conftest import MODEL

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install -e ".[eval]"')

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from nanollm.evals.lm_eval import MAX_TOKENS, NanoLM, read_settings

CONTEXT = 64
TASKS = ["nano_choice", "nano_reply", "nano_whole"]
FOX = "The king rode out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    shape = replace(MODEL, context_length=CONTEXT)
    model = randomised(Transformer(shape).init(0))
    # Like a trained one it says no control symbols and no bytes: of bytes that spell no character SentencePiece makes
    # other text than the exported tokenizer.
    model.head.weight.data[[token for token in range(600) if tokenizer.is_byte(token) or token in (0, 1, 2)]] = 0
    model.head.weight.data[4:20] = 0
    return save_bundle(tmp_path_factory.mktemp("harness") / "bundle", shape, model.state_dict(), tokenizer, {})


@pytest.fixture(scope="module")
def bundle(folder):
    return load_bundle(folder)


@pytest.fixture(scope="module")
def lm(bundle):
    return NanoLM(bundle)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def asked(kind, *arguments):
    """Requests as lm_eval makes them."""
    return [Instance(kind, {}, each, 0) for each in arguments]


def likelihoods(lm, *pairs):
    return lm.loglikelihood(asked("loglikelihood", *pairs))


@torch.no_grad()
def by_hand(bundle, context, ids):
    """Log-probability of ids after a context, and whether they are the most likely, from one row of logits."""
    row = [*context, *ids][-CONTEXT - 1 :]
    logprobs = bundle.model(torch.tensor([row[:-1]]))[0].log_softmax(-1)[-len(ids) :]  # (n, V)
    return logprobs.gather(1, torch.tensor(ids)[:, None]).sum().item(), logprobs.argmax(-1).tolist() == ids


def greedy_ids(model, prompt, count):
    """The most likely `count` ids after these ids, one by one."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


# --- how likely is a text ---


def test_log_likelihoods_are_those_of_the_model(bundle, lm):
    encode, bos = bundle.tokenizer.encode, bundle.tokenizer.bos_id
    pairs = [(FOX, " and sang"), (FOX, " x"), (FOX, " y"), ("", FOX), (TEXTS[1], " the end of it"), ("  ", "soup")]
    for (context, text), (logprob, is_greedy) in zip(pairs, likelihoods(lm, *pairs), strict=True):
        before, whole = [bos, *encode(context.rstrip())], [bos, *encode(context + text)]
        expected = by_hand(bundle, before, whole[len(before) :])
        assert (logprob, is_greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])


def test_it_is_known_whether_the_model_itself_would_say_it(bundle, lm):
    prompt = lm.tok_encode(FOX)
    said = greedy_ids(bundle.model, prompt, 5)
    other = [*said[:2], said[2] - 1, *said[3:]]
    answers = lm._loglikelihood_tokens([(None, prompt, said), (None, prompt, other), (None, prompt, said[:4])])
    assert [is_greedy for _, is_greedy in answers] == [True, False, True]


def test_spaces_before_a_choice_belong_to_it(lm):
    assert likelihoods(lm, ("The king ", "rode")) == likelihoods(lm, ("The king", " rode"))


def test_a_batch_of_one_gives_what_a_batch_of_many_gives(bundle, lm):
    alone = NanoLM(bundle, rows=1)
    pairs = [(text[:size], f" {word}") for text in TEXTS for size in (10, 80) for word in ("soup", "a long way off")]
    for (one, one_greedy), (many, many_greedy) in zip(likelihoods(alone, *pairs), likelihoods(lm, *pairs), strict=True):
        assert (one, one_greedy) == (pytest.approx(many, abs=1e-4), many_greedy)
    prompts = [(text[:30], {"max_gen_toks": 12}) for text in TEXTS]
    assert alone.generate_until(asked("generate_until", *prompts)) == lm.generate_until(
        asked("generate_until", *prompts)
    )


@pytest.mark.parametrize("tokens", [1, 40, CONTEXT, 3 * CONTEXT], ids=lambda tokens: f"{tokens} tokens")
def test_a_whole_text_is_as_likely_as_its_bits_per_byte_say(bundle, lm, tokens):
    text = bundle.tokenizer.decode(bundle.tokenizer.encode(TEXTS[1])[:tokens])
    assert len(bundle.tokenizer.encode(text)) == tokens
    (logprob,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    bits = documents.bits_of_texts(bundle, [text])
    assert -logprob / math.log(2) / len(text.encode()) == pytest.approx(bits.ratio.value, rel=1e-5)


def test_a_text_longer_than_the_context_is_read_in_windows_that_predict_each_token_once(bundle, lm):
    bos, ids = bundle.tokenizer.bos_id, bundle.tokenizer.encode(TEXTS[1])[: CONTEXT + 10]
    (logprob,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (bundle.tokenizer.decode(ids),)))
    first = by_hand(bundle, [bos], ids[:CONTEXT])[0]
    rest = by_hand(bundle, ids[9:CONTEXT], ids[CONTEXT:])[0]  # the last window is a full one
    assert logprob == pytest.approx(first + rest, abs=1e-3)


def test_an_empty_text_is_certain(lm):
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("",))) == [0.0]


def test_what_cannot_be_scored_is_refused(lm):
    with pytest.raises(ValueError, match=r"expected 1 to 64 tokens \(the model's context\), got \d{3}; leave the task"):
        likelihoods(lm, (FOX, TEXTS[1]))
    with pytest.raises(ValueError, match=r"expected 1 to 64 tokens .*, got 0"):
        likelihoods(lm, (FOX, ""))


# --- what follows a prompt ---


def replies(lm, *arguments):
    return lm.generate_until(asked("generate_until", *arguments))


def test_a_reply_ends_before_the_first_of_its_stop_texts(lm):
    (free,) = replies(lm, (FOX, {"max_gen_toks": 20}))
    stop = free[5:7]
    assert replies(lm, (FOX, {"max_gen_toks": 20, "until": ["never said", stop, ""]})) == [free.split(stop)[0]]
    assert replies(lm, (FOX, {"max_gen_toks": 20, "until": stop})) == [free.split(stop)[0]]


def test_replies_by_chance_depend_on_the_seed_and_their_place_alone(bundle):
    def drawn(seed, rows=8):
        settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
        return replies(NanoLM(bundle, rows, seed), *[(FOX, settings)] * 3)

    assert drawn(1) == drawn(1, rows=1) != drawn(7)
    assert len(set(drawn(1))) == 3


def test_a_prompt_without_room_loses_its_beginning(lm):
    long, end = TEXTS[1], lm.tok_encode(TEXTS[1])[-(CONTEXT - 20) :]
    text = lm.bundle.tokenizer.decode(end)
    assert lm.bundle.tokenizer.encode(text) == end
    (got,) = replies(lm, (long, {"max_gen_toks": 20}))
    assert got
    assert lm.bundle.tokenizer.decode(greedy_ids(lm.bundle.model, end, 20)).startswith(got)


def test_a_reply_that_could_fill_the_context_leaves_the_prompt_half_of_it(lm, capsys):
    (reply,) = replies(lm, (TEXTS[1], {}))
    assert lm.bundle.tokenizer.encode(reply)
    assert "replies of 256 tokens, the model's context is 64: prompts keep their last 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, (MAX_TOKENS, 0.0, [])),
        ({"max_new_tokens": 7, "until": "x", "num_beams": 1}, (7, 0.0, ["x"])),
        ({"do_sample": False, "temperature": 0.0}, (MAX_TOKENS, 0.0, [])),
        ({"temperature": 0.5}, (MAX_TOKENS, 0.5, [])),
        ({"do_sample": True, "temperature": 1}, (MAX_TOKENS, 1.0, [])),
    ],
)
def test_the_settings_of_a_task_are_understood(wanted, expected):
    max_tokens, sampling, stops = read_settings(wanted)
    assert (max_tokens, sampling.temperature, stops) == expected


def test_settings_that_we_lack_are_refused():
    with pytest.raises(ValueError, match=r"a task's generation_kwargs may hold .*, got num_beams: 4"):
        read_settings({"num_beams": 4})


# --- the same as lm_eval's own model on the export ---


def run(model, tasks, names=TASKS, **settings):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **settings)


@pytest.fixture(scope="module")
def hf(bundle, tmp_path_factory):
    """hf(**settings): lm_eval's own model of the compact export."""
    pytest.importorskip("accelerate", reason="lm_eval's hf model needs it: pip install accelerate")
    from lm_eval.models.huggingface import HFLM

    from nanollm.export.hf import write_model
    from nanollm.export.tokenizer_json import write_tokenizer

    folder = tmp_path_factory.mktemp("compact")
    write_model(folder, bundle, "compact", torch.float32)
    write_tokenizer(folder, bundle.tokenizer, CONTEXT)
    return partial(HFLM, pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)


def test_scores_and_samples_equal_those_of_hf_on_the_export(lm, hf, tasks):
    settings = {"names": TASKS[:2], "num_fewshot": 1}
    ours, theirs = run(lm, tasks, **settings), run(hf(), tasks, **settings)
    assert ours["results"] == theirs["results"]
    for task in TASKS[:2]:
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["doc_id"] == other["doc_id"]
            for got, expected in zip(mine["resps"], other["resps"], strict=True):
                if task == "nano_reply":
                    assert got == expected
                else:
                    assert got[0][0] == pytest.approx(expected[0][0], abs=1e-4)
                    assert got[0][1] == expected[0][1]


def test_whole_texts_are_as_likely_as_to_hf_without_a_second_beginning(lm, hf, tasks):
    ours, theirs = run(lm, tasks, TASKS[2:]), run(hf(add_bos_token=False), tasks, TASKS[2:])
    for metric, value in theirs["results"]["nano_whole"].items():
        if isinstance(value, float):
            assert ours["results"]["nano_whole"][metric] == pytest.approx(value, rel=1e-5)
    text, bos = TEXTS[0], lm.prefix_token_id
    (mine,), (other,) = (each.loglikelihood_rolling(asked("loglikelihood_rolling", (text,))) for each in (lm, hf()))
    ids = lm.tok_encode(text, add_special_tokens=False)
    twice = by_hand(lm.bundle, [bos], [bos, *ids])[0]  # hf reads <s> <s> text and scores the second <s> as well
    assert other == pytest.approx(twice, abs=1e-3)
    assert mine == pytest.approx(by_hand(lm.bundle, [bos], ids)[0], abs=1e-3)


# --- the same over HTTP ---


@pytest.fixture(scope="module")
def over_http(bundle, hf):
    """over_http(**settings): lm_eval's own client of completions, which asks a server of ours."""
    pytest.importorskip("tenacity", reason="lm_eval's clients are not complete: pip install lm_eval[api]")
    pytest.importorskip("uvicorn", reason='uvicorn is not installed: pip install -e ".[serve]"')
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from tests.serve.running import MODEL_NAME, serving

    where = {"model": MODEL_NAME, "tokenizer": hf.keywords["pretrained"], "tokenizer_backend": "huggingface"}
    with serving(bundle) as running:
        where["base_url"] = f"{running.url}/v1/completions"
        yield partial(LocalCompletionsAPI, **where, max_length=CONTEXT, max_retries=1, batch_size=4)


def test_over_http_scores_and_replies_are_those_of_the_adapter(lm, over_http, tasks):
    ours, theirs = run(lm, tasks, TASKS[:2]), run(over_http(add_bos_token=True), tasks, TASKS[:2])
    assert ours["results"] == theirs["results"]
    answers = [
        [answer for sample in scores["samples"][task] for answer in sample["resps"]]
        for scores in (ours, theirs)
        for task in TASKS[:2]
    ]
    (choices, replies), (their_choices, their_replies) = answers[:2], answers[2:]
    assert replies == their_replies
    assert [greedy for ((_, greedy),) in choices] == [greedy for ((_, greedy),) in their_choices]
    likely, theirs = ([logprob for ((logprob, _),) in each] for each in (choices, their_choices))
    assert likely == pytest.approx(theirs, abs=1e-4)


def test_over_http_whole_texts_are_as_likely_as_in_the_same_windows_elsewhere(bundle, hf, over_http, tasks):
    """Its windows are two tokens shorter, as it always asks for one more."""
    ours = NanoLM(bundle)
    ours.max_length = CONTEXT - 2
    every = ours, hf(add_bos_token=False, max_length=CONTEXT - 2), over_http(num_concurrent=3)
    text = asked("loglikelihood_rolling", *((text,) for text in TEXTS))
    mine, of_hf, of_http = (each.loglikelihood_rolling(text) for each in every)
    assert of_http == pytest.approx(mine, rel=1e-6)
    assert of_http == pytest.approx(of_hf, rel=1e-6)
