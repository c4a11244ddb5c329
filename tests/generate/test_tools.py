"""A tool's words stand in a reply as if the model had been given them, in a crowd as alone."""

import pytest
import torch

from nanollm.generate.engine import Engine, generate
from nanollm.generate.request import Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.tools import ToolCaller, check_tools

GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[5, 9, 3, 44, 7, 60, 2], [11], [8, 8, 1]]


def every_third():
    """A tool by ids: after each third sampled token it adds two or more, which depend on it."""
    told = []

    def tool(token):
        told.append(token)
        return [] if len(told) % 3 else [(token + 1) % 60, *range(len(told) // 3), 7]

    return tool


def slowly(model, prompt, max_tokens, tool):
    """Read everything anew for each token, and append what the tool says."""
    ids, is_sampled = [], []
    while len(ids) < max_tokens:
        with torch.no_grad():
            token = model(torch.tensor([[*prompt, *ids]]))[0, -1].argmax().item()
        given = tool(token)
        ids += [token, *given]
        is_sampled += [True] + [False] * len(given)
    return ids[:max_tokens], is_sampled[:max_tokens]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_replies_are_those_of_a_slow_loop_that_decodes_one_by_one(tiny_model, kernels):
    engine = Engine(tiny_model, rows=2, kernels=kernels)
    requests = [Request(prompt=p, max_tokens=20, sampling=GREEDY, tool=every_third()) for p in [*PROMPTS, PROMPTS[0]]]
    completions, streamed = [engine.submit(request) for request in requests], {}
    while engine.has_work:
        for output in engine.step():
            streamed.setdefault(id(output.completion), []).extend([output.token, *output.given])
    for prompt, completion in zip([*PROMPTS, PROMPTS[0]], completions, strict=True):
        expected = slowly(tiny_model, prompt, 20, every_third())
        assert (completion.ids, completion.is_sampled) == expected
        assert streamed[id(completion)] == completion.ids
        assert [bool(logprob) for logprob in completion.logprobs] == completion.is_sampled
        assert completion.finish == "length"


def test_logprobs_are_those_of_one_full_pass_over_all_that_stands_there(tiny_model):
    plain = SamplingConfig(temperature=1.0)
    (completion,) = generate(
        tiny_model, [PROMPTS[0]], plain, max_tokens=20, stop_token_ids=frozenset(), tool=every_third
    )
    with torch.no_grad():
        logits = tiny_model(torch.tensor([PROMPTS[0] + completion.ids]))[0, len(PROMPTS[0]) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
    is_sampled = torch.tensor(completion.is_sampled)
    torch.testing.assert_close(torch.tensor(completion.logprobs)[is_sampled], expected[is_sampled], atol=1e-5, rtol=0)


def test_more_than_there_is_room_for_is_cut_and_the_reply_ends(tiny_model):
    (completion,) = generate(
        tiny_model, [[1]], GREEDY, max_tokens=9, stop_token_ids=frozenset(), tool=lambda: lambda token: [3] * 100
    )
    assert completion.ids[1:] == [3] * 8
    assert completion.finish == "length"
    (completion,) = generate(
        tiny_model,
        [list(range(60))],
        GREEDY,
        max_tokens=50,
        stop_token_ids=frozenset(),
        tool=lambda: lambda token: [3] * 100,
    )
    assert len(completion.ids) == 5  # as without a tool: the context is full


def test_a_stop_function_is_told_the_tools_words_too(tiny_model):
    (completion,) = generate(
        tiny_model,
        [[1]],
        GREEDY,
        max_tokens=30,
        stop_token_ids=frozenset(),
        tool=every_third,
        stop=lambda: lambda token: token == 7,
    )
    assert completion.finish == "stop"
    assert completion.ids[-1] == 7


def test_a_caller_spells_what_its_tools_add(tokenizer):
    (calculator,) = check_tools(["calculator"], tokenizer)
    caller, given = ToolCaller([calculator], tokenizer), []
    for token in tokenizer.encode("He has 5*3=<<5*3="):
        given.append(caller(token))
    assert given[-1] == tokenizer.encode("15>>")
    assert not any(given[:-1])
    assert not caller(tokenizer.encode("=")[0])


def test_a_tool_that_is_not_known_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="calculator, python, got 'clock'"):
        check_tools(["clock"], tokenizer)
