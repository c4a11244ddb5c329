"""A teacher's distributions teach a smaller model of the same vocabulary, on given texts or on its own replies."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from nanollm.bundle import WEIGHTS, Bundle, load_reference
from nanollm.config import check_at_least
from nanollm.data.batches import ChatShards, Conversations, Fetcher, TextShards, Windows
from nanollm.data.order import Mixture
from nanollm.data.shards import Shards, Verification, read_manifest
from nanollm.generate.tools import tool_caller
from nanollm.kernels import attention as fused
from nanollm.model.lora import LoraConfig, add_lora
from nanollm.report.page import write_report
from nanollm.rl.distill import CreditName, logits_loss, on_policy_loss
from nanollm.rl.grpo import Collector, make_micro_batches, open_sampler
from nanollm.rl.loss import ObjectiveConfig, RolloutBatch
from nanollm.rl.reward import RewardConfig, Rewards
from nanollm.rl.rollout import RolloutConfig, rollout_metrics
from nanollm.sources.environments import MakeEnvironment
from nanollm.sources.tasks import TaskConfig, environments_of
from nanollm.stages.grpo import fingerprint, open_problems, validate
from nanollm.text.chat import Marks
from nanollm.train.compile import SpeedConfig
from nanollm.train.optim import OptimConfig, lr_at
from nanollm.train.run import LoopConfig, Run, RunConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World

FIXED = (
    *("seed", "mode", "credit", "ce_weight", "task", "train.batch_size", "optim.name", "lora", "inputs"),
    *(f"rollout.{name}" for name in ("prompts", "group_size", "max_tokens", "temperature", "tools")),
)


@dataclass(frozen=True, kw_only=True)
class DistillTrainConfig(LoopConfig):
    """How long, in which batches, and how often to look, log and save."""

    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    batch_size: int = 32
    """logits: conversations, or windows of documents, per optimizer step."""
    micro_batch_size: int = 4
    """Rows per forward pass, counted as if each were as long as the model's context. Smaller takes less memory and
    gives the same step."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Distill a teacher into a student of the same vocabulary: on the student's own replies, or on given texts. The
    same command resumes an interrupted run."""

    bundle: Path
    """The student to start from."""
    teacher: Path
    """The bundle to learn from; its tokenizer must be the student's."""
    train: DistillTrainConfig
    """Length, batches and intervals."""
    mode: Literal["on_policy", "logits"] = "on_policy"
    """on_policy: the student replies to the task's problems, and the teacher scores every token: reverse KL (GKD,
    arXiv:2306.13649). logits: forward KL to the teacher's distributions on the texts of `data` (arXiv:1503.02531)."""
    data: Path | None = None
    """logits: folder of token files, as nanollm preprocess makes it: conversations, of which the replies are learned,
    or documents."""
    ce_weight: float = 0.0
    """logits: share of the next-token loss in the mixture with the divergence; both at rollout.temperature."""
    credit: CreditName = "token"
    """on_policy: token: each token answers for the divergence where it was drawn; reply: also for that of all later
    tokens, which is the gradient of KL between whole replies and varies more (MiniLLM, arXiv:2306.08543)."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Problems for replies, and for validation."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(resample=0))
    """on_policy: how replies are sampled. Its temperature divides the logits of student and teacher in both modes."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=3e-4, warmup_steps=5, weight_decay=0.0, balance_rate=0.0)
    )
    """Optimizer and schedule."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """A low-rank adapter is trained instead of the model."""
    validation_problems: int = 200
    """Problems of the task that are solved greedily at each validation, from the end of the test split (0: none)."""
    speed: SpeedConfig = field(default_factory=lambda: SpeedConfig(compile="off"))
    """What makes training fast, or small. Compiling is off: the shape of a step follows its replies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "validation_problems")
        if not 0 <= self.ce_weight < 1:
            raise ValueError(f"ce_weight must be from 0 to below 1 (1 is nanollm sft), got {self.ce_weight}")
        if (self.data is None) == (self.mode == "logits"):
            raise ValueError(
                f"mode logits needs --data, a folder of token files, and mode on_policy learns from replies alone; got "
                f"mode {self.mode} and data {self.data}"
            )
        if self.mode == "on_policy" and self.ce_weight:
            raise ValueError(f"ce_weight has no effect in mode on_policy, got {self.ce_weight}; leave it at 0")
        if self.mode == "logits" and self.credit != "token":
            raise ValueError(f"credit has no effect in mode logits, got {self.credit}; leave it out")
        if self.optim.balance_weight:
            raise ValueError(
                f"optim.balance_weight has no effect on a divergence, got {self.optim.balance_weight}; leave it at 0"
            )
        if self.rollout.resample:
            raise ValueError(f"distill replaces no groups, got rollout.resample {self.rollout.resample}; leave it at 0")
        if self.rollout.server:
            raise ValueError(f"distill samples by its own engine, got rollout.engine {self.rollout.engine}")


def plan(c: Config) -> str:
    """What a run would do."""
    world = World.start(c.device, c.dtype)
    bundle, _, problems, validation = open_problems(c.bundle, c.task, c.rollout, c.validation_problems)
    teacher, shards = open_teacher(c, bundle, world), open_texts(c, bundle, world)
    prompts = min(c.rollout.prompts, len(problems))
    of = f"{prompts} of {len(problems):,} problems x {c.rollout.group_size} replies"
    return (
        f"{bundle.model.config.total_parameters:,} parameters of {c.bundle} learn from the "
        f"{teacher.model.config.total_parameters:,} of {c.teacher} on {world.device} in {world.names['dtype']}, "
        f"{c.train.steps:,} steps x {of if shards is None else f'{c.train.batch_size} texts of {c.data}'}; "
        f"{len(validation):,} problems for validation"
    )


Draw = Callable[[int], tuple[Sequence[Any], dict[str, object], dict[str, object]]]
"""The number of a step to the micro-batches of this rank, what they were made of, and metrics."""


def run(c: Config) -> Path:
    """Train, and return the folder of the bundle."""
    with World.join(c.device, c.dtype, c.parallel) as world, ExitStack() as stack:
        bundle, task, problems, validation = open_problems(c.bundle, c.task, c.rollout, c.validation_problems)
        add_lora(bundle.model, c.lora, c.seed)
        teacher, shards = open_teacher(c, bundle, world), open_texts(c, bundle, world)
        if shards is not None and c.rollout.tools is None:
            bundle = replace(bundle, tools=read_manifest(shards.folder)[0].get("tools", bundle.tools))
        inputs = {
            "bundle": bundle.provenance["files"][WEIGHTS],
            "teacher": teacher.provenance["files"][WEIGHTS],
            "tokenizer": bundle.tokenizer.fingerprint,
            **({"problems": fingerprint(problems)} if shards is None else {"data": shards.fingerprint}),
        }

        def make_state() -> TrainState:
            return TrainState.start(bundle.model.to(world.device), c.optim, world)

        run = stack.enter_context(Run.open(c, c.train, world, inputs=inputs, fixed=FIXED, make_state=make_state))
        state, limit = run.state, c.rollout.max_tokens
        scored: dict[str, Any] = {"teacher": teacher.model, "temperature": c.rollout.temperature}
        scored |= {"recompute": c.speed.recompute}
        if shards is None:
            rewards = stack.enter_context(Rewards(RewardConfig(), task, limit))
            collector = Collector(
                problems=problems,
                tokenizer=bundle.tokenizer,
                rewards=rewards,
                c=c.rollout,
                context_length=bundle.model.config.context_length,
                seed=c.seed,
                world=world,
            )
            draw = from_replies(c, state, bundle, collector, environments_of(task))
            loss_of = partial(on_policy_loss, credit=c.credit, **scored)
        else:
            draw = from_texts(c, bundle, shards, world)
            loss_of = partial(logits_loss, ce_weight=c.ce_weight, **scored)
        if run.is_new:
            run.log(validate(state, bundle, task, validation, limit, world))
        for step in run.steps():
            batches, names, metrics = draw(step)
            stats = train_step(state, batches, loss_of, lr_at(step, c.train.steps, c.optim), c.optim, world)
            run.record(stats, names, metrics=metrics)
            if run.due(c.train.validate_every):
                run.log(validate(state, bundle, task, validation, limit, world))
        facts: dict[str, Any] = {"parent": bundle.provenance, "teacher": teacher.provenance, "tools": bundle.tools}
        folder = run.save_bundle("distill", bundle.model.config, bundle.tokenizer, (c.lora, c.bundle), **facts)
        write_report(c.out, world)
        return folder


def from_texts(c: Config, bundle: Bundle, shards: Shards, world: World) -> Draw:
    """Conversations or windows of documents, in a fresh random order each epoch."""
    context = bundle.model.config.context_length
    source: Conversations | Windows
    if shards.has_flags:
        source = Conversations([ChatShards(shards, context, Marks.of(bundle.tokenizer))], Mixture([1.0]), c.seed)
    else:
        source = Windows([TextShards(shards, context)], Mixture([1.0]), c.seed)
        source.check(c.train.batch_size, c.train.micro_batch_size, world.size)
    fetch = Fetcher(source, c.train.batch_size, c.train.micro_batch_size, world)
    return lambda step: (fetch(step), source.names(step, c.train.batch_size), {})


def from_replies(
    c: Config, state: TrainState, bundle: Bundle, collector: Collector, environment: MakeEnvironment | None
) -> Draw:
    """The student's own replies to problems; the reward only tells how many are right."""
    model, world, tool = bundle.model.config, collector.world, tool_caller(bundle)
    is_masked = not fused.serves(*model.head_widths, world.dtype, world.device)

    def draw(step: int) -> tuple[Sequence[RolloutBatch], dict[str, object], dict[str, object]]:
        started = time.perf_counter()
        sample = open_sampler(state, bundle.tokenizer, collector.c, None, world, tool, environment)
        graded, counts = collector.collect(step, sample)
        metrics: dict[str, object] = {"reward": fmean(total for group in graded for total in group.totals)}
        metrics |= rollout_metrics(graded) | counts | {"rollout_s": time.perf_counter() - started}
        metrics["faults"] = collector.take_faults().total()
        batches = make_micro_batches(
            graded,
            torch.ones(len(graded), c.rollout.group_size),  # every reply teaches
            ObjectiveConfig(),
            c.rollout.max_tokens,
            c.train.micro_batch_size * model.context_length,
            is_masked=is_masked,
            ranks=world.size,
        )
        return list(world.shard(batches)), {"problems": [each.group.problem.question for each in graded]}, metrics

    return draw


def open_teacher(c: Config, bundle: Bundle, world: World) -> Bundle:
    """The teacher, which must read and predict the student's own ids, over as long a context."""
    teacher = load_reference(c.teacher, bundle, world.dtype, world.device, "teacher")
    if (own := bundle.model.config.vocab_size) != (other := teacher.model.config.vocab_size):
        raise ValueError(f"the teacher predicts {other:,} tokens, the student {own:,}; take one of the same vocab_size")
    own, other = bundle.model.config.context_length, teacher.model.config.context_length
    if other < own:
        raise ValueError(f"the teacher's context of {other:,} tokens is shorter than the student's, {own:,}")
    teacher.model.eval().requires_grad_(False)
    return teacher


def open_texts(c: Config, bundle: Bundle, world: World) -> Shards | None:
    """The token files of mode logits; None: the student's replies are learned from."""
    if c.data is None:
        return None
    verify: Verification = "sha256" if world.is_main else "size"  # all ranks read the same files
    return Shards.open(c.data, "train", tokenizer_fingerprint=bundle.tokenizer.fingerprint, verify=verify)
