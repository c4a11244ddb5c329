"""A model's own replies to problems teach it to solve them."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from nanollm.bundle import WEIGHTS, Bundle, build_model, load_bundle, load_reference
from nanollm.config import check_at_least
from nanollm.evals.problems import accuracy
from nanollm.export.dense_to_moe import STORED
from nanollm.extras import require
from nanollm.generate.tools import tool_caller, with_tools
from nanollm.kernels import attention as fused
from nanollm.model.lora import LoraConfig, add_lora
from nanollm.progress import say
from nanollm.report.page import write_report
from nanollm.rl.grpo import Collector, SignalWatch, make_micro_batches, open_sampler, split_groups, update_policy
from nanollm.rl.loss import ObjectiveConfig, group_advantages
from nanollm.rl.reward import RewardConfig, Rewards
from nanollm.rl.rollout import RolloutConfig, policy_metrics, rollout_metrics, save_rollouts
from nanollm.rl.vllm import VllmServer
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import Task, TaskConfig, environments_of, open_task
from nanollm.train.compile import SpeedConfig
from nanollm.train.optim import OptimConfig, lr_at
from nanollm.train.run import LoopConfig, Run, RunConfig
from nanollm.train.state import TrainState
from nanollm.world import World

FINGERPRINTED = 100

# What decides which numbers come out at which step; the rest (intervals, length, rates) may change on the way.
FIXED = (
    *("seed", "task", "reward.weights", "reward.soft_tokens", "objective", "optim.name", "lora", "inputs"),
    *(f"rollout.{name}" for name in ("prompts", "group_size", "max_tokens", "temperature", "resample", "tools")),
)
IMPORTANCE_CAP = 2.0
"""Where another engine samples."""


@dataclass(frozen=True, kw_only=True)
class GrpoTrainConfig(LoopConfig):
    """How long, in which batches, and how often to look, log and save."""

    log_every: int = 1
    """Steps between two lines of metrics.jsonl; each line has the numbers of its own step."""
    micro_batch_size: int = 8
    """Rows per forward pass of training, counted as if each were as long as the model's context; with short replies,
    rows are narrower and a pass takes more of them."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Group-relative policy optimization (arXiv:2402.03300): sample a group of replies to each problem and reinforce
    those that beat the average of their group. The same command resumes an interrupted run."""

    bundle: Path
    """The model to start from: a bundle that can already reply, such as runs/demo/sft/bundle."""
    train: GrpoTrainConfig
    """Length, micro-batches and intervals; a step samples once."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Problems and who judges the replies."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How replies are sampled."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a reply is rewarded for."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """How rewards become a gradient."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=3e-4, warmup_steps=5, weight_decay=0.0, balance_rate=0.0)
    )
    """Optimizer and schedule. The routers' balancing is off: it would change the model without being asked."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """A low-rank adapter is trained instead of the model."""
    reference: Path | None = None
    """Reference model of the KL term, for objective.beta; null: the bundle the run starts from."""
    validation_problems: int = 200
    """Problems that are solved greedily at each validation: taken from the end of the test split, because nanollm eval
    takes the first (0: none)."""
    speed: SpeedConfig = field(default_factory=lambda: SpeedConfig(compile="off"))
    """What makes training fast, or small. Compiling is off: the shape of a step follows its replies, and every new
    shape would be compiled anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "length" in self.reward.weights and self.reward.soft_tokens > self.rollout.max_tokens:
            raise ValueError(
                f"reward.soft_tokens must be at most rollout.max_tokens ({self.rollout.max_tokens}), "
                f"got {self.reward.soft_tokens}"
            )
        check_at_least(0, self, "validation_problems")
        if (size := self.rollout.group_size) < 2:
            raise ValueError(f"rollout.group_size must be at least 2, as grpo compares a problem's replies, got {size}")
        if self.optim.balance_weight:
            raise ValueError(
                f"optim.balance_weight has no effect on replies, got {self.optim.balance_weight}; leave it at 0"
            )
        if self.reference is not None and not self.objective.beta:
            raise ValueError("a reference without objective.beta has no effect; set --objective.beta or leave it out")
        if self.objective.importance_cap is None:
            cap = IMPORTANCE_CAP if self.rollout.server else 0.0
            object.__setattr__(self, "objective", replace(self.objective, importance_cap=cap))


def plan(c: Config) -> str:
    """What a run would do."""
    world = World.start(c.device, c.dtype)
    bundle, task, problems, validation = open_problems(c.bundle, c.task, c.rollout, c.validation_problems)
    add_lora(bundle.model, c.lora, c.seed)
    _open_reference(c, bundle, world)
    Rewards(c.reward, task, c.rollout.max_tokens)  # finds a path that leads nowhere
    prompts = min(c.rollout.prompts, len(problems))
    replies = c.train.steps * prompts * c.rollout.group_size
    return (
        f"{bundle.model.config.total_parameters:,} parameters of {c.bundle} on {world.device} in "
        f"{world.names['dtype']}, {c.train.steps:,} steps x {prompts} of {len(problems):,} problems x "
        f"{c.rollout.group_size} replies of at most {c.rollout.max_tokens} tokens = {replies:,} "
        f"replies; {len(validation):,} problems for validation"
    )


def run(c: Config) -> Path:
    """Train, and return the folder of the bundle."""
    with World.join(c.device, c.dtype, c.parallel) as world, ExitStack() as stack:
        bundle, task, problems, validation = open_problems(c.bundle, c.task, c.rollout, c.validation_problems)
        add_lora(bundle.model, c.lora, c.seed)
        reference = _open_reference(c, bundle, world)
        rewards = stack.enter_context(Rewards(c.reward, task, c.rollout.max_tokens))
        inputs = {
            "bundle": bundle.provenance["files"][WEIGHTS],
            "tokenizer": bundle.tokenizer.fingerprint,
            "problems": fingerprint(problems),
        }
        if reference is not None:
            inputs["reference"] = reference.provenance["files"][WEIGHTS]

        def make_state() -> TrainState:
            return TrainState.start(bundle.model.to(world.device), c.optim, world)

        run = stack.enter_context(Run.open(c, c.train, world, inputs=inputs, fixed=FIXED, make_state=make_state))
        state, model, watch = run.state, bundle.model.config, SignalWatch()
        server = _connect(c, bundle, task, state, world)
        collector = Collector(
            problems=problems,
            tokenizer=bundle.tokenizer,
            rewards=rewards,
            c=c.rollout,
            context_length=model.context_length,
            seed=c.seed,
            world=world,
        )
        tools, environment = tool_caller(bundle), environments_of(task)
        sampler = partial(open_sampler, state, bundle.tokenizer, c.rollout, server, world, tools, environment)
        if run.is_new:
            run.log(validate(state, bundle, task, validation, c.rollout.max_tokens, world))
        for step in run.steps():
            started = time.perf_counter()
            graded, counts = collector.collect(step, sampler())
            sampled = time.perf_counter()
            rewards_of_groups = torch.tensor([group.totals for group in graded])  # (P, G)
            advantages = group_advantages(rewards_of_groups, c.objective.advantage)  # (P, G)
            record = c.out / "rollouts" / f"step-{step + 1:08d}.jsonl"
            if world.is_main:
                save_rollouts(record, graded, advantages)
            faults = collector.take_faults()
            watch.see(step, graded, faults)
            mini_batches = [
                make_micro_batches(
                    *part,
                    c.objective,
                    c.rollout.max_tokens,
                    c.train.micro_batch_size * model.context_length,
                    is_masked=not fused.serves(*model.head_widths, world.dtype, world.device),
                    ranks=world.size,
                )
                for part in split_groups(graded, advantages, c.objective.mini_batches)
            ]
            stats, seen = update_policy(
                state,
                mini_batches,
                c.objective,
                c.rollout.temperature,
                lr_at(step, c.train.steps, c.optim),
                c.optim,
                world,
                None if reference is None else reference.model,
                recompute=c.speed.recompute,
            )
            reward = rewards_of_groups.mean().item()
            metrics = {"reward": reward} | rollout_metrics(graded) | counts | {"faults": faults.total()}
            metrics |= policy_metrics(seen)
            metrics |= {"rollout_s": sampled - started, "train_s": time.perf_counter() - sampled}
            run.record(
                stats,
                {"replies of": record.as_posix()},
                metrics=metrics,
                tokens=sum(len(rollout.reply_ids) for each in graded for rollout in each.group.rollouts),
                note=f"reward {reward:.3f}",
            )
            if run.due(c.train.validate_every):
                run.log(validate(state, bundle, task, validation, c.rollout.max_tokens, world))
        replies = state.step * min(c.rollout.prompts, len(problems)) * c.rollout.group_size
        facts = {"replies_seen": replies, "parent": bundle.provenance, "tools": bundle.tools}
        folder = run.save_bundle("grpo", model, bundle.tokenizer, (c.lora, c.bundle), **facts)
        write_report(c.out, world)
        return folder


def validate(
    state: TrainState, bundle: Bundle, task: Task, problems: Sequence[Problem], max_tokens: int, world: World
) -> dict[str, object]:
    """Greedy accuracy on problems of the split test."""
    if not problems:
        return {}
    model, tool = state.whole_model(), tool_caller(bundle)
    score = accuracy(model, bundle.tokenizer, task, problems, max_tokens=max_tokens, tool=tool, world=world)
    interval = f"{score.low:.1%} to {score.high:.1%}"
    say(f"step {state.step:,}: solves {score.value:.1%} of {score.n} test problems ({interval})")
    ends = {"val_accuracy_low": score.low, "val_accuracy_high": score.high}
    return {"val_accuracy": score.value, **ends, "val_accuracy_n": score.n}


def fingerprint(problems: Sequence[Problem]) -> str:
    """sha256 of how many problems there are and of the first hundred questions and answers."""
    numbers = range(min(FINGERPRINTED, len(problems)))
    first = [(each.question, each.answer) for each in map(problems.__getitem__, numbers)]
    return sha256(repr((len(problems), first)).encode()).hexdigest()


def open_problems(
    start: Path, task_config: TaskConfig, rollout: RolloutConfig, validation_problems: int
) -> tuple[Bundle, Task, Sequence[Problem], Sequence[Problem]]:
    """The bundle to start from, the task, its problems to train on and those to validate on."""
    bundle, task = with_tools(load_bundle(start), rollout.tools), open_task(task_config)
    room = bundle.model.config.context_length - rollout.max_tokens
    if room < 1:
        raise ValueError(
            f"rollout.max_tokens of {rollout.max_tokens} leaves no room for a question in the context of "
            f"{bundle.model.config.context_length} tokens; take a smaller one"
        )
    test = task.problems("test") if validation_problems else []
    validation = [test[-number] for number in range(1, min(validation_problems, len(test)) + 1)]
    return bundle, task, task.problems("train"), validation


def export_for_vllm(bundle: Bundle, dtype: torch.dtype, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a bundle with these weights in the place of its own into an empty folder, as vLLM reads it."""
    require("a vLLM server for rollouts", ("gguf", "huggingface_hub", "tokenizers", "transformers"), "export")
    from nanollm.export.folder import write_export  # late: only this engine needs the packages

    model = build_model(bundle.model.config)
    model.load_state_dict({name: tensor.detach().cpu() for name, tensor in weights.items()}, assign=True)
    write_export(folder, replace(bundle, model=model.eval()), "deepseek-v3", STORED[dtype], name="")


def _connect(c: Config, bundle: Bundle, task: Task, state: TrainState, world: World) -> VllmServer | None:
    """The server that samples, held to what the run needs; none where our own engine does."""
    if c.rollout.server is None:
        return None
    if environments_of(task):
        raise ValueError(
            f"a vLLM server cannot hold the conversations of task.name {c.task.name}; leave --rollout.engine"
        )
    if bundle.tools:
        raise ValueError(
            f"a vLLM server cannot use the tools of {c.bundle} ({', '.join(bundle.tools)}); "
            f"set --rollout.tools none, or leave --rollout.engine to our own"
        )
    host, port = c.rollout.server
    server = VllmServer(
        host=host,
        port=port,
        folder=c.out / "vllm",
        config=bundle.model.config,
        tokenizer=bundle.tokenizer,
        dtype=str(world.dtype).removeprefix("torch."),
        export=partial(export_for_vllm, bundle, world.dtype),
    )
    weights = state.bundle_weights(keep=world.is_main)
    if world.is_main:
        server.connect(weights, c.rollout)
    return server


def _open_reference(c: Config, bundle: Bundle, world: World) -> Bundle | None:
    """The reference model; none without objective.beta, nor where it is the model under an adapter."""
    if not c.objective.beta or (c.reference is None and c.lora.rank is not None):
        return None
    return load_reference(c.reference or c.bundle, bundle, world.dtype, world.device)
