"""`nanollm serve` in a process of its own, and a client that costs next to nothing beside it."""

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.conftest import STORY

MODEL_NAME = "tiny"
Address = tuple[str, int]


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen
    address: Address
    log: Path

    def stop(self):
        self.process.terminate()
        self.process.communicate(timeout=30)

    def kill(self):
        self.process.kill()
        self.process.communicate()


def start(bundle, log, *options, port=0, key="", threads=1):
    """A server that is ready; what it says besides its address is added to `log`."""
    words = ["serve", bundle, "--port", port, "--device", "cpu", "--dtype", "float32", "--model_name", MODEL_NAME]
    command = [sys.executable, "-m", "nanollm", *map(str, [*words, *options])]
    environment = os.environ | {"NANOLLM_API_KEY": key, "OMP_NUM_THREADS": str(threads)}
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    address = process.stdout.readline().strip().removeprefix("http://")
    if not address:
        process.wait()
        raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
    host, port = address.split(":")
    return Served(process, (host, int(port)), log)


def write_bundle(folder, **sizes):
    """A model with random weights, which says nothing sensible and never the same thing long."""
    import torch  # here, as the processes of attackers need none

    from nanollm.bundle import save_bundle
    from nanollm.model.transformer import Transformer
    from nanollm.text.train_tokenizer import train
    from tests.model.conftest import TINY, randomised

    tokenizer = train([STORY.read_text(encoding="utf-8")], folder.with_suffix(".model"), vocab_size=600)
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, context_length=192, **sizes)
    model = randomised(Transformer(config).init(0))
    return save_bundle(folder, config, model.state_dict(), tokenizer, {"made_by": "a test"})


@dataclass
class Reply:
    """What a client saw."""

    status: int = 0
    text: str = ""
    finish: str | None = None
    is_whole: bool = False
    at: list[float] = field(default_factory=list)
    """Seconds from the question to each piece; the last is the end."""


def request(body, key=""):
    """A POST of this body to the chat, as it travels."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
    )
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


async def chat(address, body, *, key="", leave_after=None):
    """Ask and read; `leave_after`: hang up after so many pieces of a stream. OSError or EOFError if the server goes."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    with closing(writer):
        writer.write(request(body, key))
        head = await reader.readuntil(b"\r\n\r\n")
        reply = Reply(status=int(head.split(b" ", 2)[1]))
        if b"text/event-stream" not in head:
            answer = json.loads(await reader.read())
            reply.at.append(time.perf_counter() - began)
            if reply.status == 200:
                reply.text, reply.finish = (
                    answer["choices"][0]["message"]["content"],
                    answer["choices"][0]["finish_reason"],
                )
                reply.is_whole = True
            return reply
        pieces = []
        while leave_after is None or len(pieces) < leave_after:
            size = int(await reader.readuntil(b"\r\n"), 16)
            piece = (await reader.readexactly(size + 2))[:-2]
            if not size:
                break
            pieces.append(piece)
            reply.at.append(time.perf_counter() - began)
    events = b"".join(pieces).decode().strip().split("\n\n")
    reply.is_whole = events[-1] == "data: [DONE]"
    for event in events[: -1 if reply.is_whole else None]:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        reply.text += choice["delta"].get("content", "")
        reply.finish = choice["finish_reason"]
    return reply


def quantile(values, share):
    """The value below which this share of them lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
