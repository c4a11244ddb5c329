"""Replies per second that GRPO samples and learns from, beside TRL's GRPOTrainer.

A step is rollout and update: 8 prompts of 28 to 36 tokens, 8 replies of exactly 64 tokens to each (no side may end one
early), every one of them trained; no divergence from a reference, one update. About 11 million parameters:
    TRL, same model     transformers' Glm4MoeLiteForCausalLM, which computes what our model does, with the same weights
    TRL, Llama          a LlamaForCausalLM of as many parameters, with which TRL is faster
    nanollm             a step of `nanollm grpo`, in this machine's compute type
    nanollm, 256        the same with 32 prompts
TRL generates with transformers (vLLM needs a GPU) without gradient checkpointing, its weights in bfloat16 without
float32 masters: the fastest of what runs on a CPU. --tried measures bfloat16 autocast and float32, too. The reward is a
sum of what was written and costs nothing; no two replies earn the same, so no group is left out. Both sides' gradients
for the same replies are compared first, in float32.
"""

import argparse
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.measuring import in_turns, matmul_roof, model_shapes, spread_of, tell

if TYPE_CHECKING:
    import torch

    from nanollm.model.config import ModelConfig
    from nanollm.rl.grpo import Collector
    from nanollm.sources.gsm8k import Problem
    from nanollm.text.tokenizer import Tokenizer
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState

VOCAB, CONTEXT = 8192, 256
PROMPTS, GROUP, REPLY = 8, 8, 64
SHORTEST, LONGEST = 28, 36  # tokens of a prompt
PROBLEMS = 256
RATE = 1e-5
ROWS = 32  # of CONTEXT places: all replies of the smaller step are learned from at once, as TRL does
REWARDS = 1009  # a prime number of different ones
TOLERANCE = 1e-3  # of the gradient's norm, in float32


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tried", action="store_true", help="measure TRL's slower compute types, too: one step each")
    parser.add_argument("--only_ours", action="store_true", help="without TRL")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from nanollm.world import World

    c, dtype = shape(), World.start().dtype
    tokenizer = small_tokenizer()
    problems = list(islice(fitting_problems(tokenizer), PROBLEMS))
    with TemporaryDirectory() as name:
        folder = Path(name)
        ours = {
            "nanollm": Ours.start(c, tokenizer, problems, PROMPTS, folder),
            "nanollm, 256": Ours.start(c, tokenizer, problems, 4 * PROMPTS, folder),
        }
        checks: dict[str, Any] = {}
        theirs: dict[str, Theirs] = {}
        if not options.only_ours:
            checks |= gradients_of_the_same_replies(c, tokenizer, problems, folder)
            tell(f"gradients differ by {checks['gradient_difference']:.2g} of their norm")
            theirs = {f"TRL, {name}": Theirs(name, "bfloat16", c, tokenizer, problems, folder) for name in PEERS}
        sides = theirs | ours
        try:
            facts = in_turns(
                {name: side.replies_per_s for name, side in sides.items()},
                options.repeats,
                roof={"matmul_gflop_per_s": lambda: matmul_roof(model_shapes(c, 6144), dtype)},
                warm_up=True,
            )
            tried = other_types(c, tokenizer, problems, folder) if options.tried and theirs else {}
        finally:
            for side in theirs.values():
                side.close()
    return {
        "unit": "replies/s",
        **facts,
        **({"to_Llama": to_llama(facts)} if theirs else {}),
        "seconds": {
            name: {
                "rollout": spread_of([each.rollout_s for each in side.steps[1:]]),  # without the warm-up
                "update": spread_of([each.update_s for each in side.steps[1:]]),
            }
            for name, side in sides.items()
        },
        **({"TRL in other types, replies/s": tried} if tried else {}),
        "parameters": {name: side.parameters for name, side in sides.items()},
        "checks": checks | {name: check_of(side) for name, side in sides.items()},
    }


def to_llama(facts: dict[str, Any]) -> dict[str, Any]:
    """Ours over TRL with its faster model, turn by turn."""
    base = facts["sides"]["TRL, Llama"]["values"]
    return {
        name: spread_of([own / their for own, their in zip(facts["sides"][name]["values"], base, strict=True)])
        for name in ("nanollm", "nanollm, 256")
    }


def other_types(
    c: "ModelConfig", tokenizer: "Tokenizer", problems: "Sequence[Problem]", folder: Path
) -> dict[str, dict[str, float]]:
    """TRL's speed in float32 and with autocast, one step after a first one."""
    tried: dict[str, dict[str, float]] = {}
    for peer in PEERS:
        for dtype in ("autocast", "float32"):
            side = Theirs(peer, dtype, c, tokenizer, problems, folder)
            try:
                side.replies_per_s()
                tried.setdefault(f"TRL, {peer}", {})[dtype] = side.replies_per_s()
            finally:
                side.close()
            tell(f"TRL, {peer}, {dtype}: {tried[f'TRL, {peer}'][dtype]:.3g} replies/s")
    return tried


# --- what both sides have in common ---


@dataclass(frozen=True)
class Step:
    """What one step did."""

    replies: int
    trained_tokens: float
    rollout_s: float
    update_s: float
    groups_dropped: float
    grad_norm: float
    engine_difference: float | None = None  # mean |trainer - engine| log-probability


def check_of(side: "Ours | Theirs") -> dict[str, Any]:
    """That every step, the warm-up too, wrote and trained what it should."""
    last = side.steps[-1]
    return {
        "replies": last.replies,
        "trained_tokens": last.trained_tokens,
        "all_trained": all(
            each.trained_tokens == each.replies * REPLY and not each.groups_dropped for each in side.steps
        ),
        "grad_norm": last.grad_norm,
        **({} if last.engine_difference is None else {"engine_logprob_difference": last.engine_difference}),
    }


def shape() -> "ModelConfig":
    """nano-5m's family, 11 million parameters."""
    from nanollm.config import load_preset
    from nanollm.model.config import ModelConfig

    changes = {"vocab_size": VOCAB, "context_length": CONTEXT, "d_model": 256, "d_ff": 704, "d_expert": 352}
    return ModelConfig(**load_preset("model", "nano-5m") | changes | {"kv_lora_rank": 128})


def small_tokenizer() -> "Tokenizer":
    from nanollm.sources import builtin
    from nanollm.text.train_tokenizer import Sample, train_on

    return train_on(Sample([text.encode() for text in builtin.documents()], 0), vocab_size=VOCAB, model_type="bpe")


def fitting_problems(tokenizer: "Tokenizer") -> "Iterator[Problem]":
    """Generated problems whose prompts are about as long."""
    from nanollm.rl.rollout import prompt_of
    from nanollm.sources.tasks import TaskConfig, open_task

    for problem in open_task(TaskConfig(name="words", levels=[1])).problems("train"):
        if SHORTEST <= len(prompt_of(problem, tokenizer)) <= LONGEST:
            yield problem


# --- ours ---


@dataclass(frozen=True)
class Ours:
    """Steps of `nanollm grpo`, as stages/grpo.py takes them."""

    state: "TrainState"
    collector: "Collector"
    folder: Path
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def start(
        cls, c: "ModelConfig", tokenizer: "Tokenizer", problems: "Sequence[Problem]", prompts: int, folder: Path
    ) -> "Ours":
        from nanollm.model.transformer import Transformer
        from nanollm.rl.grpo import Collector
        from nanollm.rl.rollout import RolloutConfig
        from nanollm.train.state import TrainState
        from nanollm.world import World

        world = World.start()
        collector = Collector(
            problems=problems,
            tokenizer=tokenizer,
            rewards=sum_of_letters(),
            c=RolloutConfig(prompts=prompts, group_size=GROUP, max_tokens=REPLY),
            context_length=CONTEXT,
            seed=0,
            world=world,
        )
        state = TrainState.start(Transformer(c).init(0).to(world.device), optim(), world)
        return cls(state, collector, folder / f"rollouts-{prompts}")

    @property
    def parameters(self) -> int:
        return self.state.model.config.total_parameters

    def replies_per_s(self) -> float:
        import torch

        from nanollm.kernels import attention as fused
        from nanollm.rl.grpo import make_micro_batches, open_sampler, update_policy
        from nanollm.rl.loss import ObjectiveConfig, group_advantages
        from nanollm.rl.rollout import policy_metrics, save_rollouts

        state, collector, world = self.state, self.collector, self.collector.world
        objective, replies = ObjectiveConfig(advantage="std"), collector.c.prompts * GROUP  # TRL's defaults
        is_masked = not fused.serves(*state.model.config.head_widths, world.dtype, world.device)
        started = time.perf_counter()
        with never_ending():
            sample = open_sampler(state, collector.tokenizer, collector.c, None, world)
            graded, _ = collector.collect(len(self.steps), sample)
        sampled = time.perf_counter()
        advantages = group_advantages(torch.tensor([group.totals for group in graded]), objective.advantage)
        save_rollouts(self.folder / f"step-{len(self.steps)}.jsonl", graded, advantages)
        batches = make_micro_batches(graded, advantages, objective, REPLY, ROWS * CONTEXT, is_masked=is_masked)
        stats, seen = update_policy(state, [batches], objective, 1.0, RATE, optim(), world)
        done = time.perf_counter()
        assert stats is not None
        self.steps.append(
            Step(
                replies,
                stats.count,  # what the loss was divided by: the mean is over tokens
                sampled - started,
                done - sampled,
                sum(not each.has_signal for each in graded),
                stats.grad_norm,
                policy_metrics(seen)["sampling/sampling_logp_difference/mean"],
            )
        )
        return replies / (done - started)


def optim() -> "OptimConfig":
    from nanollm.train.optim import OptimConfig

    return OptimConfig(name="adamw", lr=RATE, weight_decay=0.0, balance_rate=0.0)


def sum_of_letters() -> Any:
    """Rewards that cost nothing and are hardly ever equal within a group."""
    from nanollm.rl.reward import Judged, Reward, RewardConfig, Rewards
    from nanollm.sources.tasks import TaskConfig, open_task

    class SumOfLetters(Rewards):
        def __call__(self, judged: Sequence[Judged]) -> list[Reward]:
            return [Reward(float(sum(map(ord, reply.text)) % REWARDS), {}) for _, reply in judged]

    return SumOfLetters(RewardConfig(), open_task(TaskConfig(name="words")), REPLY)


@contextmanager
def never_ending() -> Iterator[None]:
    """Replies of the full length: no token ends one. (TRL is told the same with min_new_tokens.)"""
    with mock.patch("nanollm.rl.rollout.reply_ends", lambda tokenizer: frozenset()):
        yield


# --- TRL ---


PEERS = ("same model", "Llama")


class Theirs:
    """A GRPOTrainer that takes one step when it is asked to: its own loop runs in a thread and waits in between."""

    def __init__(
        self,
        peer: str,
        dtype: str,
        c: "ModelConfig",
        tokenizer: "Tokenizer",
        problems: "Sequence[Problem]",
        folder: Path,
    ) -> None:
        self.trainer = trainer_of(peer, dtype, c, tokenizer, problems, folder)
        self.trainer.add_callback(waiting_callback(self))
        self.parameters = sum(p.numel() for p in self.trainer.model.parameters())
        self.steps: list[Step] = []
        self.asked, self.done, self.is_over = threading.Semaphore(0), threading.Semaphore(0), False
        self.problem: BaseException | None = None
        self.rollout_s = self.elapsed = 0.0
        generate = self.trainer._generate_single_turn

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            generated = generate(*arguments, **options)
            self.rollout_s = time.perf_counter() - started
            return generated

        self.trainer._generate_single_turn = timed
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def replies_per_s(self) -> float:
        self.asked.release()
        self.done.acquire()
        if self.problem is not None:
            raise self.problem
        log, replies = self.trainer.state.log_history[-1], PROMPTS * GROUP
        self.steps.append(
            Step(
                replies,
                replies * float(log["completions/mean_length"]),
                self.rollout_s,
                self.elapsed - self.rollout_s,
                float(log["frac_reward_zero_std"]),
                float(log["grad_norm"]),
            )
        )
        return replies / self.elapsed

    def close(self) -> None:
        self.is_over = True
        self.asked.release()
        self.thread.join()

    def _run(self) -> None:
        try:
            self.trainer.train()
        except StopAsking:
            return
        except BaseException as problem:  # told to the thread that waits
            self.problem = problem
        self.done.release()


def waiting_callback(side: Theirs) -> Any:
    """Lets a trainer's loop begin a step when the side is asked for one, and tells when its numbers are there."""
    from transformers import TrainerCallback

    class Waiting(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            side.asked.acquire()
            if side.is_over:
                raise StopAsking
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            side.elapsed = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            side.done.release()  # comes after the step's end

    return Waiting()


class StopAsking(Exception):
    """Ends a trainer's loop before its next step."""


def trainer_of(
    peer: str, dtype: str, c: "ModelConfig", tokenizer: "Tokenizer", problems: "Sequence[Problem]", folder: Path
) -> Any:
    """dtype: bfloat16 or float32 weights, or autocast: float32 weights, bfloat16 products."""
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from nanollm.export.tokenizer_json import write_tokenizer
    from nanollm.rl.rollout import prompt_of
    from nanollm.text.tokenizer import ASSISTANT, END, USER

    write_tokenizer(folder, tokenizer, c.context_length)
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = [f"{USER}{problem.question}{END}{ASSISTANT}" for problem in problems]
    assert fast(prompts)["input_ids"] == [prompt_of(problem, tokenizer) for problem in problems]
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=REPLY,
        generation_kwargs={"min_new_tokens": REPLY},
        beta=0.0,
        num_iterations=1,
        learning_rate=RATE,
        adam_beta2=0.95,
        max_steps=1_000_000,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=dtype == "autocast",
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [float(sum(ids) % REWARDS) for ids in completion_ids]

    model = twin_of(c, tokenizer) if peer == "same model" else llama_of(c, tokenizer)
    return GRPOTrainer(
        model=model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=fast,
    )


def twin_of(c: "ModelConfig", tokenizer: "Tokenizer") -> Any:
    """transformers' class with the weights that ours begins with."""
    from benchmarks.peers import transformers_twin
    from nanollm.model.transformer import Transformer

    peer = transformers_twin(Transformer(c).init(0))
    peer.config.bos_token_id, peer.config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    return peer


def llama_of(c: "ModelConfig", tokenizer: "Tokenizer") -> Any:
    """As deep and as wide, with about as many parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=768,
        num_hidden_layers=c.n_blocks,
        num_attention_heads=c.n_heads,
        max_position_embeddings=c.context_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    return LlamaForCausalLM(config)  # with sdpa, as transformers chooses


# --- the same gradient ---


def gradients_of_the_same_replies(
    c: "ModelConfig", tokenizer: "Tokenizer", problems: "Sequence[Problem]", folder: Path
) -> dict[str, Any]:
    """How far apart the two gradients are, and how long, for replies of our engine and the same advantages."""
    import torch

    from benchmarks.peers import reference_weights
    from nanollm.model.transformer import Transformer
    from nanollm.rl.grpo import make_micro_batches
    from nanollm.rl.loss import ObjectiveConfig, group_advantages, grpo_loss
    from nanollm.rl.rollout import Graded, RolloutConfig, roll_out

    model, objective = Transformer(c).init(0), ObjectiveConfig(advantage="std")
    rollout = RolloutConfig(prompts=2, group_size=GROUP, max_tokens=REPLY)
    with never_ending():
        groups = roll_out(model, tokenizer, problems[:2], rollout, seed=0)
    rewards = sum_of_letters()
    graded = []
    for group in groups:
        texts = [tokenizer.decode_drawn(each.reply_ids) for each in group.rollouts]
        replies = [(group.problem, reply_of(text)) for text in texts]
        graded.append(Graded(group, texts, rewards(replies)))
    compared = group_advantages(torch.tensor([each.totals for each in graded]), "std")
    for batch in make_micro_batches(graded, compared, objective, REPLY, ROWS * CONTEXT, is_masked=True):
        (grpo_loss(model, batch, objective, 1.0)[0] / batch.count).backward()
    trainer = trainer_of("same model", "float32", c, tokenizer, problems, folder)
    trainer.current_gradient_accumulation_steps = 1  # what its loop would set
    trainer.model.train()
    trainer._compute_loss(trainer.model, as_trl_has_them(groups, compared, tokenizer.pad_id)).backward()
    buffers = {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    ours = reference_weights({name: the_gradient(p) for name, p in model.named_parameters()} | buffers, c)
    theirs = {name: the_gradient(parameter) for name, parameter in trainer.model.named_parameters()}
    ours["model.embed_tokens.weight"][tokenizer.pad_id] = 0  # transformers never trains this row, even if it was drawn
    norm = torch.stack([theirs[name].norm() for name in theirs]).norm().item()
    apart = torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm().item() / norm
    return {"gradient_difference": apart, "gradient_norm": norm, "same": apart < TOLERANCE, "tolerance": TOLERANCE}


def the_gradient(parameter: "torch.nn.Parameter") -> "torch.Tensor":
    assert parameter.grad is not None
    return parameter.grad


def reply_of(text: str) -> Any:
    from nanollm.rl.reward import RewardInput

    return RewardInput(text, REPLY, ended=False)


def as_trl_has_them(groups: Sequence[Any], compared: "torch.Tensor", pad_id: int) -> "dict[str, torch.Tensor]":
    """Prompts padded at their left, replies, and masks of what is text."""
    import torch

    rollouts = [each for group in groups for each in group.rollouts]
    longest = max(len(each.prompt_ids) for each in rollouts)
    prompts = torch.tensor([[pad_id] * (longest - len(each.prompt_ids)) + each.prompt_ids for each in rollouts])
    replies = torch.tensor([each.reply_ids for each in rollouts])
    return {
        "prompt_ids": prompts,
        "prompt_mask": (prompts != pad_id).long(),
        "completion_ids": replies,
        "completion_mask": torch.ones_like(replies),
        "advantages": compared.flatten(),
        "num_items_in_batch": torch.tensor(float(replies.numel())),
    }
