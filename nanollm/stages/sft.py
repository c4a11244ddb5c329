"""Conversations teach a model to reply."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from nanollm.bundle import TOKENIZER, WEIGHTS, Bundle, load_bundle
from nanollm.config import check_at_least
from nanollm.data.batches import ChatShards, Conversations, Fetcher, layout_of
from nanollm.data.order import Mixture, sources_of
from nanollm.data.shards import Shards, Verification, read_manifest
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.tools import tool_caller
from nanollm.model.int4 import check_widths
from nanollm.model.lora import LoraConfig, add_lora
from nanollm.progress import say
from nanollm.report.page import write_report
from nanollm.text.chat import Conversation, Marks, encode_prompt, reply_ends, reply_text
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig, lr_at
from nanollm.train.run import QatConfig, Run, RunConfig
from nanollm.train.state import TrainState
from nanollm.train.step import SIGMAS, train_step
from nanollm.world import World

AUTO = ["auto"]
PROMPTS, PROMPTS_LOOKED_AT = 3, 100
SAMPLE_TOKENS = 96
CUTS_COUNTED = 1000  # of the conversations that are too long

# What decides which numbers come out at which step; the rest (intervals, length, rates) may change on the way.
FIXED = ("seed", "data", "train.batch_size", "optim.name", "lora", "inputs")

Splits = Mapping[str, ChatShards]  # by folder


@dataclass(frozen=True, kw_only=True)
class ChatTrainConfig(QatConfig):
    """How long, in which batches, and how often to look, log and save."""

    batch_size: int = 32
    """Conversations per optimizer step."""
    micro_batch_size: int = 4
    """Rows per forward pass, each as long as the model's context and shared by the conversations that fit into it.
    Smaller takes less memory and gives the same step."""
    sample_every: int = 0
    """Steps between two samples (0: only at the start and the end)."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Fine-tune a model on conversations, so that it replies; the same command resumes an interrupted run."""

    bundle: Path
    """The model to start from, with its tokenizer: a bundle, such as runs/demo/pretrain/bundle."""
    data: dict[str, float] | Path
    """Folder of conversations, as nanollm preprocess makes it, or several with their weights, {folder: weight, ...}: a
    weight is a share of the conversations seen, whatever the sizes of the folders."""
    train: ChatTrainConfig
    """Length, batches and intervals."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4, warmup_steps=20, spike_sigmas=SIGMAS))
    """Optimizer and schedule."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """A low-rank adapter is trained instead of the model."""
    validation_conversations: int = 256
    """Conversations from each folder's validation split on which the loss is measured, spread evenly (0: all)."""
    sample_prompts: list[str] = field(default_factory=AUTO.copy)
    """Questions that are answered greedily during training, and offered on the chat page; auto: the three shortest of
    the first hundred validation conversations; none: no samples."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", sources_of(self.data))
        super().__post_init__()
        if self.sample_prompts == ["none"]:
            object.__setattr__(self, "sample_prompts", [])
        check_at_least(0, self, "validation_conversations")
        if self.train.qat_fraction and self.lora.rank is not None:
            raise ValueError(
                f"train.qat_fraction trains every weight, got lora.rank {self.lora.rank}; leave one of them out"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Folder to weight, in the order of the folders' names."""
        assert isinstance(self.data, dict)
        return self.data


def plan(c: Config) -> str:
    """What a run would do."""
    world = World.start(c.device, c.dtype)
    bundle, train, _ = _open(c, world)
    model, names = bundle.model.config, world.names
    lines = [
        f"{model.total_parameters:,} parameters of {c.bundle} on {names['device']} in {names['dtype']}, "
        f"tokenizer {bundle.tokenizer.fingerprint[:6]}, {c.train.steps:,} steps x {c.train.batch_size} conversations",
        *describe(c, train),
    ]
    return "\n".join(lines)


def run(c: Config) -> Path:
    """Train, and return the folder of the bundle."""
    with World.join(c.device, c.dtype, c.parallel) as world:
        bundle, splits, validation = _open(c, world)
        c = replace(c, sample_prompts=sample_prompts(c, bundle.tokenizer, validation or splits))
        conversations = _mix(c, splits)
        inputs = {
            "bundle": bundle.provenance["files"][WEIGHTS],
            "tokenizer": bundle.tokenizer.fingerprint,
            "data": {folder: split.shards.fingerprint for folder, split in splits.items()},
        }

        def make_state() -> TrainState:
            return TrainState.start(bundle.model.to(world.device), c.optim, world, int4_from=c.train.int4_from)

        with Run.open(c, c.train, world, inputs=inputs, fixed=FIXED, make_state=make_state) as run:
            state = run.state
            loss_of = partial(
                next_token_loss,
                balance_weight=c.optim.balance_weight,
                recompute=c.speed.recompute,
                is_compiled=run.is_compiled,
            )
            for line in describe(c, splits):
                say(line)
            if run.is_new:
                run.log(validate(c, state, validation, world))
                run.log(sample(c, state, bundle, world))
            fetch = Fetcher(conversations, c.train.batch_size, c.train.micro_batch_size, world)
            for step in run.steps():
                stats = train_step(state, fetch(step), loss_of, lr_at(step, c.train.steps, c.optim), c.optim, world)
                run.record(stats, conversations.names(step, c.train.batch_size))
                if run.due(c.train.validate_every):
                    run.log(validate(c, state, validation, world))
                if run.due(c.train.sample_every):
                    run.log(sample(c, state, bundle, world))
            seen = {
                "conversations_seen": state.step * c.train.batch_size,
                "parent": bundle.provenance,
                "tools": bundle.tools,
            }
            folder = run.save_bundle("sft", bundle.model.config, bundle.tokenizer, (c.lora, c.bundle), **seen)
            write_report(c.out, world)
            return folder


@torch.inference_mode()
def validate(c: Config, state: TrainState, splits: Splits, world: World) -> dict[str, object]:
    """Loss per trained token of some conversations of each validation split, and of all of them together."""
    if not splits:
        return {}
    losses, nats, count = dict[str, object](), 0.0, 0.0
    model = state.whole_model()
    with model.evaluating():
        for folder, split in splits.items():
            own = 0.0, 0.0
            batches = split.batches(c.train.micro_batch_size, c.validation_conversations or None)
            for batch in world.shard(batches):
                loss = next_token_loss(model, batch.to(world.device))[1].item()
                own = own[0] + loss, own[1] + batch.count
            of_split = world.all_reduce_sum(own[0]), world.all_reduce_sum(own[1])
            losses[f"val_loss/{folder}"] = of_split[0] / of_split[1]
            nats, count = nats + of_split[0], count + of_split[1]
    say(f"step {state.step:,}: validation loss {nats / count:.4f} per token of the replies")
    return {"val_loss": nats / count} | (losses if len(splits) > 1 else {})


def sample(c: Config, state: TrainState, bundle: Bundle, world: World) -> dict[str, object]:
    """The most likely reply to each sample prompt; on the main rank."""
    if not c.sample_prompts:
        return {}
    model = state.whole_model()
    if not world.is_main:
        return {}
    tokenizer = bundle.tokenizer
    replies = generate(
        model,
        [encode_prompt(Conversation.of(prompt), tokenizer) for prompt in c.sample_prompts],
        SamplingConfig(temperature=0),
        max_tokens=SAMPLE_TOKENS,
        stop_token_ids=reply_ends(tokenizer),
        tool=tool_caller(bundle),
    )
    texts = [reply_text(reply.ids, tokenizer) for reply in replies]
    for prompt, text in zip(c.sample_prompts, texts, strict=True):
        say(f"step {state.step:,}: {prompt!r} -> {text!r}")
    return {"samples": texts}


def sample_prompts(c: Config, tokenizer: Tokenizer, splits: Splits) -> list[str]:
    """The questions that were given, or those that the conversations themselves give."""
    if c.sample_prompts != AUTO:
        return c.sample_prompts
    found = dict[str, None]()
    for split in splits.values():
        for number in range(min(PROMPTS_LOOKED_AT, len(split))):
            ids = split[number].ids.tolist()
            begin = ids.index(split.marks.user) + 1
            found[tokenizer.decode(ids[begin : ids.index(split.marks.end, begin)])] = None
    return sorted(found, key=len)[:PROMPTS]


def describe(c: Config, splits: Splits) -> list[str]:
    """What will be seen of each folder, what must be cut, and how full the rows are."""
    lines, total = [], sum(c.weights.values())
    for folder, split in splits.items():
        share = c.weights[folder] / total
        epochs = share * c.train.steps * c.train.batch_size / len(split)
        line = f"{folder}: {share:.1%} of the conversations seen, {epochs:.2f} epochs of its {len(split):,}"
        if longer := len(split.longer):
            cuts = split.cuts(CUTS_COUNTED)
            of = min(longer, CUTS_COUNTED)
            cut = ", ".join(f"{name} {count / of:.0%}" for name, count in sorted(cuts.items()))
            line += f"; {longer:,} are longer than the context of {split.context_length:,} tokens and are cut ({cut})"
        lines.append(line)
    conversations = _mix(c, splits)
    layout = layout_of(
        conversations.draw(0, c.train.batch_size), conversations.context_length, c.train.micro_batch_size
    )
    lines.append(
        f"the first step fills {layout.fill:.0%} of {len(layout.rows)} rows of {layout.width:,} tokens"
        + ("; a smaller train.micro_batch_size or a larger train.batch_size wastes less" if layout.fill < 0.6 else "")
    )
    return lines


def _open(c: Config, world: World) -> tuple[Bundle, Splits, Splits]:
    """The bundle, the training splits and those validation splits that hold something, held to each other."""
    bundle, tools = load_bundle(c.bundle), set[str]()
    if c.train.qat_fraction:
        check_widths(bundle.model.config)
    add_lora(bundle.model, c.lora, c.seed)
    context, fingerprint = bundle.model.config.context_length, bundle.tokenizer.fingerprint
    for prompt in c.sample_prompts:
        if len(encode_prompt(Conversation.of(prompt), bundle.tokenizer)) >= context:
            raise ValueError(f"sample prompt {prompt[:40]!r} does not fit the context of {context} tokens")
    train, validation = dict[str, ChatShards](), dict[str, ChatShards]()
    for folder in c.weights:
        manifest, _ = read_manifest(Path(folder))
        if (written := manifest["tokenizer"]["fingerprint"]) != fingerprint:
            raise ValueError(
                f"{folder} was written with tokenizer {written[:6]}, {c.bundle} has {fingerprint[:6]}; prepare it "
                f"again (nanollm preprocess ... --tokenizer_path {c.bundle / TOKENIZER} --save_dir NEW_FOLDER)"
            )
        tools |= {*manifest.get("tools", [])}
        train[folder] = _open_split(bundle, folder, "train", world)
        if manifest["splits"].get("val", {}).get("tokens"):
            validation[folder] = _open_split(bundle, folder, "val", world)
        else:
            say(f"{folder} has no validation split: nothing will be measured on it (nanollm preprocess --val_fraction)")
    return replace(bundle, tools=sorted(tools)), train, validation


def _open_split(bundle: Bundle, folder: str, split: str, world: World) -> ChatShards:
    tokenizer = bundle.tokenizer
    verify: Verification = "sha256" if world.is_main else "size"  # all ranks read the same files
    shards = Shards.open(Path(folder), split, tokenizer_fingerprint=tokenizer.fingerprint, verify=verify)
    return ChatShards(shards, bundle.model.config.context_length, Marks.of(tokenizer))


def _mix(c: Config, splits: Splits) -> Conversations:
    return Conversations(list(splits.values()), Mixture(list(c.weights.values())), c.seed)
