"""Losses of preferences have the gradients that are written plainly, and TRL's; mistakes put back are caught."""

import copy
import dataclasses
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from nanollm.model.transformer import Transformer
from nanollm.rl import preference
from nanollm.rl.preference import (
    PreferenceConfig,
    all_logprobs,
    encode_preferences,
    make_preference_batches,
    preference_loss,
    preference_metrics,
    reference_point,
)
from nanollm.sources.calculator import calculator
from nanollm.sources.datasets import Preference, Reply
from nanollm.stages import prefer
from nanollm.text.chat import Conversation, Message, encode_prompt
from nanollm.text.tokenizer import ASSISTANT, END
from nanollm.world import World
from tests.model.conftest import TINY, randomised
from tests.rl.promises import grads_of

TALK = [
    ("How many?", "2+3=<<2+3=5>>5", "I cannot say how many of them there are."),
    ("And now?", "Seven.", "7"),
    ("Say no.", "no", "yes"),
    ("What does the fox do in the long evening?", "It sleeps.", "9+9=<<9+9=18>>18"),
    ("Who?", "The fox, of course, and nobody else.", "I"),
]
OPTIONS = [
    {"loss": "dpo"},
    {"loss": "dpo", "beta": 0.7, "label_smoothing": 0.2},
    {"loss": "dpo", "beta": 0.4, "sft_weight": 0.8},
    {"loss": "ipo", "beta": 0.3},
    {"loss": "simpo", "beta": 2.0, "gamma": 1.1},
    {"loss": "kto", "beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.6},
]


def model_of(tokenizer, seed, dtype=torch.float64):
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, context_length=64)
    return randomised(Transformer(config).init(seed)).to(dtype)


def near(policy, seed, share=0.3):
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for own, away in zip(
            other.parameters(), randomised(Transformer(policy.config).init(seed)).parameters(), strict=True
        ):
            own.lerp_(away.to(own.dtype), share)
    return other


def known_of(tokenizer, c, reference, tools=(calculator,), places=64):
    """The talk as the stage has it before its first step; kto: judged replies, three of them wanted."""
    prompts = [(Message("user", asked),) for asked, _, _ in TALK]
    given = [Preference(p, Reply(yes), Reply(no)) for p, (_, yes, no) in zip(prompts, TALK, strict=True)]
    if not c.is_paired:
        given = [dataclasses.replace(each, **{("rejected", "chosen")[n % 2]: None}) for n, each in enumerate(given)]
    known = encode_preferences(given, c, tokenizer, tools, 64)

    def logprobs_of(model, known):
        return all_logprobs(model, known, places, is_masked=True, world=World())

    return known if c.loss == "simpo" else prefer.with_reference(known, reference, logprobs_of)


def by_our_batches(policy, known, c, places=64):
    """Loss and gradient of one step on all, in micro-batches."""
    policy.zero_grad()
    state, chosen, kl, seen = (
        SimpleNamespace(run=lambda f, *given: f(policy, *given)),
        range(len(known.examples)),
        0.0,
        [],
    )
    if known.mismatched:
        kl = reference_point(state, make_preference_batches(known.mismatched, chosen, places, is_masked=True), World())
    batches = make_preference_batches(known, chosen, places, is_masked=True)
    assert places > 64 or len(batches) > 1
    losses = []
    for batch in batches:
        loss, _ = preference_loss(policy, batch, c, kl, seen, recompute=False)
        losses.append(loss / len(known.examples))
        losses[-1].backward()
    return sum(losses).item(), grads_of(policy), preference_metrics(seen, c, World()) | {"kl": kl}


def logprob_of(model, tokenizer, asked, said):
    """One reply in a pass of its own: the sum over what the model says, and how many tokens that is."""
    prompt, parts = encode_prompt(Conversation.of(asked), tokenizer), [(said, True)]
    if ">>" in said:  # 2+3=<<2+3= by the model, 5>> by the calculator, 5 by the model
        begin = said.rindex("=") + 1
        end = said.index(">>") + 2
        parts = [(said[:begin], True), (said[begin:end], False), (said[end:], True)]
    spelled = [(tokenizer.encode(text), is_own) for text, is_own in parts]
    ids = [token for part, _ in spelled for token in part] + [tokenizer.mark_id(END)]
    own = [is_own for part, is_own in spelled for _ in part] + [True]
    logits = model(torch.tensor([[*prompt, *ids][:-1]]))[0, len(prompt) - 1 :]
    each = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    return each[torch.tensor(own)].sum(), sum(own)


def written_plainly(policy, reference, tokenizer, c):
    """Loss, gradient and mean log-probability of chosen replies, from the papers: no packing, no batches."""
    policy.zero_grad()

    def of(asked, said):
        with torch.no_grad():
            known = logprob_of(reference, tokenizer, asked, said)[0]
        new, tokens = logprob_of(policy, tokenizer, asked, said)
        return new, known, tokens

    terms, chosen, beta = [], [], c.beta
    if c.loss == "kto":
        said = [(asked, (yes, no)[n % 2], n % 2 == 0) for n, (asked, yes, no) in enumerate(TALK)]
        other = [of(asked, said[n - 1][1]) for n, (asked, _, _) in enumerate(said)]
        kl = max(0.0, sum((new - known).item() for new, known, _ in other) / len(other))
        for asked, reply, is_wanted in said:
            new, known, _ = of(asked, reply)
            if is_wanted:
                chosen.append(new.item())
                terms.append(c.desirable_weight * (1 - torch.sigmoid(beta * (new - known - kl))))
            else:
                terms.append(c.undesirable_weight * (1 - torch.sigmoid(beta * (kl - (new - known)))))
    for asked, yes, no in TALK if c.is_paired else ():
        (w, ref_w, n_w), (r, ref_r, n_r) = of(asked, yes), of(asked, no)
        chosen.append(w.item())
        if c.loss == "dpo":
            margin, smoothing = beta * ((w - ref_w) - (r - ref_r)), c.label_smoothing
            preferred = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
            terms.append(preferred - c.sft_weight * w / n_w)
        elif c.loss == "ipo":
            terms.append(((w - ref_w) / n_w - (r - ref_r) / n_r - 1 / (2 * beta)) ** 2)
        else:
            terms.append(-logsigmoid(beta * w / n_w - beta * r / n_r - c.gamma))
    loss = torch.stack(terms).mean()
    loss.backward()
    return loss.item(), grads_of(policy), fmean(chosen)


def the_gradient_is_exact(tokenizer, c):
    policy = model_of(tokenizer, 0)
    reference = near(policy, 1, -0.3)  # so that KTO's reference point is above 0
    loss, gradient, metrics = by_our_batches(policy, known_of(tokenizer, c, reference), c)
    expected_loss, expected, chosen = written_plainly(policy, reference, tokenizer, c)
    assert expected.abs().max() > 1e-3
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)
    assert metrics["logps/chosen"] == pytest.approx(chosen, rel=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_the_one_written_plainly(tokenizer, options):
    the_gradient_is_exact(tokenizer, PreferenceConfig(**options))


def test_one_large_micro_batch_is_many_small_ones(tokenizer):
    for options in OPTIONS:
        c, policy = PreferenceConfig(**options), model_of(tokenizer, 0)
        known = known_of(tokenizer, c, near(policy, 1))
        small, large = (by_our_batches(policy, known, c, places) for places in (64, 4096))
        torch.testing.assert_close(small, large)


def test_kto_measures_by_the_mean_of_all_micro_batches_and_never_below_zero(tokenizer):
    c, policy = PreferenceConfig(loss="kto"), model_of(tokenizer, 0)
    points = []
    for reference in (near(policy, 1), near(policy, 1, -0.3)):
        known = known_of(tokenizer, c, reference)
        ratios = known_of(tokenizer, c, policy).mismatched.reference - known.mismatched.reference
        points.append(ratios.mean().item())
        assert by_our_batches(policy, known, c)[2]["kl"] == pytest.approx(max(0.0, points[-1]))
    assert min(points) < 0 < max(points)


# Mistakes, put back one at a time.


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "kto"])
def test_the_prompts_tokens_in_the_sum(tokenizer, monkeypatch, loss):
    """In DPO's margin they cancel, for both replies have one prompt: only rewards and log-probabilities show it."""
    right = preference.encode_conversation

    def unmasked(*given):
        encoded = right(*given)
        prompt = encoded.ids.index(tokenizer.mark_id(ASSISTANT)) + 1
        return dataclasses.replace(encoded, trained=[True] * prompt + encoded.trained[prompt:])

    monkeypatch.setattr(preference, "encode_conversation", unmasked)
    with pytest.raises(AssertionError):
        the_gradient_is_exact(tokenizer, PreferenceConfig(loss=loss))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_pairs_shuffled_apart(tokenizer, monkeypatch, loss):
    """Replies sorted by length, or chosen and rejected in batches of their own: each is compared with a stranger."""
    right = preference.make_preference_batches

    def apart(known, *others, **options):
        examples = [(one, known.examples[n - 1][1]) for n, (one, _) in enumerate(known.examples)]
        return right(dataclasses.replace(known, examples=examples), *others, **options)

    monkeypatch.setitem(globals(), "make_preference_batches", apart)
    with pytest.raises(AssertionError):
        the_gradient_is_exact(tokenizer, PreferenceConfig(loss=loss))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_a_reference_that_is_the_trained_policy_itself(tokenizer, monkeypatch, loss):
    """Rewards stay 0 wherever the policy goes: the loss falls and nothing keeps it near its start."""
    right = prefer.with_reference
    monkeypatch.setattr(prefer, "with_reference", lambda known, model, of: right(known, model_of(tokenizer, 0), of))
    with pytest.raises(AssertionError):
        the_gradient_is_exact(tokenizer, PreferenceConfig(loss=loss))


def test_what_a_tool_wrote_trained_as_if_the_model_had_chosen_it(tokenizer, monkeypatch):
    right = preference.encode_conversation
    monkeypatch.setattr(preference, "encode_conversation", lambda talk, tokenizer, tools: right(talk, tokenizer))
    with pytest.raises(AssertionError):
        the_gradient_is_exact(tokenizer, PreferenceConfig())


# TRL.


def padded(replies):
    """Ids, which of them are text, and which are trained, (S, T) each."""
    longest = max(len(reply.ids) for reply in replies)
    rows = [
        np.pad(np.stack([reply.ids, np.ones_like(reply.ids), reply.trained]), ((0, 0), (0, longest - len(reply.ids))))
        for reply in replies
    ]
    return torch.tensor(np.stack(rows)).unbind(1)


@pytest.mark.long
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("default")
def test_loss_gradient_and_metrics_are_trls(tokenizer, tmp_path, options):
    pytest.importorskip("trl", reason='TRL is not installed: pip install -e ".[bench]"')
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from benchmarks.peers import reference_weights, transformers_twin
    from nanollm.export.tokenizer_json import write_tokenizer

    c, policy = PreferenceConfig(**options), model_of(tokenizer, 0, torch.float32)
    policy = Transformer(policy.config).init(0)
    known = known_of(tokenizer, c, near(policy, 3 if c.is_paired else 8), tools=())
    write_tokenizer(tmp_path, tokenizer, 64)
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    common = {
        "output_dir": str(tmp_path),
        "beta": c.beta,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 5,
    }
    dummy = {"prompt": ["a"] * 5, "chosen": ["b"] * 5, "rejected": ["c"] * 5}
    chosen, rejected = ([example[side] for example in known.examples] for side in (0, -1))
    of = {"model": transformers_twin(policy), "processing_class": fast}
    if c.loss == "kto":
        dummy = {"prompt": ["a"] * 5, "completion": ["b"] * 5, "label": [True, False] * 2 + [True]}
        weights = {"desirable_weight": c.desirable_weight, "undesirable_weight": c.undesirable_weight}
        args = KTOConfig(**common, **weights, precompute_ref_log_probs=False)
        trainer = KTOTrainer(
            **of, ref_model=transformers_twin(policy), args=args, train_dataset=Dataset.from_dict(dummy)
        )
        other = padded([reply for (reply,) in known.mismatched.examples])
        inputs = dict(zip(("input_ids", "attention_mask", "completion_mask"), padded(chosen), strict=True))
        inputs |= dict(zip(("KL_input_ids", "KL_attention_mask", "KL_completion_mask"), other, strict=True))
        inputs |= {"label": known.is_chosen, "ref_logps": known.reference, "ref_KL_logps": known.mismatched.reference}
    elif c.loss == "simpo":
        args = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=c.gamma)
        trainer = CPOTrainer(**of, args=args, train_dataset=Dataset.from_dict(dummy))
        inputs = {}
        for side, replies in (("chosen", chosen), ("rejected", rejected)):
            ids, is_text, trained = padded(replies)
            inputs |= {f"{side}_input_ids": ids, f"{side}_attention_mask": is_text}
            inputs |= {f"{side}_labels": ids.masked_fill(trained == 0, -100)}
    else:
        # What other trainers call label smoothing is TRL's aot, for a pair alone; its sft is a mean over all tokens.
        kind = "ipo" if c.loss == "ipo" else "aot" if c.label_smoothing else "sigmoid"
        kinds = [kind, "sft"] if c.sft_weight else [kind]
        weights = [1.0, c.sft_weight][: len(kinds)]
        args = DPOConfig(**common, loss_type=kinds, loss_weights=weights, label_smoothing=c.label_smoothing)
        trainer = DPOTrainer(
            **of, ref_model=transformers_twin(policy), args=args, train_dataset=Dataset.from_dict(dummy)
        )
        inputs = dict(zip(("input_ids", "attention_mask", "completion_mask"), padded(chosen + rejected), strict=True))
        inputs |= {"ref_chosen_logps": known.reference[0::2], "ref_rejected_logps": known.reference[1::2]}
    trainer.precompute_ref_logps = True
    model = trainer.model.train()
    model.zero_grad()
    parts = [inputs]
    if c.label_smoothing or c.sft_weight:
        pairs = range(len(chosen))
        parts = [
            {k: v[[n, n + len(chosen)]] if len(v) > len(chosen) else v[[n]] for k, v in inputs.items()} for n in pairs
        ]
    theirs = 0.0
    for part in parts:
        if c.loss == "simpo":
            loss, shown = trainer.get_batch_loss_metrics(model, part)
        else:
            loss = trainer._compute_loss(model, part, return_outputs=False)
            shown = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        (loss / len(parts)).backward()
        theirs += loss.item() / len(parts)
    ours, _, metrics = by_our_batches(policy, known, c)
    assert metrics["kl"] > 0 or c.is_paired
    assert ours == pytest.approx(theirs, rel=1e-5)
    buffers = {name: torch.zeros_like(buffer) for name, buffer in policy.named_buffers()}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in policy.named_parameters()}
    own = reference_weights(gradients | buffers, policy.config)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    length = torch.stack([grad.norm() for grad in theirs.values()]).norm()
    assert length > 0.01
    assert torch.stack([(own[name] - theirs[name]).norm() for name in theirs]).norm() < 1e-5 * length
    if len(parts) == 1:
        names = [name for name in metrics if name.startswith("rewards/")] + ["kl"] * (c.loss == "kto")
        names += ["logps/chosen", "logps/rejected"] * (c.loss != "simpo")  # there it is the mean of a token
        assert {name: metrics[name] for name in names} == pytest.approx({name: shown[name] for name in names}, rel=1e-4)
