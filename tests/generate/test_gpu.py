"""On a GPU: a captured step answers as the same operations one by one, and logits are float32."""

import pytest
import torch

from nanollm.generate import runner
from nanollm.generate.engine import Engine
from nanollm.model.transformer import Transformer
from tests.generate.test_engine import CHOICES, answers, request
from tests.model.conftest import randomised
from tests.train.test_gpu import SHAPE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ASKED = [request(number, sampling=CHOICES[number % 2], top_logprobs=None) for number in range(24)]
ASKED += [request(number, max_tokens=30) for number in range(24)]


def told():
    model = randomised(Transformer(SHAPE).init(0)).eval().to("cuda", torch.bfloat16)
    engine = Engine(model, rows=8, chunk=40)
    return engine.runner, answers(engine, [engine.submit(each) for each in ASKED])


def test_a_captured_step_answers_as_one_that_is_not(monkeypatch):
    if not runner.can_capture(Transformer(SHAPE).to("cuda", torch.bfloat16)):
        pytest.skip("only Hopper and Blackwell capture a Mixture of Experts")
    captured, got = told()
    assert any(step.graph is not None for step in captured.steps.values())
    monkeypatch.setattr(runner, "can_capture", lambda model: False)
    plain, expected = told()
    assert all(step.graph is None for step in plain.steps.values())
    assert [each[1] for each in got] == [each[1] for each in expected]
    for own, other in zip(got, expected, strict=True):
        assert own[2] == pytest.approx(other[2], abs=0.02)


@torch.inference_mode()
def test_logits_are_not_rounded_to_bfloat16():
    own, _ = told()
    hidden = torch.randn(5, SHAPE.d_model, device="cuda").bfloat16()
    exact = hidden.double() @ own.model.head.weight.double().T
    torch.testing.assert_close(own._logits(hidden), exact.float(), atol=1e-4, rtol=1e-4)
    assert own._logits(hidden[:0]).shape == (0, SHAPE.vocab_size)
