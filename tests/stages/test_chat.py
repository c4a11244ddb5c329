"""Talking to a model: through a pipe, by commands, and in a real terminal."""

import contextlib
import io
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from nanollm import cli
from nanollm.bundle import load_bundle
from nanollm.generate.chat_session import ChatSession
from nanollm.sources.datasets import chats
from nanollm.stages import chat
from tests.stages.conftest import MODEL, untrained

NO_END = dict.fromkeys(range(3, 8), -100.0)  # no mark ends a reply
ENDLESS = ["--logit_bias", json.dumps(NO_END)]


# A pipe


@pytest.fixture
def piped(bundle, monkeypatch, capsys):
    """Exit code, stdout and stderr of `nanollm chat BUNDLE ...` with this on stdin."""

    def make(stdin: bytes, *words):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = cli.main(["chat", str(bundle), "--dtype", "float32", "--max_tokens", "4", *words])
        return code, *said(capsys)

    return make


def said(capsys):
    """stdout and stderr, without what the engine tells where no compiler is installed."""
    out, err = capsys.readouterr()
    return out, "".join(line for line in err.splitlines(keepends=True) if not line.startswith("decoding runs on"))


def reply_to(bundle, *questions, **settings):
    """What the model replies to the last of these questions."""
    c = chat.Config(bundle=bundle, max_tokens=4, logit_bias=NO_END, **settings)
    talk, pieces = ChatSession(load_bundle(bundle), c), []
    for question in questions:
        pieces.clear()
        talk.reply(question, talk.prompt(question), pieces.append)
    return "".join(pieces)


def test_the_lines_of_a_pipe_are_one_conversation(piped, bundle):
    code, out, err = piped(b"\xef\xbb\xbfWho?\r\n\n  \n/exit", *ENDLESS)  # never a command
    assert out == reply_to(bundle, "Who?") + "\n" + reply_to(bundle, "Who?", "/exit") + "\n"
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("stdin", "words", "message"),
    [
        (b"", [], "stdin held no message; pipe one message per line, or start this in a terminal"),
        (b"word " * 100, [], "the model's context is 32 and a reply needs at least one; shorten the prompt"),
        (b"\xff\n", [], "line 1 of stdin is not UTF-8; convert it"),
        (b"Who?", ["--dtype", "float16", "--quantize", "int8"], "quantize int8 and kernels native need"),
        (b"Who?", ["--quantize", "int4"], "int4 needs widths that 32 divides, but"),
    ],
)
def test_a_mistake_in_a_pipe_is_one_line_and_exit_code_2(piped, stdin, words, message):
    code, out, err = piped(stdin, *words)
    assert (code, out) == (2, "")
    assert err.startswith("nanollm chat: ") and err.count("\n") == 1
    assert message in err


# Commands


@pytest.fixture
def type_lines(bundle, capsys):
    """Types lines at the prompt; returns the talk, what stdout got and what stderr got."""
    c = chat.Config(bundle=bundle, max_tokens=3, logit_bias=NO_END)
    talk = ChatSession(load_bundle(bundle), c)

    def make(*lines):
        left = list(lines)

        def read(prompt):
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        chat.converse(talk, read)
        return talk, *said(capsys)

    return make


def test_a_message_is_replied_to_on_stdout_and_figures_go_to_stderr(type_lines):
    talk, out, err = type_lines("Who?", "")
    assert out == talk.messages[1].content + "\n"
    assert "3 tokens, " in err and " tokens/s, first after " in err and "cut at max_tokens" in err


@pytest.mark.parametrize(
    ("lines", "questions", "said"),
    [
        ([" /usr is"], ["/usr is"], ""),  # a space before it
        (["/exit", "Who?"], [], ""),
        ([KeyboardInterrupt(), "Who?"], ["Who?"], "Ctrl-D or /exit leaves"),
        (["Who?", "/reset"], [], "the conversation is forgotten"),
        (["Who?", "/save none/talk.jsonl"], ["Who?"], "talk.jsonl cannot be written (No such file or directory)"),
    ],
)
def test_what_is_typed_becomes_messages_and_commands(type_lines, lines, questions, said):
    talk, _, err = type_lines(*lines)
    assert [message.content for message in talk.messages[::2]] == questions
    assert said in err


def test_the_system_message_is_shown_and_set(type_lines):
    talk, _, err = type_lines("Who?", "/system", "/system Be kind.", "/system")
    assert talk.c.system == "Be kind."
    assert talk.messages == []
    lines = ["no system message; /system TEXT sets one", "the system message is set", "system: Be kind."]
    assert [line in err for line in lines] == [True] * 3


def test_retry_replies_again_to_the_last_message(type_lines):
    talk, out, _ = type_lines("Who?", "/retry")
    assert [message.content for message in talk.messages] == ["Who?", out.split("\n")[-2]]
    assert talk.replies == 2


def test_settings_are_shown_and_changed(type_lines):
    talk, _, err = type_lines("/temperature 0", "/top_k 5", "/seed 9", "/max_tokens 2", "/temperature", "Who?")
    c = talk.c
    assert (c.temperature, c.top_k, c.seed, c.max_tokens) == (0.0, 5, 9, 2)
    assert err.startswith("temperature: 0.0\ntop_k: 5\nseed: 9\nmax_tokens: 2\ntemperature: 0.0\n2 tokens")


def test_a_saved_conversation_is_read_by_preprocess_and_not_overwritten(type_lines, tmp_path):
    file = tmp_path / "talk.jsonl"
    talk, _, err = type_lines("/system Be kind.", "Who?", "Why 日本?", f"/save {file}", f"/save {file}")
    assert f"5 messages written to {file}\n" in err
    assert f"{file} cannot be written (File exists); choose another name\n" in err
    bad = []
    assert list(chats([file], bad.append)) == [talk.conversation()]
    assert bad == []


def test_help_names_every_command(type_lines):
    _, out, err = type_lines("/help")
    assert out == ""
    assert [name for name in [*chat.COMMANDS, *chat.SETTINGS] if name.split()[0] not in err] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/xyz 1", "unknown command /xyz; /help lists them; a message that begins with / needs a space first"),
        ("/temperature warm", "/temperature expects a number such as 0.8, got 'warm'"),
        ("/temperature -1", "temperature must be 0 (always the most likely token) or at least 0.0001, got -1.0"),
        ("/retry", "there is no message yet to reply to again"),
        ("/save", "/save expects a file name that ends in .jsonl, got ''"),
        ("/save talk.jsonl", "there is nothing to save yet"),
        ("word " * 100, "the model's context is 32 and a reply needs at least one"),
        ("a\ud800", "character 1 of the text is the lone surrogate U+D800"),
    ],
)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(type_lines, line, message):
    talk, _, err = type_lines(line, "Who?")
    assert err.startswith(message) or message in err.splitlines()[0]
    assert len(talk.messages) == 2


# A terminal


@pytest.fixture
def pseudo_terminal():
    """The file descriptors of its keyboard and screen, and of what a process inside reads and writes."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    keyboard, inside = pty.openpty()
    yield keyboard, inside
    os.close(keyboard)
    os.close(inside)


class Terminal:
    """A process in a pseudo-terminal of its own."""

    BOOT = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from nanollm.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def __init__(self, keyboard, inside, *words, **environment):
        self.keyboard = keyboard
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.BOOT, *map(str, words)],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm", "NO_COLOR": "", "OMP_NUM_THREADS": "1"} | environment,
        )
        self.screen, self.seen, self.until = "", 0, time.monotonic() + 120

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def wait_for(self, text: str) -> str:
        """Read until this text appears; returns what came before it."""
        while (place := self.screen.find(text, self.seen)) < 0:
            self.read()
        before, self.seen = self.screen[self.seen : place], place + len(text)
        return before

    def read(self, timeout_s: float = 1) -> bool:
        """Whether there was something."""
        assert time.monotonic() < self.until, f"no more came after {self.screen[self.seen :]!r}"
        if is_ready := bool(select.select([self.keyboard], [], [], timeout_s)[0]):
            self.screen += os.read(self.keyboard, 4096).decode(errors="replace")
        return is_ready

    def interrupt_typing(self) -> None:
        """Type something and press Ctrl-C, until it is heard: Python misses it while it handles a key."""
        while "Ctrl-D or /exit leaves" not in self.screen[self.seen :]:
            self.press("x")
            while self.read(0.2):
                pass
            self.press("\x03")
            self.read()
        self.wait_for("leaves")

    def leave(self) -> int:
        """Press Ctrl-D at the prompt; returns the exit code."""
        self.wait_for("> ")
        self.press("\x04")
        return self.process.wait(timeout=30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def terminal(tmp_path, tokenizer, pseudo_terminal):
    """`nanollm chat` in a terminal, with a model whose replies are very long."""
    folder = untrained(tmp_path / "long", replace(MODEL, context_length=8192), tokenizer)
    with contextlib.ExitStack() as stack:

        def start(*words, **environment):
            opened = Terminal(*pseudo_terminal, "chat", folder, "--dtype", "float32", *ENDLESS, *words, **environment)
            stack.callback(opened.close)
            return opened

        yield start


def test_in_a_terminal_a_reply_streams_ctrl_c_stops_it_and_the_talk_goes_on(terminal, tmp_path):
    readline = pytest.importorskip("readline", reason="this Python has no readline")
    if "GNU readline" not in str(readline.__doc__):
        pytest.skip("this Python has no GNU readline, which alone knows what is pasted")
    screen = terminal("--max_tokens", "8000")
    assert "8,192 tokens; /help lists the commands" in screen.wait_for("> ")
    screen.press("Who is there?\r")
    screen.wait_for("Who is there?\r\n")
    while len(screen.screen) < screen.seen + 20:
        screen.read()
    screen.press("\x03")
    screen.wait_for(", stopped")
    screen.wait_for("> ")
    screen.press("/max_tokens 5\r")
    screen.wait_for("max_tokens: 5\r\n")
    screen.wait_for("> ")
    screen.press("And now?\r")
    assert "5 tokens, " in screen.wait_for("cut at max_tokens")
    screen.wait_for("> ")
    screen.interrupt_typing()
    screen.wait_for("> ")
    screen.press("\x1b[A\x1b[A")  # history: arrow up, to what was typed before that
    screen.press("\r")
    screen.wait_for("max_tokens: 5\r\n")
    screen.wait_for("> ")
    screen.press("\x1b[200~two\nlines\x1b[201~\r")  # pasted: one message
    screen.wait_for("cut at max_tokens")
    screen.wait_for("> ")
    screen.press(f"/save {tmp_path}/talk.jsonl\r")
    screen.wait_for("6 messages written")
    assert screen.leave() == 0
    messages = json.loads((tmp_path / "talk.jsonl").read_text("utf-8"))["messages"]
    assert [message["content"] for message in messages[::2]] == ["Who is there?", "And now?", "two\nlines"]
    assert "Traceback" not in screen.screen


def test_a_reply_cannot_steer_the_terminal(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    chat.show("a\x1b[2Jb\n")
    assert screen.getvalue() == "a\ufffd[2Jb\n"


def test_prompts_never_go_into_a_file(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda: "Who?")
    assert chat.line_reader()("> ") == "Who?"  # stdout is no terminal here
    assert capsys.readouterr() == ("", "> ")
