"""A conversation with a model, turn by turn, within the model's context.

The engine keeps what it has read, so that a turn costs its new words only. When the context is full, the model no
longer sees the oldest exchanges, though they stay in the conversation.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from nanollm.bundle import Bundle
from nanollm.generate.engine import Engine, check_prompt
from nanollm.generate.model import GenerateConfig
from nanollm.generate.request import Completion, Quantize, Request
from nanollm.generate.tools import tool_caller
from nanollm.progress import say
from nanollm.text.chat import Conversation, Message, encode_prompt, reply_borders
from nanollm.text.stream import TextStream


@dataclass(frozen=True, kw_only=True)
class ChatConfig(GenerateConfig):
    """How the model replies."""

    system: str | None = None
    """The system message that the conversation begins with; null: none."""
    max_tokens: int = 512
    """Maximum length of a reply in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system is not None and not self.system.strip():
            raise ValueError("the system message needs at least one character, got an empty one; leave it out")


@dataclass(frozen=True)
class ChatReply:
    """What the model said, and how fast."""

    completion: Completion
    first_s: float  # from the question to the first token
    rest_s: float  # from there to the last

    def figures(self) -> str:
        """One line: `84 tokens, 212 tokens/s, first after 30 ms`."""
        tokens = len(self.completion.logprobs)
        parts = [f"{tokens:,} token{'s' * (tokens != 1)}"]
        if tokens > 1 and self.rest_s > 0:
            parts.append(f"{(tokens - 1) / self.rest_s:,.0f} tokens/s")
        if tokens:
            parts.append(f"first after {self.first_s * 1000:,.0f} ms")
        if self.completion.finish == "cancelled":
            parts.append("stopped")
        if self.completion.finish == "length":
            is_limit = tokens == self.completion.request.max_tokens
            parts.append(f"cut at {'max_tokens' if is_limit else 'the end of the context'}")
        return ", ".join(parts)


class ChatSession:
    """A conversation that grows, and a model that has read it. Its settings may change on the way."""

    def __init__(self, bundle: Bundle, c: ChatConfig, quantize: Quantize = "none"):
        self.bundle, self.c = bundle, c
        self.engine = Engine(bundle.model, rows=1, quantize=quantize)  # remembers what it read in earlier turns
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.messages: list[Message] = []  # of user and assistant in turn, all of them
        self.forgotten = 0  # how many of these, the oldest, the model no longer sees
        self.replies = 0

    def conversation(self, *question: Message, start: int = 0) -> Conversation:
        """What was said from message `start` on, and the question if there is one."""
        system = [Message("system", self.c.system)] if self.c.system else []
        return Conversation((*system, *self.messages[start:], *question))

    def prompt(self, question: str) -> list[int]:
        """The ids that the model replies to. It says so when there is no room for the oldest exchanges.

        ValueError if the question has no room even alone.
        """
        config, asked = self.bundle.model.config, Message("user", question)
        limit = config.context_length - min(self.c.max_tokens, config.context_length // 4)  # the rest is for the reply
        for start in range(self.forgotten, len(self.messages) + 1, 2):
            ids = encode_prompt(self.conversation(asked, start=start), self.bundle.tokenizer)
            if len(ids) <= limit:
                break
        check_prompt(ids, config.context_length, config.vocab_size)
        if dropped := (start - self.forgotten) // 2:
            oldest = "oldest exchange" if dropped == 1 else f"oldest {dropped} exchanges"
            say(f"the model forgot the {oldest}: its context is {config.context_length:,} tokens")
        self.forgotten = start
        return ids

    def reply(
        self,
        question: str,
        prompt: list[int],
        on_text: Callable[[str], None],
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> ChatReply:
        """Let the model reply to the prompt of this question; `on_text` gets the text as it appears."""
        stream = TextStream(self.bundle.tokenizer, self.c.stop)

        def is_over(token: int) -> bool:
            on_text(stream.push(token))
            return stream.is_stopped

        request = Request(
            prompt=prompt,
            max_tokens=self.c.max_tokens,
            sampling=self.c,
            stop_token_ids=reply_borders(self.bundle.tokenizer),
            stop=is_over,
            tool=make_tool() if (make_tool := tool_caller(self.bundle)) else None,
            seed=self.c.seed + self.replies,
        )
        times = [time.perf_counter()]  # of the question, and of each token or the interruption
        completion = self.engine.submit(request)
        while completion.finish is None:
            if is_interrupted():
                self.engine.cancel(completion)
                times.append(time.perf_counter())
            elif self.engine.step():
                times.append(time.perf_counter())
        on_text(stream.close())
        self.replies += 1
        if stream.text.strip():
            self.messages += [Message("user", question), Message("assistant", stream.text)]
        else:
            say("the model said nothing, so this message is left out of the conversation")
        return ChatReply(completion, times[1] - times[0], times[-1] - times[1])

    def retract(self) -> str:
        """Forget the last reply; returns the message that it answered."""
        if not self.messages:
            raise ValueError("there is no message yet to reply to again")
        question = self.messages[-2].content
        del self.messages[-2:]
        return question
