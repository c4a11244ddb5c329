"""The engine answers as the model alone would, for every row as if it were the only one."""

import numpy as np
import pytest
import torch

from nanollm.generate.engine import Engine, generate
from nanollm.generate.request import Request
from nanollm.generate.sampling import SamplingConfig, sample, uniforms

GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[5, 9, 3, 44, 7, 60, 2], [11], [8, 8, 1]]


def without_cache(model, prompt, sampling, max_tokens, seed=0):
    """Read everything anew for each token: slow and plain."""
    ids = list(prompt)
    for drawn in range(max_tokens):
        with torch.no_grad():
            numbers = uniforms(np.array([seed]), np.array([drawn]))
            token = sample(model(torch.tensor([ids]))[:, -1], sampling, numbers)[0].item()
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.0, top_k=20, top_p=0.9)], ids=str)
def test_cache_and_batch_change_nothing(tiny_model, sampling):
    expected = [without_cache(tiny_model, p, sampling, 10, seed=3 + row) for row, p in enumerate(PROMPTS)]
    got = generate(tiny_model, PROMPTS, sampling, max_tokens=10, stop_token_ids=frozenset(), seed=3)
    assert [completion.ids for completion in got] == expected


def test_rows_that_end_early_leave_the_others_alone(tiny_model):
    free = [
        completion.ids
        for completion in generate(tiny_model, PROMPTS, GREEDY, max_tokens=24, stop_token_ids=frozenset())
    ]
    end = free[1][4]
    got = generate(tiny_model, PROMPTS, GREEDY, max_tokens=24, stop_token_ids=frozenset({end}))
    assert [completion.ids for completion in got] == [ids[: [*ids, end].index(end)] for ids in free]
    assert got[1].finish == "end"


def test_a_stop_function_ends_its_row(tiny_model):
    def at_the_third():
        told = []

        def stop(token):
            told.append(token)
            return len(told) == 3

        return stop

    free = generate(tiny_model, PROMPTS, GREEDY, max_tokens=9, stop_token_ids=frozenset())
    stopped = generate(tiny_model, PROMPTS, GREEDY, max_tokens=9, stop_token_ids=frozenset(), stop=at_the_third)
    assert [c.ids for c in stopped] == [c.ids[:3] for c in free]
    assert {c.finish for c in stopped} == {"stop"}


def test_replies_end_where_the_context_ends(tiny_model):
    prompt = list(range(60))  # of 64
    (completion,) = generate(tiny_model, [prompt], GREEDY, max_tokens=50, stop_token_ids=frozenset())
    assert len(completion.ids) == 5  # the last token is read by nobody and needs no place
    assert completion.finish == "length"
    assert completion.ids == without_cache(tiny_model, prompt, GREEDY, 5)


def test_the_model_is_left_in_the_mode_it_was_in(tiny_model):
    tiny_model.train()
    generate(tiny_model, [[1]], GREEDY, max_tokens=2, stop_token_ids=frozenset())
    assert tiny_model.training
    assert all(layer.load.sum() == 0 for layer in tiny_model.moe_layers())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_one_full_pass_at_the_same_temperature(tiny_model, temperature):
    sampling = SamplingConfig(temperature=temperature)
    ends = range(6)
    completions = generate(tiny_model, PROMPTS, sampling, max_tokens=20, stop_token_ids=frozenset(ends), samples=3)
    assert {completion.finish for completion in completions} == {"end", "length"}
    for row, completion in enumerate(completions):
        prompt, drawn = PROMPTS[row // 3], len(completion.logprobs)
        assert drawn == len(completion.ids) + (completion.finish == "end")
        with torch.no_grad():
            logits = tiny_model(torch.tensor([[*prompt, *completion.ids]]))[0, len(prompt) - 1 :]  # (drawn or more, V)
        expected = (logits / temperature).log_softmax(-1).tolist()
        for place, token in enumerate(completion.ids):
            assert completion.logprobs[place] == pytest.approx(expected[place][token], abs=1e-5)
        if completion.finish == "end":
            assert any(completion.logprobs[-1] == pytest.approx(expected[drawn - 1][end], abs=1e-5) for end in ends)


# --- requests that come and go ---

CHOICES = [
    GREEDY,
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.7, top_k=9),
    SamplingConfig(temperature=1.3, top_p=0.8, repetition_penalty=1.2),
    SamplingConfig(temperature=0.9, min_p=0.1, logit_bias={3: 2.0, 8: -5.0}),
]


def request(number, **changes):
    """The number-th of many different requests; every third begins like the others of its kind."""
    rng = np.random.default_rng(number)
    begins = [7, 7, 1, 9, 4, 2, 2, 30, 41, 5, 5, 60, 11, 12, 13, 14, 15, 16][: 18 * (number % 3 == 0)]
    values = {
        "prompt": [*begins, *rng.integers(0, 97, 1 + number % 20).tolist()],
        "max_tokens": 3 + number % 14,
        "sampling": CHOICES[number % len(CHOICES)],
        "stop_token_ids": frozenset({50 + number % 7}),
        "seed": number,
        "top_logprobs": 3 if number % 4 == 0 else None,
        "prompt_logprobs": 2 if number % 5 == 0 else None,
    }
    return Request(**(values | changes))


def answers(engine, completions):
    """Everything each request was told, after the engine ran dry."""
    told = {id(completion): [] for completion in completions}
    while engine.has_work:
        for drawn in engine.step():
            told[id(drawn.completion)].append((drawn.token, drawn.logprobs))
    return [(told[id(c)], c.ids, c.logprobs, c.finish, c.stop_token_id) for c in completions]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_request_is_answered_as_if_it_were_alone(tiny_model, dtype):
    model = tiny_model.to(dtype)
    expected = []
    for number in range(40):
        alone = Engine(model, rows=1)
        expected += answers(alone, [alone.submit(request(number))])

    crowd = Engine(model, rows=7, chunk=11)
    completions, leavers, told = [], [], {}
    for number in range(40):  # they come while others run, and some leave early
        completions.append(crowd.submit(request(number)))
        leavers.append(crowd.submit(request(number + 100)))
        for _ in range(number % 3):
            for drawn in crowd.step():
                told.setdefault(id(drawn.completion), []).append((drawn.token, drawn.logprobs))
        crowd.cancel(leavers[-1])
    while crowd.has_work:
        for drawn in crowd.step():
            told.setdefault(id(drawn.completion), []).append((drawn.token, drawn.logprobs))
    got = [(told[id(c)], c.ids, c.logprobs, c.finish, c.stop_token_id) for c in completions]
    assert got == expected
    assert crowd.reused_tokens > 0
    assert (crowd.waiting, crowd.running) == (0, 0)


def test_samples_of_a_prompt_read_it_once(tiny_model):
    prompt = list(range(30))
    engine = Engine(tiny_model, rows=8)
    several = [
        engine.submit(Request(prompt=prompt, max_tokens=5, sampling=SamplingConfig(temperature=1.0), seed=seed))
        for seed in range(8)
    ]
    got = answers(engine, several)
    assert (engine.prompt_tokens, engine.reused_tokens) == (30, 7 * 30)
    for seed, answer in enumerate(got):
        alone = Engine(tiny_model, rows=1)
        assert answers(alone, [alone.submit(several[seed].request)]) == [answer]


def test_conversations_in_turns_are_all_remembered(tiny_model):
    engine = Engine(tiny_model, rows=3)
    talks = [list(range(20)), list(range(40, 60))]
    for _ in range(3):
        for talk in talks:
            answers(engine, [engine.submit(Request(prompt=talk, max_tokens=1, sampling=GREEDY))])
            talk += [len(talk)] * 3
    assert engine.prompt_tokens == 2 * (20 + 3 + 3)
    assert engine.reused_tokens == 2 * (20 + 23)


def test_a_short_prompt_is_read_beside_long_ones(tiny_model):
    engine = Engine(tiny_model, rows=4, chunk=6)
    for first in (1, 2, 3):
        engine.submit(Request(prompt=[first] * 60, max_tokens=1, sampling=GREEDY))
    engine.step()
    short = engine.submit(Request(prompt=[9, 8], max_tokens=1, sampling=GREEDY))
    engine.step()
    engine.step()
    assert short.finish == "length"


def test_long_prompts_do_not_hold_up_the_replies_that_run(tiny_model):
    engine = Engine(tiny_model, rows=2, chunk=8)
    quick = engine.submit(Request(prompt=[1], max_tokens=20, sampling=GREEDY))
    engine.step()
    engine.submit(Request(prompt=list(range(50)), max_tokens=2, sampling=GREEDY))
    for _ in range(5):
        assert [drawn.completion for drawn in engine.step()] == [quick]


def test_first_come_first_served(tiny_model):
    engine = Engine(tiny_model, rows=1)
    completions = [engine.submit(Request(prompt=[n], max_tokens=2, sampling=GREEDY)) for n in range(5)]
    finished = []
    while engine.has_work:
        finished += [drawn.completion for drawn in engine.step() if drawn.completion.finish]
    assert finished == completions


def test_a_cancelled_request_gives_its_row_back_at_once(tiny_model):
    engine = Engine(tiny_model, rows=1)
    running = engine.submit(Request(prompt=[1], max_tokens=30, sampling=GREEDY))
    waiting = engine.submit(Request(prompt=[2], max_tokens=1, sampling=GREEDY))
    never = engine.submit(Request(prompt=[3], max_tokens=1, sampling=GREEDY))
    engine.step()
    engine.cancel(running)
    engine.cancel(never)
    assert [drawn.completion for drawn in engine.step()] == [waiting]
    assert [c.finish for c in (running, waiting, never)] == ["cancelled", "length", "cancelled"]
    engine.cancel(waiting)
    assert waiting.finish == "length"
    assert not engine.has_work


def test_the_models_own_operations_give_the_same_replies(tiny_model):
    numbers = range(15)
    native, plain = (Engine(tiny_model, rows=4, kernels=kernels) for kernels in ("native", "torch"))
    got, expected = (answers(engine, [engine.submit(request(n)) for n in numbers]) for engine in (native, plain))
    for one, other in zip(got, expected, strict=True):
        assert [token for token, _ in one[0]] == [token for token, _ in other[0]]
        assert one[2] == pytest.approx(other[2], abs=1e-4)
        assert [s.experts for _, s in one[0] if s] == [s.experts for _, s in other[0] if s]


def test_scores_are_the_models_own_whatever_was_drawn(tiny_model):
    engine = Engine(tiny_model, rows=1)
    warm = SamplingConfig(temperature=1.5, top_k=5, logit_bias={9: 3.0})
    ((told, ids, _, _, _),) = answers(
        engine, [engine.submit(Request(prompt=[4, 8], max_tokens=6, sampling=warm, top_logprobs=97))]
    )
    expected = tiny_model(torch.tensor([[4, 8, *ids[:-1]]]))[0, 1:].log_softmax(-1)
    for (token, scored), row in zip(told, expected, strict=True):
        assert scored.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [logprob for _, logprob in scored.top] == pytest.approx(
            row.sort(descending=True).values.tolist(), abs=1e-4
        )
        assert dict(scored.top)[token] == scored.logprob


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_prompts_are_as_likely_as_the_model_says_also_in_chunks_and_after_others_of_the_same_beginning(
    tiny_model, kernels
):
    def tool(token):  # its words are no prompt
        return [9, 9, 9] if token == said[0] else []

    prompt = [7, 7, 1, 9, 4, 2, 2, 30, 41, 5, 5, 60, 11, 12, 13, 14, 15, 16, 3]
    engine = Engine(tiny_model, rows=3, chunk=5, kernels=kernels)
    said = answers(engine, [engine.submit(Request(prompt=prompt, max_tokens=1, sampling=GREEDY))])[0][1]
    settings = {"max_tokens": 6, "sampling": GREEDY, "tool": tool}
    asked = [
        Request(prompt=prompt[:n], prompt_logprobs=top, **settings) for n, top in ((19, 97), (19, None), (9, 1), (1, 0))
    ]
    completions = [engine.submit(each) for each in asked]
    replies = [ids for _, ids, *_ in answers(engine, completions)]
    assert replies[0] == replies[1]
    for completion, each in zip(completions, asked, strict=True):
        places = range(1, len(each.prompt) if each.prompt_logprobs is not None else 1)
        expected = tiny_model(torch.tensor([each.prompt]))[0].log_softmax(-1)
        likely = [expected[place - 1, each.prompt[place]].item() for place in places]
        assert [told.logprob for told in completion.prompt_logprobs] == pytest.approx(likely, abs=1e-4)
        assert all(len(told.top) == each.prompt_logprobs for told in completion.prompt_logprobs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "expected a prompt of at least one token, got an empty one"),
        ({"prompt": [1] * 64}, "the prompt has 64 tokens, the model's context is 64 and a reply needs at least one"),
        ({"prompt": [97]}, "prompt ids must be from 0 to 96, got 97"),
        ({"prompt": [-1]}, "prompt ids must be from 0 to 96, got -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**63}, "seed must be from 0 to"),
        ({"sampling": SamplingConfig(logit_bias={97: 1.0})}, "logit_bias speaks of token 97, the model has 97 tokens"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(tiny_model, changes, message):
    engine = Engine(tiny_model, rows=1)
    with pytest.raises(ValueError, match=message):
        engine.submit(request(1, **changes))
    assert not engine.has_work
