"""A conversation with a model in a terminal, or through a pipe.

On a terminal a reply appears token by token, Ctrl-C stops it, and a line that begins with / is a command. In a pipe
every line of stdin is a message. Either way it is one conversation, and stdout carries its replies and nothing else.
"""

import importlib.util
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nanollm.bundle import load_bundle
from nanollm.generate.chat_session import ChatConfig, ChatSession
from nanollm.generate.request import Quantize
from nanollm.generate.tools import with_tools
from nanollm.progress import say
from nanollm.world import DeviceName, DtypeName, World

POSITIONAL = ("bundle",)
INVISIBLE = re.compile("[\0-\b\v-\x1f\x7f-\x9f]")  # a reply must not move the cursor or rename the window

COMMANDS = {
    "/reset": "forget the conversation",
    "/system [TEXT]": "show the system message, or set it and forget the conversation",
    "/retry": "another reply to the last message",
    "/save FILE.jsonl": "write the conversation as `nanollm preprocess chat` reads it",
    "/temperature [X]": "show or set it; likewise /top_k /top_p /min_p /repetition_penalty /max_tokens /seed",
    "/help": "these lines",
    "/exit": "leave; Ctrl-D does the same",
}
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed")
HINTS = "Ctrl-C stops a reply. A message that begins with / needs a space before it."


@dataclass(frozen=True, kw_only=True)
class Config(ChatConfig):
    """Chat with a model in the terminal (/help lists the commands); in a pipe, each line is a message to reply to."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/sft/bundle."""
    tools: list[str] | None = None
    """Tools that the model may call while it replies, such as calculator. null: those the model was trained with; none:
    no tools."""
    quantize: Quantize = "none"
    """int8: one byte per weight, with a scale for each output; int4: four bits, with a scale for every 32 weights."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """What to compute in."""


def run(c: Config) -> None:
    """Chat until the user leaves, or reply to each line of stdin."""
    world = World.start(c.device, c.dtype)
    bundle = with_tools(load_bundle(c.bundle, world.dtype, world.device), c.tools)
    session = ChatSession(bundle, c, c.quantize)
    if sys.stdin.isatty():
        if session.bundle.is_base:
            say("this model was only pretrained: it continues text, nanollm sft teaches it to reply")
        shape = session.bundle.model.config
        say(
            f"{c.bundle}: {shape.total_parameters:,} parameters, context {shape.context_length:,} tokens; "
            f"/help lists the commands"
        )
        converse(session, line_reader())
    else:
        answer(session, sys.stdin.buffer)


# --- a pipe ---


def answer(session: ChatSession, lines: Iterable[bytes]) -> None:
    """Reply to each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        try:
            question = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"line {number} of stdin is not UTF-8; convert it") from None
        if question:
            session.reply(question, session.prompt(question), show)
            show("\n")
    if not session.replies:
        raise ValueError("stdin held no message; pipe one message per line, or start this in a terminal")


def show(text: str) -> None:
    """Put a part of a reply on stdout."""
    print(INVISIBLE.sub("\ufffd", text) if sys.stdout.isatty() else text, end="", flush=True)


# --- a terminal ---


def converse(session: ChatSession, read: Callable[[str], str]) -> None:
    """Reply to messages and obey commands until the user leaves. `read` takes a prompt and gives a line."""
    while True:
        try:
            line = read("> ")
            if line.strip() == "/exit":
                return
            question = obey(session, line) if line.startswith("/") else line.strip()
            if question:
                prompt = session.prompt(question)
                with noticing_ctrl_c() as was_pressed:
                    reply = session.reply(question, prompt, show, was_pressed)
                show("\n")
                say(reply.figures())
        except KeyboardInterrupt:
            say("\nCtrl-D or /exit leaves")
        except EOFError:
            say("")  # what the shell says next begins on a line of its own
            return
        except ValueError as error:
            say(str(error))


@contextmanager
def noticing_ctrl_c() -> Iterator[Callable[[], bool]]:
    """A block in which Ctrl-C raises nothing, so that no step of the model is torn; gives whether it was pressed."""
    presses: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: presses.append(number))
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)


def line_reader() -> Callable[[str], str]:
    """Reads a line, with editing, history and pasted line breaks where the system can. Prompts never go to a file."""

    def read(prompt: str) -> str:
        print(prompt, end="", file=sys.stderr, flush=True)
        return input()

    if not sys.stdout.isatty():
        return read
    if importlib.util.find_spec("readline"):
        import readline  # `input` uses it from now on

        readline.parse_and_bind("set enable-bracketed-paste on")
    return input


# --- commands ---


def obey(session: ChatSession, line: str) -> str:
    """Do what a command says; returns the message to reply to now, or nothing."""
    name, value = (*line[1:].split(maxsplit=1), "", "")[:2]
    value = value.strip()
    if name in SETTINGS:
        say(change(session, name, value))
    elif name == "reset":
        session.reset()
        say("the conversation is forgotten")
    elif name == "system":
        say(change_system(session, value))
    elif name == "save":
        say(save(session, value))
    elif name == "retry":
        return session.retract()
    elif name == "help":
        say("\n".join([*(f"{usage:<17} {meaning}" for usage, meaning in COMMANDS.items()), HINTS]))
    else:
        raise ValueError(f"unknown command /{name}; /help lists them; a message that begins with / needs a space first")
    return ""


def change(session: ChatSession, option: str, value: str) -> str:
    """Give a setting a new value, if there is one; says what it is."""
    if value:
        default = getattr(Config, option)
        try:
            number = type(default)(value)
        except ValueError:
            raise ValueError(f"/{option} expects a number such as {default}, got {value!r}") from None
        session.c = replace(session.c, **{option: number})
        if option == "seed":
            session.replies = 0
    return f"{option}: {getattr(session.c, option)}"


def change_system(session: ChatSession, text: str) -> str:
    """Set the system message and begin again, if there is a text; says what it is."""
    if not text:
        return f"system: {session.c.system}" if session.c.system else "no system message; /system TEXT sets one"
    session.c = replace(session.c, system=text)
    session.reset()
    return "the system message is set, and the conversation begins again"


def save(session: ChatSession, name: str) -> str:
    """Write the conversation as one line of JSON; says where."""
    if not name.endswith(".jsonl"):
        raise ValueError(f"/save expects a file name that ends in .jsonl, got {name!r}")
    if not session.messages:
        raise ValueError("there is nothing to save yet")
    messages = [{"role": message.role, "content": message.content} for message in session.conversation().messages]
    path = Path(name).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:  # it exists, or its folder does not
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another name") from None
    return f"{len(messages)} messages written to {path}"
