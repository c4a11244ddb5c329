"""A bundle continues prompts, and nothing that does not fit is tried."""

import json
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.bundle import load_bundle
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.stages.generate import BETWEEN, Config, encode, run, text_of
from nanollm.text.stream import TextStream


@pytest.fixture(scope="module")
def loaded(bundle):
    return load_bundle(bundle)


def records(**settings):
    return [json.loads(line) for line in run(Config(json=True, dtype="float32", **settings)).splitlines()]


def test_a_batch_of_prompts_gives_what_each_gives_alone(bundle):
    prompts = ["Once upon a time", "The", "No one knew why"]
    together = records(bundle=bundle, prompt=prompts, max_tokens=8, temperature=0.9, seed=5)
    alone = [
        records(bundle=bundle, prompt=[p], max_tokens=8, temperature=0.9, seed=5 + i)[0] for i, p in enumerate(prompts)
    ]
    assert together == alone
    assert [record["prompt"] for record in together] == prompts


def test_the_same_seed_gives_the_same_text_and_another_seed_another(bundle):
    first, same, other = (records(bundle=bundle, prompt=["The"], max_tokens=12, seed=s)[0]["text"] for s in (1, 1, 2))
    assert first == same != other


def test_a_stop_text_ends_the_reply_and_is_left_out(bundle):
    (free,) = records(bundle=bundle, prompt=["The"], max_tokens=20, seed=1)
    stop = free["text"][4:6]
    (stopped,) = records(bundle=bundle, prompt=["The"], max_tokens=20, seed=1, stop=[stop])
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["finish"] == "stop"


@given(seed=st.integers(0, 999), choose=st.data())
@settings(max_examples=40, deadline=None)
def test_a_stop_text_across_token_borders_is_found_with_its_last_token_and_cut(loaded, seed, choose):
    free = continued(loaded, seed)
    stream = TextStream(loaded.tokenizer)
    appeared = [
        "".join(pieces) for pieces in accumulate([stream.push(token)] for token in free.ids)
    ]  # after each token
    text = appeared[-1]
    border = choose.draw(st.sampled_from([len(before) for before in appeared if 0 < len(before) < len(text)]))
    start, end = choose.draw(st.integers(0, border - 1)), choose.draw(st.integers(border + 1, len(text)))
    stop = text[start:end]
    stopped = continued(loaded, seed, [stop, "never said by this model"])
    assert text_of(stopped.ids, loaded.tokenizer, [stop]) == text.partition(stop)[0]
    assert stopped.ids == free.ids[: 1 + next(place for place, before in enumerate(appeared) if stop in before)]
    assert stopped.finish == "stop"


def continued(loaded, seed, stops=()):
    (completion,) = generate(
        loaded.model,
        [encode("The", loaded.tokenizer, is_chat=False)],
        SamplingConfig(temperature=1.0),
        max_tokens=20,
        stop_token_ids=frozenset(),
        seed=seed,
        stop=lambda: TextStream(loaded.tokenizer, stops).stops_at,
    )
    return completion


def test_a_line_of_dashes_stands_between_continuations(bundle):
    one, other = run(Config(bundle=bundle, prompt=["The", "Once"], max_tokens=3, dtype="float32")).split(
        f"\n{BETWEEN}\n"
    )
    assert (one[:3], other[:4]) == ("The", "Once")


@pytest.mark.parametrize(("stops", "expected"), [([], "abcabc"), (["ca"], "ab"), (["c", "b"], "a"), (["x"], "abcabc")])
def test_text_is_cut_at_the_first_stop(tokenizer, stops, expected):
    assert text_of(tokenizer.encode("abcabc"), tokenizer, stops) == expected


def test_a_prompt_longer_than_the_context_is_refused(bundle):
    with pytest.raises(ValueError, match="the model's context is 32"):
        run(Config(bundle=bundle, prompt=["word " * 100], dtype="float32"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"prompt": []}, "--prompt expects at least one text"), ({"prompt": ["a"], "stop": [""]}, "got an empty one")],
)
def test_senseless_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Config(bundle=tmp_path, **settings)
