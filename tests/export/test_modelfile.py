"""Ollama gives llama.cpp the same text as the chat template, whatever the messages hold."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanollm.export.gguf import modelfile
from nanollm.text.chat import Conversation, Message
from tests.export.strings import TEMPLATE

CONTENTS = [
    "Hi",
    " two\n\nlines \n",
    "{{ .System }}",
    '"""',
    "\t\\n 'q' `b` <b>&amp;</b>",
    "\u2581\U0001f600é\0",
    "{{- end }}",
]


def conversations() -> list[Conversation]:
    """One to five messages, with and without one of the system, each content at each place."""
    found = []
    for first, content in enumerate(CONTENTS):
        for system in (True, False):
            for turns in range(1, 5):
                roles = (["system"] if system else []) + [("user", "assistant")[turn % 2] for turn in range(turns)]
                said = [CONTENTS[(first + place) % len(CONTENTS)] for place in range(len(roles))]
                said[0] = content
                found.append(Conversation(tuple(map(Message, roles, said))))
    return found


@pytest.fixture(scope="module")
def ollama(tmp_path_factory):
    """ollama(Modelfile, conversations): the prompts, by Go's own text/template."""
    if shutil.which("go") is None:
        pytest.skip("there is no Go compiler to render the template with (Debian: apt-get install golang-go)")
    program = tmp_path_factory.mktemp("go") / "ollama"
    source = Path(__file__).with_name("ollama.go")
    subprocess.run(["go", "build", "-o", program, source], check=True, capture_output=True)

    def render(text: str, chats: list[Conversation]) -> list[str]:
        template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)[1]
        messages = [[{"Role": m.role, "Content": m.content} for m in chat.messages] for chat in chats]
        asked = json.dumps({"Template": template, "Conversations": messages})
        return json.loads(subprocess.run([program], input=asked.encode(), check=True, capture_output=True).stdout)

    return render


def of_our_template(chat: Conversation) -> str:
    """The text without <s>; where the assistant spoke last, its words may go on."""
    asked = chat.messages[-1].role == "user"
    messages = [{"role": m.role, "content": m.content} for m in chat.messages]
    template = ImmutableSandboxedEnvironment().from_string(TEMPLATE)
    text = template.render(messages=messages, add_generation_prompt=asked, bos_token="")
    return text if asked else text.removesuffix("<|end|>")


def test_ollama_renders_a_conversation_as_our_template_does(ollama):
    chats = conversations()
    assert len(chats) == 56
    assert ollama(modelfile("tiny.gguf", 256, is_base=False), chats) == list(map(of_our_template, chats))


def test_ollama_gives_a_base_model_the_text_alone():
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in modelfile("tiny.gguf", 256, is_base=True)
    assert "stop" not in modelfile("tiny.gguf", 256, is_base=True)


def test_ollama_draws_as_nanollm_does():
    lines = modelfile("my tiny.gguf", 2048, is_base=False).splitlines()
    assert lines[0] == "FROM ./my tiny.gguf"
    assert lines[-7:] == [
        "PARAMETER num_ctx 2048",
        "PARAMETER temperature 0.8",
        "PARAMETER top_k 0",
        "PARAMETER top_p 1.0",
        "PARAMETER min_p 0.0",
        "PARAMETER repeat_penalty 1.0",
        'PARAMETER stop "<|end|>"',
    ]
