"""decoding.cpp computes what the model computes, and a row's answer is the same, bit for bit, in any company."""

import dataclasses
import platform

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants

from nanollm.generate import cpu_runner as native
from nanollm.generate.cpu_runner import NativeRunner
from nanollm.generate.request import PromptChunk, ScheduledBatch
from nanollm.generate.runner import TorchRunner, open_runner
from nanollm.generate.sampling import SamplingConfig, sample
from nanollm.kernels import build
from nanollm.kernels.build import NoCompilerError
from nanollm.model import int4
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised

ROWS, LENGTH = 4, 64
SHAPES = {
    "tiny": TINY,
    # Sizes that fill vectors and panels, twelve heads, top-1, no normalising: as in the presets.
    "preset": ModelConfig(
        vocab_size=200,
        context_length=64,
        d_model=64,
        n_blocks=4,
        n_heads=12,
        q_lora_rank=32,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        d_ff=160,
        n_routed_experts=2,
        n_shared_experts=2,
        experts_per_token=1,
        d_expert=96,
        norm_topk_prob=False,
        routed_scaling_factor=1.5,
    ),
}


def model_of(shape, dtype=torch.float32):
    model = randomised(Transformer(SHAPES[shape]).init(3)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def prefill(*pieces):
    """A batch of these (row, start, ids) or (row, start, ids, adapter), each to its prompt's end."""
    chunks = [PromptChunk(row, start, np.array(ids), True, *adapter) for row, start, ids, *adapter in pieces]
    return ScheduledBatch(chunks, *np.empty((4, 0), dtype=np.int64))


def decode(*rows):
    """A batch of the last token of rows (row, token, position) or (row, token, position, adapter)."""
    return ScheduledBatch([], *np.array([(*row, -1)[:4] for row in rows], dtype=np.int64).T)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def talk(runner):
    """A little of everything: three prompts, one of them in two pieces, then replies; all answers."""
    first = PromptChunk(1, 0, np.array(prompt(30, 2)[:9]), False)
    mixed = ScheduledBatch([first], np.array([0, 2]), np.array([5, 6]), np.array([37, 1]), np.array([-1, -1]))
    answers = [
        runner.run(prefill((0, 0, prompt(37)), (2, 0, prompt(1, 1)))),
        runner.run(mixed),
        runner.run(prefill((1, 9, prompt(30, 2)[9:]))),
        *(runner.run(decode((2, 7 + step, 2 + step), (0, 8, 38 + step), (1, 9, 30 + step))) for step in range(6)),
    ]
    return torch.cat([seen.logits for seen in answers]), np.concatenate([seen.experts for seen in answers])


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_it_computes_what_the_model_computes(shape):
    model = model_of(shape)
    expected, expected_experts = talk(TorchRunner(model, ROWS, LENGTH))
    got, experts = talk(NativeRunner(model, ROWS, LENGTH, LENGTH))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (experts == expected_experts).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "quantize", "tolerance"), [("bfloat16", "none", 0.05), ("float32", "int8", 0.05)])
@torch.inference_mode()
def test_smaller_types_come_close(shape, dtype, quantize, tolerance):
    expected, _ = talk(TorchRunner(model_of(shape), ROWS, LENGTH))
    got, _ = talk(NativeRunner(model_of(shape, getattr(torch, dtype)), ROWS, LENGTH, LENGTH, quantize))
    # A choice of experts near a tie may turn; the logits as a whole must not move.
    assert (got - expected).square().mean().sqrt() < tolerance * expected.std()


@torch.inference_mode()
def test_int4_computes_what_the_model_with_the_weights_of_q4_0_computes():
    model = model_of("preset")
    runner = NativeRunner(model, ROWS, LENGTH, LENGTH, "int4")
    for name, parameter in model.named_parameters():
        if int4.is_int4(name, parameter) and name != "trunk.embed.weight":  # whose rows are looked up
            blocks = gguf_quants.quantize(parameter.numpy(), GGMLQuantizationType.Q4_0)
            parameter.copy_(torch.tensor(gguf_quants.dequantize(blocks, GGMLQuantizationType.Q4_0)))
    (expected, chosen), (got, experts) = talk(TorchRunner(model, ROWS, LENGTH, LENGTH)), talk(runner)
    assert (experts == chosen).all()
    assert (got - expected).square().mean().sqrt() < 0.02 * expected.std()  # what bfloat16 activations are off


@torch.inference_mode()
def test_int4_of_a_model_trained_for_it_has_the_weights_of_its_bfloat16():
    model = model_of("preset")
    for name, parameter in model.named_parameters():
        parameter.copy_(int4.rounded(name, parameter))
    model.to(torch.bfloat16)
    (expected, _), (got, _) = (talk(NativeRunner(model, ROWS, LENGTH, LENGTH, each)) for each in ("none", "int4"))
    assert (got - expected).square().mean().sqrt() < 0.01 * expected.std()


KINDS = [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int8")]
CASES = [*((shape, *kind) for shape in SHAPES for kind in KINDS), ("preset", torch.bfloat16, "int4")]


@pytest.mark.parametrize(("shape", "dtype", "quantize"), CASES, ids=str)
@torch.inference_mode()
def test_company_pieces_and_reuse_change_no_bit(shape, dtype, quantize):
    model = model_of(shape, dtype)
    ids = prompt(41)

    def runner():
        return NativeRunner(model, 40, LENGTH, 512, quantize)

    alone = runner()
    expected = [alone.run(prefill((3, 0, ids))), alone.run(decode((3, 11, 41))), alone.run(decode((3, 12, 42)))]

    crowded = runner()
    others = [(row, 0, prompt(3 + row % 11, row)) for row in range(40) if row != 3]
    got = [crowded.run(prefill(*others[:17], (3, 0, ids), *others[17:]))]
    for step, token in enumerate((11, 12)):
        rows = [(row, step, 3 + row % 11 + step) for row in range(40) if row != 3]
        got.append(crowded.run(decode(*rows[:30], (3, token, 41 + step), *rows[30:])))
    places = [17, 30, 30]
    for seen, place, right in zip(got, places, expected, strict=True):
        assert torch.equal(seen.logits[place], right.logits[0])
        assert (seen.experts[place] == right.experts[0]).all()

    for cuts in ([1], [40], [7, 8, 30], [13, 26, 39]):
        pieced = runner()
        for start, end in zip([0, *cuts], [*cuts, 41], strict=True):
            seen = pieced.run(prefill((0, start, ids[start:end])))
        assert torch.equal(seen.logits, expected[0].logits)
        pieced.copy(0, [5], 33)
        assert torch.equal(pieced.run(prefill((5, 33, ids[33:]))).logits, expected[0].logits)
        assert torch.equal(pieced.run(decode((5, 11, 41))).logits, expected[1].logits)


@torch.inference_mode()
def test_the_number_of_threads_changes_no_bit():
    model = model_of("preset", torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            answers.append(talk(NativeRunner(model, ROWS, LENGTH, LENGTH))[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


OLDER = [
    pytest.param("x86-64-v2", marks=pytest.mark.slow),  # takes the same lines of decoding.cpp as the next
    pytest.param("x86-64-v3", marks=pytest.mark.long),  # 30 s, most of them the compiler's
    pytest.param(
        "x86-64-v4",
        marks=pytest.mark.skipif(
            not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="this processor has no AVX-512"
        ),
    ),
]


@pytest.fixture
def older_processor(monkeypatch, request):
    """The library compiled without what this processor can do beyond that level."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("names levels of x86 processors")
    monkeypatch.setattr(native, "OPTIONS", (*native.OPTIONS, f"-march={request.param}"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.parametrize("older_processor", OLDER, indirect=True)
@pytest.mark.usefixtures("older_processor")
def test_older_processors_keep_the_promises():
    for shape in SHAPES:
        test_it_computes_what_the_model_computes(shape)
        test_smaller_types_come_close(shape, "bfloat16", "none", 0.05)
        test_smaller_types_come_close(shape, "float32", "int8", 0.05)
    for case in CASES:
        test_company_pieces_and_reuse_change_no_bit(*case)
    test_int4_computes_what_the_model_with_the_weights_of_q4_0_computes()


@torch.inference_mode()
def test_the_weights_are_those_of_the_moment():
    model = model_of("tiny")
    runner = NativeRunner(model, 1, LENGTH, LENGTH)
    before = runner.run(prefill((0, 0, prompt(9)))).logits
    for parameter in model.parameters():
        parameter.mul_(1.5)
    assert torch.equal(runner.run(prefill((0, 0, prompt(9)))).logits, before)


def test_the_cache_holds_latents_only():
    model = model_of("preset", torch.bfloat16)
    c = model.config
    assert NativeRunner(model, 3, 20, 64).cache_bytes == 3 * 20 * c.n_blocks * (c.kv_lora_rank + c.qk_rope_head_dim) * 2


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_the_model_itself_runs_and_says_so(capsys):
    model = model_of("tiny")
    with pytest.raises(NoCompilerError, match="no-such-compiler failed"):
        native.library()
    assert isinstance(open_runner(model, 1, 8, 8), TorchRunner)
    assert "decoding runs on PyTorch's operations, several times slower" in capsys.readouterr().err
    with pytest.raises(ValueError, match="quantize int8 and kernels native need the compiled forward pass"):
        open_runner(model, 1, 8, 8, quantize="int8")


def test_the_compiler_may_come_with_options_and_the_cache_may_not_be_writable(monkeypatch, tmp_path):
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setenv("CXX", "c++ -O1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # no folder
    assert build.load(source).answer() == 42


def test_what_the_library_cannot_do_runs_on_the_model_and_is_said(capsys):
    half = model_of("tiny", torch.float16)
    assert isinstance(open_runner(half, 1, 8, 8), TorchRunner)
    assert "several times slower: it computes in float32 or bfloat16, the model in float16" in capsys.readouterr().err
    odd = Transformer(dataclasses.replace(TINY, d_ff=73)).init(0)
    assert isinstance(open_runner(odd, 1, 8, 8), TorchRunner)
    with pytest.raises(ValueError, match="it needs even sizes"):
        open_runner(odd, 1, 8, 8, kernels="native")
    with pytest.raises(ValueError, match="quantize int8 needs kernels native, got torch"):
        open_runner(half, 1, 8, 8, quantize="int8", kernels="torch")
    odd = "but d_model is 40, q_lora_rank is 28, d_ff is 73, d_expert is 24, n_heads x v_head_dim is 48; int8 takes any"
    with pytest.raises(ValueError, match=f"int4 needs widths that 32 divides, {odd}"):
        open_runner(Transformer(dataclasses.replace(TINY, d_ff=73)), 1, 8, 8, quantize="int4")


@pytest.mark.parametrize("share", [None, 0.5, 0.002])
def test_tokens_are_drawn_as_pytorchs_operations_draw_them(rng, share):
    """Among all, among half, and among so few that float32 holds none of their weights."""
    logits = torch.randn(500, 777, generator=rng) * 3  # a group of 64 is not full
    logits[:, 5] = -torch.inf
    logits[:100, 1:] = -torch.inf  # all probability on one token
    logits[100:200, :-1] = -torch.inf
    logits[200:300] *= 100  # most probabilities are 0 in float32
    numbers, allowed = torch.rand(500, generator=rng), None
    if share is not None:
        may = torch.rand(500, 832, generator=rng) < share  # 777 in multiples of 64
        may[:, 0] = may[:, 776] = True
        allowed = np.packbits(may.numpy(), axis=1, bitorder="little")
    for temperature in (1.0, 0.7, 1.9, 0.0):
        ids, logprobs = native.draw(logits, temperature, numbers, range(500), allowed)
        expected, theirs = sample(logits, SamplingConfig(temperature=temperature), numbers, allowed=allowed)
        assert (ids != expected).sum() <= 1  # where rounding decides
        assert allowed is None or may[range(500), ids].all()
        same = ids == expected
        torch.testing.assert_close(logprobs[same], theirs[same], atol=1e-5, rtol=1e-5)


def test_no_number_draws_what_has_no_probability():
    below_one = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    logits = torch.full((4, 300), -torch.inf)
    logits[:, [70, 140, 141, 260]] = torch.tensor([0.0, -80.0, -95.0, 0.0])  # the third is 0 in float32, as in exp()
    ids, logprobs = native.draw(logits, 1.0, below_one, range(4))
    assert ids.tolist() == [70, 70, 260, 260]  # the second is lost in a sum of 2
    torch.testing.assert_close(logprobs[[0, 1, 3]], torch.tensor(0.5).log().expand(3))


def test_a_drawn_row_depends_on_itself_alone(rng):
    logits, numbers = torch.randn(9, 1000, generator=rng), torch.rand(9, generator=rng)
    ids, logprobs = native.draw(logits, 1.0, numbers, range(9))
    for row in range(9):
        alone = native.draw(logits, 1.0, numbers[row : row + 1], [row])
        assert torch.equal(alone[0], ids[row : row + 1])
        assert torch.equal(alone[1], logprobs[row : row + 1])


@pytest.mark.parametrize("vocab", [300, 320])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_logits_that_are_no_numbers_are_refused(vocab, value):
    with pytest.raises(ValueError, match="the model's logits are not numbers"):
        native.draw(torch.full((2, vocab), value), 1.0, torch.tensor([0.2, 0.7]), range(2))
