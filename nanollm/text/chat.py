"""How does a conversation look to the model, and which of its ids are trained?

<s> then, for each message, <|role|> content <|end|>. The marks are control symbols and each content is encoded by
itself, so no content can end a message or begin another. Trained: what the assistant says and the <|end|> after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from nanollm.text.tokenizer import ASSISTANT, END, SYSTEM, USER, Tokenizer

Role = Literal["system", "user", "assistant"]
MARK_OF: dict[str, str] = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


@dataclass(frozen=True)
class Message:
    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"a message's role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        if not isinstance(self.content, str):
            raise ValueError(f"a message's content must be text, got {type(self.content).__name__}")


@dataclass(frozen=True)
class Conversation:
    """Messages in turn: perhaps one of the system, then user, assistant, user, ..."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or any(role != ("user", "assistant")[turn % 2] for turn, role in enumerate(turns)):
            raise ValueError(
                f"a conversation is an optional system message, then user and assistant in turn; "
                f"got {', '.join(roles) or 'no messages'}"
            )

    @classmethod
    def of(cls, question: str, answer: str) -> "Conversation":
        """One question of the user and one answer of the assistant."""
        return cls((Message("user", question), Message("assistant", answer)))


@dataclass(frozen=True)
class Encoded:
    """Ids, and for each whether the model learns to predict it."""

    ids: list[int]
    trained: list[bool]


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer) -> Encoded:
    ids, trained = [tokenizer.bos_id], [False]
    for mark, content, is_trained in _encode_messages(conversation, tokenizer):
        ids += [mark, *content]
        trained += [False] + [is_trained] * len(content)
    return Encoded(ids, trained)


def encode_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the assistant replies: they end in <|assistant|>."""
    if conversation.messages[-1].role != "user":
        raise ValueError("a prompt must end with the user's message, this one ends with the assistant's")
    return [*encode_conversation(conversation, tokenizer).ids, tokenizer.mark_id(ASSISTANT)]


def _encode_messages(conversation: Conversation, tokenizer: Tokenizer) -> Iterator[tuple[int, list[int], bool]]:
    """For each message: the id of its mark, the ids of its content with <|end|>, and whether those are trained."""
    end = tokenizer.mark_id(END)
    for message in conversation.messages:
        content = [*tokenizer.encode(message.content), end]
        yield tokenizer.mark_id(MARK_OF[message.role]), content, message.role == "assistant"
