"""Replies that were preferred to others teach a model which to give."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollm.bundle import WEIGHTS, Bundle, load_bundle, load_reference
from nanollm.data.order import sample_indices
from nanollm.generate.tools import check_tools, with_tools
from nanollm.kernels import attention as fused
from nanollm.model.lora import LoraConfig, add_lora
from nanollm.model.transformer import Transformer
from nanollm.progress import say
from nanollm.report.page import write_report
from nanollm.rl.preference import (
    PreferenceConfig,
    PreferenceSet,
    Seen,
    all_logprobs,
    encode_preferences,
    make_preference_batches,
    preference_loss,
    preference_metrics,
    reference_point,
    rewards_of,
    trained_tokens,
)
from nanollm.sources.datasets import preferences
from nanollm.sources.files import BadRecord
from nanollm.train.compile import SpeedConfig
from nanollm.train.optim import OptimConfig, lr_at
from nanollm.train.run import LoopConfig, Run, RunConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World

LogprobsOf = Callable[[Transformer, PreferenceSet], Tensor]

# What decides which numbers come out at which step; the rest (intervals, length, rates) may change on the way.
FIXED = ("seed", "objective", "train.batch_size", "optim.name", "lora", "inputs")


@dataclass(frozen=True, kw_only=True)
class PreferTrainConfig(LoopConfig):
    """How long, in which batches, and how often to look, log and save."""

    batch_size: int = 32
    """Pairs per optimizer step; with kto, replies."""
    micro_batch_size: int = 4
    """Rows per forward pass, counted as if each were as long as the model's context and shared by the replies that fit.
    Smaller takes less memory and gives the same step."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Learn from preferences: DPO, IPO, SimPO or KTO. The same command resumes an interrupted run."""

    bundle: Path
    """The model to start from: a bundle that can already reply, such as runs/demo/sft/bundle."""
    data: Path
    """File or folder of preferences, .jsonl lines {"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ...,
    "completion": ..., "label": true}, each text or a list of messages; or the rollouts of a run of nanollm grpo, such
    as runs/words-grpo/rollouts."""
    train: PreferTrainConfig
    """Length, batches and intervals."""
    objective: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss."""
    val_data: Path | None = None
    """The same, held out: rewards are measured on it at each validation; null: none."""
    reference: Path | None = None
    """Reference model; null: the bundle the run starts from."""
    tools: list[str] | None = None
    """Tools that wrote into the replies, such as calculator: what they wrote is not trained. null: those the model was
    trained with; none: no tools."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-4, warmup_steps=5, weight_decay=0.0, balance_rate=0.0)
    )
    """Optimizer and schedule. The routers' balancing is off: it would change the model without being asked."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """A low-rank adapter is trained instead of the model."""
    speed: SpeedConfig = field(default_factory=lambda: SpeedConfig(compile="off"))
    """What makes training fast, or small. Compiling is off: the shape of a step follows its replies, and every new
    shape would be compiled anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim.balance_weight:
            raise ValueError(
                f"optim.balance_weight has no effect on preferences, got {self.optim.balance_weight}; leave it at 0"
            )
        if self.reference is not None and self.objective.loss == "simpo":
            raise ValueError("simpo has no reference; leave --reference out, or choose another objective.loss")


def plan(c: Config) -> str:
    """What a run would do."""
    world = World.start(c.device, c.dtype)
    bundle, train, _ = _open(c)
    _open_reference(c, bundle, world)
    model, size = bundle.model.config, c.train.batch_size
    return (
        f"{model.total_parameters:,} parameters of {c.bundle} on {world.device} in {world.names['dtype']}, "
        f"{c.objective.loss}, {c.train.steps:,} steps x {size:,} = "
        f"{c.train.steps * size / len(train.examples):.2f} epochs of {describe(c.data, train)}"
    )


def run(c: Config) -> Path:
    """Train, and return the folder of the bundle."""
    with World.join(c.device, c.dtype, c.parallel) as world:
        bundle, train, validation = _open(c)
        reference = _open_reference(c, bundle, world)
        inputs = {
            "bundle": bundle.provenance["files"][WEIGHTS],
            "tokenizer": bundle.tokenizer.fingerprint,
            "data": train.fingerprint,
        }
        if reference is not None:
            inputs["reference"] = reference.provenance["files"][WEIGHTS]

        def make_state() -> TrainState:
            return TrainState.start(bundle.model.to(world.device), c.optim, world)

        with Run.open(c, c.train, world, inputs=inputs, fixed=FIXED, make_state=make_state) as run:
            state, model, kl = run.state, bundle.model.config, 0.0
            places = c.train.micro_batch_size * model.context_length
            is_masked = not fused.serves(*model.head_widths, world.dtype, world.device)
            batches_of = partial(make_preference_batches, max_places=places, is_masked=is_masked, ranks=world.size)
            logprobs_of = partial(all_logprobs, max_places=places, is_masked=is_masked, world=world)
            say(describe(c.data, train))
            if reference is not None:
                say("computing the log-probabilities of the reference, once")
                train = with_reference(train, reference.model, logprobs_of)
                validation = validation and with_reference(validation, reference.model, logprobs_of)
                reference = None  # one model stays in memory
            if run.is_new:
                run.log(validate(c, state, validation, logprobs_of))
            for step in run.steps():
                chosen = sample_indices(step, c.train.batch_size, len(train.examples), c.seed).tolist()
                if train.mismatched:
                    kl = reference_point(state, [*world.shard(batches_of(train.mismatched, chosen))], world)
                batches, seen = [*world.shard(batches_of(train, chosen))], list[Seen]()
                loss_of = partial(preference_loss, c=c.objective, kl=kl, seen=seen, recompute=c.speed.recompute)
                stats = train_step(state, batches, loss_of, lr_at(step, c.train.steps, c.optim), c.optim, world)
                metrics = preference_metrics(seen, c.objective, world) | ({"kl": kl} if train.mismatched else {})
                tokens = sum(trained_tokens(reply) for number in chosen for reply in train.examples[number])
                run.record(stats, {f"examples of {c.data}": chosen}, metrics=metrics, tokens=tokens)
                if run.due(c.train.validate_every):
                    run.log(validate(c, state, validation, logprobs_of))
            facts: dict[str, Any] = {"examples_seen": state.step * c.train.batch_size, "parent": bundle.provenance}
            facts |= {"tools": bundle.tools}
            folder = run.save_bundle("prefer", model, bundle.tokenizer, (c.lora, c.bundle), **facts)
            write_report(c.out, world)
            return folder


def with_reference(known: PreferenceSet, model: Transformer, logprobs_of: LogprobsOf) -> PreferenceSet:
    """The same with the log-probabilities of the reference beside the replies."""
    mismatched = known.mismatched and with_reference(known.mismatched, model, logprobs_of)
    return replace(known, reference=logprobs_of(model, known), mismatched=mismatched)


def validate(
    c: Config, state: TrainState, validation: PreferenceSet | None, logprobs_of: LogprobsOf
) -> dict[str, object]:
    """Rewards of what is held out."""
    if validation is None:
        return {}
    logprobs, is_chosen = logprobs_of(state.whole_model(), validation), validation.is_chosen
    tokens = torch.tensor([trained_tokens(reply) for example in validation.examples for reply in example])
    rewards = rewards_of(logprobs, validation.reference, tokens, c.objective)
    metrics = preference_metrics([(rewards, logprobs, is_chosen)], c.objective, World())
    shown = "rewards/accuracies" if c.objective.is_paired else "rewards/margins"
    say(f"step {state.step:,}: {shown} {metrics[shown]:.3f} on {len(validation.examples):,} held-out examples")
    return {f"val_{name}": value for name, value in metrics.items()}


def describe(data: Path, known: PreferenceSet) -> str:
    """What is learned from, and what is not."""
    return f"{data}: {len(known.examples):,} examples" + (f"; {known.notes}" if known.notes else "")


def _open(c: Config) -> tuple[Bundle, PreferenceSet, PreferenceSet | None]:
    """The bundle, and what is trained on and what is held out, as its ids."""
    bundle = with_tools(load_bundle(c.bundle), c.tools)
    add_lora(bundle.model, c.lora, c.seed)
    tools, context_length = check_tools(bundle.tools, bundle.tokenizer), bundle.model.config.context_length

    def refuse(bad: BadRecord) -> None:
        raise ValueError(str(bad))

    def read(data: Path) -> PreferenceSet:
        return encode_preferences(preferences([data], refuse), c.objective, bundle.tokenizer, tools, context_length)

    return bundle, read(c.data), None if c.val_data is None else read(c.val_data)


def _open_reference(c: Config, bundle: Bundle, world: World) -> Bundle | None:
    """The reference model; simpo has none."""
    if c.objective.loss == "simpo":
        return None
    return load_reference(c.reference or c.bundle, bundle, world.dtype, world.device)
