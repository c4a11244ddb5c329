"""How does a conversation travel as one text, so that its ids come back?

lm-evaluation-harness carries prompts as texts. In a written chat the marks stand as they are spelled, and what a
message spells alike is kept apart from them, so that nothing a message says becomes a control symbol.
"""

import re

from nanollm.text.chat import MARK_OF, Conversation
from nanollm.text.tokenizer import ASSISTANT, END, Tokenizer

CHAT = "\ufdd0"
"""Begins a written chat, and parts what a message spells from a mark. Unicode gives this code point to no character:
it is for uses inside a program."""

MARK = re.compile("(" + "|".join(map(re.escape, [*MARK_OF.values(), END])) + ")")


def is_chat(text: str) -> bool:
    return text.startswith(CHAT)


def write_chat(conversation: Conversation, begun: str = "") -> str:
    """The text of a conversation that the assistant replies to, and of what it has begun to say."""
    if conversation.messages[-1].role != "user":
        raise ValueError("a prompt must end with the user's message, this one ends with the assistant's")
    said = (f"{MARK_OF[message.role]}{plain(message.content)}{END}" for message in conversation.messages)
    return f"{CHAT}{''.join(said)}{ASSISTANT}{plain(begun)}"


def plain(content: str) -> str:
    """A content as it stands in a written chat, where it spells no mark."""
    return MARK.sub(lambda mark: mark[0][0] + CHAT + mark[0][1:], content.replace(CHAT, CHAT + CHAT))


def read_chat(written: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a written chat, without <s>: those of text.chat.encode_prompt and of what was begun."""
    ids: list[int] = []
    for place, part in enumerate(MARK.split(written.removeprefix(CHAT))):
        is_mark = place % 2 == 1
        content = re.sub(f"{CHAT}(.)", r"\1", part, flags=re.DOTALL)
        ids += [tokenizer.mark_id(part)] if is_mark else tokenizer.encode(content)
    return ids
