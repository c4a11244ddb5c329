"""What is said of a step that nobody has taken holds for those that were taken."""

import dataclasses
import math

import pytest
import torch

from benchmarks import plan
from nanollm.bundle import build_model
from nanollm.model import fused
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.settings import load_preset
from nanollm.train import optim
from nanollm.train.forecast import (
    Layout,
    cache_bytes_per_token,
    choose,
    good_batch_size,
    hidden_matrices,
    layouts,
    least_memory,
    memory_of,
    orthogonalise_flops,
    step_s,
    tokens_beside_weights,
    tokens_per_s,
    wires_s,
    work_of,
)
from nanollm.train.machines import GPUS, PER_HOST, Machine
from nanollm.train.memory import kept_bytes_per_token

H200 = GPUS["h200"]


def preset(name: str) -> ModelConfig:
    return ModelConfig(**load_preset("model", name))


# --- held to what was measured ---


def recorded():
    record = plan.newest("*-cores_plan.json")
    return [pytest.param(facts, record["roof"], id=name) for name, facts in record["cases"].items()]


MISSED = {  # the page says so, too: relative tolerances of memory and of time
    "nano-5m, 16 sequences": (0.13, 0.2),
    "nano-1m, 32 sequences": (0.21, 0.2),
    "nano-20m, 1 sequences": (0.1, 0.24),
    "nano-20m, 4 sequences, float32": (0.11, 0.2),
}


@pytest.mark.parametrize(("facts", "roof"), recorded())
def test_memory_is_said_within_a_tenth_and_time_within_a_fifth_of_every_measured_step_but_four(facts, roof, request):
    within, within_time = MISSED.get(request.node.callspec.id, (0.1, 0.2))
    rate, peak = plan.predicted(plan.Case(**facts["case"]), roof)
    assert peak == pytest.approx(facts["peak_gb"]["median"], rel=within)
    assert rate == pytest.approx(facts["tokens_per_s"]["median"], rel=within_time)


def test_what_was_measured_on_a_gpu_is_said_as_nearly():
    for what, said, taken in plan.gpu_points():
        assert said == pytest.approx(taken, rel=0.1 if what.startswith("GB") else 0.2), what


def test_the_page_has_the_tables_of_the_records():
    assert f"{plan.BEGIN}\n{plan.section()}\n{plan.END}" in plan.PAGE.read_text(encoding="utf-8")


def test_the_rates_were_fitted_to_two_presets_and_looked_at_on_others():
    assert {case.preset for case in plan.FITTED} == {"nano-5m", "nano-60m"}
    assert {"nano-1m", "nano-20m", "nano-327m"} <= {case.preset for case in plan.CHECKED}


# --- work ---


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (8, 24), (24, 8)])
def test_the_operations_of_muon_are_those_of_its_products(shape):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        optim.orthogonalise(torch.ones(3, *shape), torch.float32)
    assert 3 * orthogonalise_flops(*sorted(shape)) == counter.get_total_flops()


def test_muons_matrices_are_those_that_the_optimizer_gets():
    c = preset("nano-20m")
    parameters = dict(build_model(c).named_parameters())
    in_muon = sum(p.numel() for name, p in parameters.items() if optim.is_hidden_matrix(name, p))
    assert sum(count * math.prod(shape) for shape, count in hidden_matrices(c).items()) == in_muon


def test_a_step_of_several_micro_batches_updates_once_and_calls_every_block_in_each():
    c = preset("nano-5m")
    whole, split = (work_of(c, H200, Layout(sequences=8 // n, micro_batches=n), "muon") for n in (1, 4))
    assert split.flops == whole.flops
    assert (whole.calls, split.calls) == (c.n_blocks, 4 * c.n_blocks)
    assert split.moved > whole.moved


def test_computing_the_blocks_again_takes_a_third_more_of_them_and_less_memory():
    c = preset("nano-327m")
    plain, again = (Layout(sequences=4, micro_batches=1, recompute=flag) for flag in (False, True))
    head = 6 * c.vocab_size * c.d_model
    tokens = 4 * c.context_length
    flops = [work_of(c, H200, layout, "adamw").flops - tokens * head for layout in (plain, again)]
    assert flops[1] == pytest.approx(4 / 3 * flops[0])
    assert memory_of(c, H200, again, "adamw").total < memory_of(c, H200, plain, "adamw").total / 1.5


def test_a_machine_twice_as_fast_in_everything_is_twice_as_fast_but_for_its_calls():
    c, layout = preset("nano-327m"), Layout(sequences=16, micro_batches=1)
    assert H200.tflops and H200.gb_per_s
    faster = dataclasses.replace(H200, tflops=2 * H200.tflops, gb_per_s=2 * H200.gb_per_s)
    slow, fast = step_s(c, H200, layout, "muon"), step_s(c, faster, layout, "muon")
    calls = 2 * fast - slow
    assert 0 < calls < 0.1 * slow


# --- several processes ---


def test_wires_are_those_of_the_scaling_page():
    from benchmarks import scaling_table

    c = preset("nano-327m")
    for gpus, parallel, rows in ((8, "ddp", 16), (8, "fsdp", 16), (64, "hsdp", 16), (64, "ddp", 4)):
        layout = Layout(sequences=rows, micro_batches=1, processes=gpus, parallel=parallel)
        expected = scaling_table.wires(gpus, parallel, 1, scaling_table.NETWORK)
        assert wires_s(c, H200, layout) == pytest.approx(expected, rel=1e-3)


def test_more_processes_are_faster_together_and_slower_each():
    c = preset("nano-327m")
    rates = [
        tokens_per_s(c, H200, Layout(sequences=16, micro_batches=1, processes=n, parallel=mode), "muon")
        for n, mode in ((1, "ddp"), (8, "ddp"), (64, "hsdp"))
    ]
    assert rates == sorted(rates)
    assert rates[0] > rates[1] / 8 > rates[2] / 64 > 0.7 * rates[0]


def test_fsdp_divides_what_is_remembered_and_keeps_the_gradients_of_several_micro_batches_whole():
    c = preset("nano-327m")
    whole, parts, several = (
        memory_of(c, H200, Layout(sequences=4, micro_batches=n, processes=8, parallel=mode), "muon")
        for n, mode in ((1, "ddp"), (1, "fsdp"), (2, "fsdp"))
    )
    assert parts.optimizer == whole.optimizer // 8
    assert parts.weights == 4 * c.total_parameters // 8 + 2 * c.total_parameters
    assert several.kept_gradients == 4 * c.total_parameters
    assert parts.kept_gradients == 0


# --- what is chosen ---


def test_a_layout_that_is_chosen_fits_and_makes_up_the_step():
    for name, memory in (("h100", 80), ("t4", 16)):
        layout = choose(preset("nano-327m"), GPUS[name], 256, 1, "muon")
        assert layout is not None
        assert layout.batch_size == 256
        assert memory_of(preset("nano-327m"), GPUS[name], layout, "muon").total < 0.95 * memory * 1e9


def test_blocks_are_computed_again_only_where_nothing_else_fits():
    c = dataclasses.replace(preset("nano-327m"), context_length=8192)
    small, large = (choose(c, dataclasses.replace(H200, memory=memory * 10**9), 8, 1, "muon") for memory in (10, 80))
    assert small is not None and small.recompute
    assert large is not None and not large.recompute


def test_fsdp_is_chosen_where_no_gpu_holds_the_model_alone():
    c = dataclasses.replace(preset("nano-327m"), n_blocks=200)  # 3 billion parameters
    assert choose(c, GPUS["rtx4090"], 8, 1, "muon") is None
    together = choose(c, GPUS["rtx4090"], 8, 8, "muon")
    assert together is not None and together.parallel == "fsdp"
    alone = choose(preset("nano-327m"), GPUS["rtx4090"], 8, 8, "muon")
    assert alone is not None and alone.parallel == "ddp"


def test_the_least_memory_is_just_enough():
    c = preset("nano-60m")
    least = least_memory(c, H200, 4, 1, "muon")
    enough, short = (dataclasses.replace(H200, memory=least + more) for more in (10, -10))
    assert choose(c, enough, 4, 1, "muon") is not None
    assert choose(c, short, 4, 1, "muon") is None


def test_every_layout_is_a_division_of_the_step():
    found = list(layouts(48, 16))
    assert {layout.batch_size for layout in found} == {48}
    assert {layout.sequences for layout in found} == {1, 3}
    assert {layout.parallel for layout in found} == {"ddp", "fsdp", "hsdp"}
    assert all(layout.parts == {"ddp": 1, "fsdp": 16, "hsdp": PER_HOST}[layout.parallel] for layout in found)


def test_the_step_to_begin_with_is_that_of_the_recipes():
    assert good_batch_size(preset("nano-327m"), 9e9) * 2048 == 524_288
    assert good_batch_size(preset("nano-327m"), 9e9, processes=8) == 256
    assert good_batch_size(preset("nano-20m"), 7e6) == 4
    assert good_batch_size(preset("nano-1m"), 1) == 1


# --- serving ---


def test_tokens_of_the_cache_fill_what_the_weights_leave():
    c = preset("nano-327m")
    assert cache_bytes_per_token(c, 2) == 12_800
    machine = Machine(name="8 GB", kind="cuda", memory=8_000_000_000)
    tokens = tokens_beside_weights(c, machine, 2)
    assert tokens == (machine.usable - 2 * c.total_parameters) // 12_800
    assert tokens_beside_weights(c, dataclasses.replace(machine, memory=10**9), 2) == 0


# --- the memory that is built on ---


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's own compiler
def test_what_compiled_blocks_keep_is_predicted_within_5_percent(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(fused, "serves", lambda *_: False)  # as on a GPU
    values = load_preset("model", "nano-327m") | {
        "vocab_size": 512,
        "n_blocks": 2,
        "moe_every": 2,
        "context_length": 128,
    }
    c = ModelConfig(**values)
    model = Transformer(c).init(0).to(torch.bfloat16)
    for block in model.trunk.blocks:
        block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    tokens = torch.randint(c.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.trunk(tokens)
    torch.compiler.reset()
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 128
    # On a CPU the routed experts are not compiled, and keep two of the three widths.
    expected = kept_bytes_per_token(c, 2, is_compiled=True) - 2 * c.n_moe_blocks * c.experts_per_token * c.d_expert
    assert expected == pytest.approx(measured, rel=0.05)
