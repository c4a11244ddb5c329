"""How does one talk to a model in a terminal, or through a pipe?

On a terminal a reply appears token by token, Ctrl-C stops it, and a line that begins with / is a command. In a pipe
every line of stdin is a message. Either way it is one conversation, and stdout carries its replies and nothing else.
"""

import difflib
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from nanollm.bundle import load_bundle
from nanollm.generate.chat_session import Talk, TalkConfig
from nanollm.generate.request import Quantize
from nanollm.progress import say
from nanollm.world import DeviceName, DtypeName, World

POSITIONAL = ("bundle",)
PROMPT, MORE = "> ", ". "
INVISIBLE = re.compile("[\0-\b\v-\x1f\x7f-\x9f]")  # a reply must not move the cursor or rename the window

COMMANDS = {
    "/reset": "forget the conversation",
    "/system [TEXT]": "show the system message, or set it and forget the conversation",
    "/retry": "another reply to the last message",
    "/save FILE.jsonl": "write the conversation as `nanollm preprocess chat` reads it",
    "/temp [X]": "show or set the temperature; alike: /top_k /top_p /min_p /repetition_penalty /max_tokens /seed",
    "/help": "these lines",
    "/exit": "leave; Ctrl-D does the same",
}
SETTINGS = {"/temp": "temperature"} | {
    f"/{name}": name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed")
}
HINTS = """\
Ctrl-C stops a reply. A line that ends in \\ goes on in the next one.
A message that begins with / needs a space before it."""


@dataclass(frozen=True, kw_only=True)
class Config(TalkConfig):
    """Talk to a model in the terminal (/help lists the commands); in a pipe, each line is a message to reply to."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/sft/bundle."""
    quantize: Quantize = "none"
    """int8: weights in one byte each, with a scale per output."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """What to compute in."""


def run(c: Config) -> None:
    """Talk until the user leaves, or reply to each line of stdin."""
    world = World.start(c.device, c.dtype)
    talk = Talk(load_bundle(c.bundle, world.dtype, world.device), c, c.quantize)
    if sys.stdin.isatty():
        if talk.bundle.is_base:
            say("this model was only pretrained: it continues text, nanollm sft teaches it to reply")
        shape = talk.bundle.model.config
        say(
            f"{c.bundle}: {shape.total_parameters:,} parameters, context {shape.context_length:,} tokens; "
            f"/help lists the commands"
        )
        converse(talk, line_reader())
    else:
        answer(talk, sys.stdin.buffer)


# --- a pipe ---


def answer(talk: Talk, lines: Iterable[bytes]) -> None:
    """Reply to each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        try:
            question = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"line {number} of stdin is not UTF-8; convert it") from None
        if question:
            talk.reply(question, talk.prompt(question), show)
            show("\n")
    if not talk.replies:
        raise ValueError("stdin held no message; pipe one message per line, or start this in a terminal")


def show(text: str) -> None:
    """Put a piece of a reply on stdout."""
    print(INVISIBLE.sub("\ufffd", text) if sys.stdout.isatty() else text, end="", flush=True)


# --- a terminal ---


def converse(talk: Talk, read: Callable[[str], str]) -> None:
    """Reply to messages and obey commands until the user leaves. `read` takes a prompt and gives a line."""
    ctrl_c = CtrlC()
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        while (line := read_message(read, ctrl_c)).strip() != "/exit":
            try:
                question = obey(talk, line) if line.startswith("/") else line.strip()
                prompt = talk.prompt(question) if question else []
            except ValueError as error:
                say(str(error))
                continue
            if question:
                reply = talk.reply(question, prompt, show, lambda: ctrl_c.was_pressed)
                show("\n")
                say(dim(reply.figures()))
    finally:
        signal.signal(signal.SIGINT, before)


class CtrlC:
    """What Ctrl-C does: it raises while a line is typed; otherwise it is noted, and no step of the model is torn."""

    def __init__(self) -> None:
        self.was_pressed = False
        self._raises = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.was_pressed = True
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A block in which it raises; what was pressed before is past."""
        self._raises = True
        try:
            yield
        finally:
            self.was_pressed = self._raises = False


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


def read_message(read: Callable[[str], str], ctrl_c: CtrlC) -> str:
    """A line, and those after it for as long as the last ends in a backslash; /exit where there are no more."""
    try:
        with ctrl_c.raising():
            lines = [read(PROMPT)]
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(read(MORE))
        return "\n".join(lines)
    except EOFError:
        say("")  # what the shell says next begins on a line of its own
        return "/exit"
    except KeyboardInterrupt:
        say("\nCtrl-D or /exit leaves")
        return ""
    except UnicodeDecodeError:
        say("that line is not UTF-8; set the terminal to it")
        return ""


def dim(text: str) -> str:
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return text if is_plain else f"\x1b[2m{text}\x1b[0m"


# --- commands ---


def obey(talk: Talk, line: str) -> str:
    """Do what a command says; returns the message to reply to now, or nothing."""
    name, value = (*line.split(maxsplit=1), "")[:2]
    if name in SETTINGS:
        say(change(talk, name, value.strip()))
    elif name == "/reset":
        talk.reset()
        say("the conversation is forgotten")
    elif name == "/system":
        say(change_system(talk, value.strip()))
    elif name == "/save":
        say(save(talk, value.strip()))
    elif name == "/retry":
        return talk.take_back()
    elif name == "/help":
        say("\n".join([*(f"{usage:<17} {meaning}" for usage, meaning in COMMANDS.items()), HINTS]))
    else:
        raise ValueError(f"unknown command {name}; {suggestion(name)}")
    return ""


def suggestion(name: str) -> str:
    known = [*(usage.split()[0] for usage in COMMANDS), *SETTINGS]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "/help lists them; a message that begins with / needs a space first"


def change(talk: Talk, name: str, value: str) -> str:
    """Give a setting a new value, if there is one; says what it is."""
    option = SETTINGS[name]
    if value:
        try:
            number = type(getattr(Config, option))(value)
        except ValueError:
            raise ValueError(f"{name} expects a number such as {getattr(Config, option)}, got {value!r}") from None
        talk.c = replace(talk.c, **{option: number})
        if option == "seed":
            talk.replies = 0
    return f"{option}: {getattr(talk.c, option)}"


def change_system(talk: Talk, text: str) -> str:
    """Set the system message and begin again, if there is a text; says what it is."""
    if not text:
        return f"system: {talk.c.system}" if talk.c.system else "there is no system message; /system TEXT sets one"
    talk.c = replace(talk.c, system=text)
    talk.reset()
    return "the system message is set, and the conversation begins again"


def save(talk: Talk, name: str) -> str:
    """Write the conversation as one line of JSON; says where."""
    if not name.endswith(".jsonl"):
        raise ValueError(f"/save expects a file name that ends in .jsonl, got {name!r}")
    if not talk.messages:
        raise ValueError("there is nothing to save yet")
    messages = [{"role": message.role, "content": message.content} for message in talk.conversation().messages]
    path = Path(name).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except FileExistsError:
        raise ValueError(f"{path} is there already; choose another name") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another name") from None
    return f"{len(messages)} messages written to {path}"
