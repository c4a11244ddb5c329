"""Does llama.cpp say what the bundle says, from the GGUF alone?"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanollm.bundle import Bundle
from nanollm.export import llama, verify
from nanollm.export.llama import Answer, Score
from nanollm.export.verify import Check, Samples, Seen
from nanollm.progress import say
from nanollm.text.chat import Conversation, template_for
from nanollm.text.tokenizer import SPACE_MARK


def compare(model: Path, bundle: Bundle, dtype: str, prompts: int) -> Iterator[Check]:
    """The table for llama.cpp, line by line; with f32 it computes in float32 as the bundle must."""
    samples, is_exact, threads = Samples.of(bundle, prompts), dtype == "f32", torch.get_num_threads()
    spoken = [rendered(conversation, bundle) for conversation in samples.conversations]
    yield from compare_ids(llama.ask(model, texts=samples.texts, texts_with_marks=spoken), bundle, samples)
    say(f"llama.cpp reads {len(samples.windows)} texts and replies to {len(samples.prompts)} prompts")
    answer = llama.ask(model, scored=samples.windows, threads=threads)
    yield from compare_scores(answer, bundle, samples, is_exact=is_exact)
    ours = verify.our_replies(bundle, samples)
    answer = llama.ask(model, prompts=samples.prompts, count=samples.reply_tokens, threads=threads)
    yield verify.check_replies(bundle, samples, ours, answer.replies, must_equal=is_exact)


def rendered(conversation: Conversation, bundle: Bundle) -> str:
    """The conversation as its template writes it; llama.cpp adds <s> itself."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    template = template_for(bundle.tokenizer.symbols.values())
    return environment.from_string(template).render(
        messages=messages, bos_token="", add_generation_prompt=messages[-1]["role"] == "user"
    )


def compare_ids(answer: Answer, bundle: Bundle, samples: Samples) -> list[Check]:
    """llama.cpp reads a literal U+2581 as a space, as SentencePiece does."""
    texts = [bundle.tokenizer.encode(text.replace(SPACE_MARK, " ")) for text in samples.texts]
    ours = [verify.ids_of(conversation, bundle) for conversation in samples.conversations]
    spoken = [[bundle.tokenizer.bos_id, *ids] for ids in answer.ids_with_marks]
    return [
        verify.check_ids("ids of texts", texts, answer.ids, bundle.tokenizer),
        verify.check_ids("ids of conversations", ours, spoken, bundle.tokenizer),
    ]


def compare_scores(answer: Answer, bundle: Bundle, samples: Samples, *, is_exact: bool) -> Iterator[Check]:
    """Of every position: the likeliest token, its logit, that of the next token, and the sum of all."""
    ours = [Seen.of(verify.our_logits(bundle, ids), ids) for ids in samples.windows]
    theirs = [seen_by(scores) for scores in answer.scores]
    if is_exact:
        pairs = list(zip(ours, theirs, strict=True))
        differences = [
            (getattr(mine, name) - getattr(other, name)).abs().max().item()
            for mine, other in pairs
            for name in ("highest", "logit", "log_total")
        ]
        yield verify.check_difference("greatest difference of a logit", max(differences))
        yield verify.check_equal_tops(bundle, samples, ours, theirs)
    else:
        yield verify.check_perplexity(ours, theirs)
        yield verify.check_agreement(ours, theirs)


def seen_by(scores: list[Score]) -> Seen:
    columns = zip(*((score.top, score.top_logit, score.logit, score.log_total) for score in scores), strict=True)
    return Seen(*(torch.tensor(column) for column in columns))
