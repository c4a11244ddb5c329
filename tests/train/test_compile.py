"""What makes training fast or small computes the same."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from nanollm.data.batches import Batch
from nanollm.model.cache import LatentCache
from nanollm.model.transformer import Transformer
from nanollm.train import compile
from nanollm.train.compile import SpeedConfig, compile_blocks, fastest_attention, missing_for_compiling
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World
from tests.model.conftest import TINY, randomised

CPU = torch.device("cpu")
SMALL = dataclasses.replace(TINY, n_blocks=6, moe_every=3)


def some_batch(rng, rows: int = 2, tokens: int = 16) -> Batch:
    ids = torch.randint(SMALL.vocab_size, (rows, tokens + 1), generator=rng)
    return Batch(ids[:, :-1], ids[:, 1:])


def gradients(model: Transformer, batch: Batch, balance_weight: float = 0.0, **options: bool) -> list[Tensor]:
    model.zero_grad()
    loss, _ = next_token_loss(model, batch, balance_weight, **options)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.fixture
def compiling(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if missing := missing_for_compiling(CPU):
        pytest.skip(f"torch.compile needs {missing}")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def check_that_compiled_equals_eager(rng: torch.Generator, *, is_packed: bool = False) -> None:
    eager = randomised(Transformer(SMALL).init(0)).train()
    model, batch = copy.deepcopy(eager), some_batch(rng)
    if is_packed:
        positions = torch.tensor([[*range(9), *range(7)], [*range(3), *range(12), 0]])
        batch = dataclasses.replace(batch, positions=positions)
    compile_blocks(model, SpeedConfig(compile="on"), CPU)
    for got, expected in zip(gradients(model, batch), gradients(eager, batch), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():
        for length in range(1, 12):  # a cache, whose shapes change with each token, is for eager blocks
            cache = LatentCache.empty(SMALL, rows=2, length=32)
            model(batch.tokens[:, :length], cache=cache)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 7, "one of a dense block, six around the experts of a sparse one, however many blocks there are"


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # of torch's own compiler
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_compiled_model_equals_an_eager_one_and_blocks_of_a_kind_are_compiled_once(rng, monkeypatch, is_packed):
    compile_block = torch.nn.Module.compile
    # Everything but the last step, which takes a minute: graphs, their gradients, decompositions.
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda block, **how: compile_block(block, backend="aot_eager_decomp_partition", **how),
    )
    check_that_compiled_equals_eager(rng, is_packed=is_packed)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's own compiler
@pytest.mark.usefixtures("compiling")
def test_so_does_one_compiled_to_machine_code(rng):
    check_that_compiled_equals_eager(rng)


@pytest.mark.parametrize("balance_weight", [0.0, 0.1])
def test_computing_again_gives_the_bits_of_keeping(rng, balance_weight):
    model, batch = randomised(Transformer(SMALL).init(0)).train(), some_batch(rng)
    kept = gradients(model, batch, balance_weight)
    assert all(map(torch.equal, gradients(model, batch, balance_weight, recompute=True), kept))


def test_a_step_that_computes_again_balances_the_routers_alike():
    steps = []
    for recompute in (False, True):
        state = TrainState.start(Transformer(SMALL).init(0), OptimConfig(), World())
        batch = some_batch(torch.Generator().manual_seed(0))
        loss_of = partial(next_token_loss, balance_weight=0.1, recompute=recompute)
        stats = train_step(state, [batch], loss_of, 1e-3, OptimConfig(), World())
        steps.append((stats, [layer.balance_bias for layer in state.model.moe_layers()]))
    (kept, kept_biases), (again, biases) = steps
    assert again == kept
    assert all(map(torch.equal, biases, kept_biases))


def test_computing_again_keeps_a_fraction(rng):
    batch, kept = some_batch(rng, rows=4, tokens=64), {}
    for recompute in (False, True):
        model = Transformer(SMALL).init(0).train()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            model.trunk.routed(batch.tokens, recompute=recompute)
        kept[recompute] = sum(sizes)
    assert kept[True] < kept[False] / 4


def test_nothing_is_compiled_on_a_cpu_unless_asked(monkeypatch):
    model = Transformer(SMALL)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    for choice in ("auto", "off"):
        compile_blocks(model, SpeedConfig(compile=choice), CPU)


def test_compiling_without_a_compiler_is_refused_when_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compile.build, "find_compiler", list)
    with pytest.raises(ValueError, match=r"speed.compile on needs a C\+\+ compiler .*; install it, or take"):
        compile_blocks(Transformer(SMALL), SpeedConfig(compile="on"), CPU)
    compile_blocks(Transformer(SMALL), SpeedConfig(), torch.device("cuda"))
    assert "training without torch.compile, more slowly: it needs" in capsys.readouterr().err


def test_a_compiler_that_is_not_there_is_none(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler: no-such-compiler, which CXX names, is not there"):
        compile_blocks(Transformer(SMALL), SpeedConfig(compile="on"), CPU)


def test_attention_on_a_cpu_is_chosen_as_ever():
    with fastest_attention(CPU):
        assert torch.backends.cuda.math_sdp_enabled()
