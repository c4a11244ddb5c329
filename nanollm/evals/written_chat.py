"""How does a conversation travel as one text, so that its ids come back?

lm-evaluation-harness carries prompts as texts. In a written chat the marks stand as they are spelled, and what a
message spells alike is kept apart from them, so that nothing a message says becomes a control symbol.
"""

import re

from nanollm.text.chat import MARK_OF, Conversation
from nanollm.text.tokenizer import ASSISTANT, END, Tokenizer

CHAT = "\ufdd0"
"""Begins a written chat, and stands in it before each character of a message that could begin a mark. Unicode gives
this code point to no character: it is for uses inside a program. A text of others that begins with it is taken for a
chat."""

MARKS = (*MARK_OF.values(), END)
UNIT = re.compile(f"{CHAT}(.)|({'|'.join(map(re.escape, MARKS))})", re.DOTALL)


def is_chat(text: str) -> bool:
    return text.startswith(CHAT + CHAT)


def write_chat(conversation: Conversation, begun: str = "") -> str:
    """The text of a conversation that the assistant replies to, and of what it has begun to say."""
    if conversation.messages[-1].role != "user":
        raise ValueError("a prompt must end with the user's message, this one ends with the assistant's")
    said = (f"{MARK_OF[message.role]}{plain(message.content)}{END}" for message in conversation.messages)
    return f"{CHAT}{CHAT}{''.join(said)}{ASSISTANT}{plain(begun)}"


def plain(content: str) -> str:
    """A content as it stands in a written chat, where it spells no mark, whatever stands beside it."""
    return re.sub(f"[<{CHAT}]", lambda char: CHAT + char[0], content)


def read_chat(written: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a written chat, without <s>: those of text.chat.encode_prompt and of what was begun."""
    ids: list[int] = []
    content, place = "", 2  # behind the beginning
    for unit in UNIT.finditer(written, place):
        content += written[place : unit.start()] + (unit[1] or "")
        place = unit.end()
        if unit[2]:
            ids += [*tokenizer.encode(content), tokenizer.mark_id(unit[2])]
            content = ""
    return ids + tokenizer.encode(content + written[place:])
