"""What somebody might send to the server who wishes it, or its other clients, no good.

Attacks are bytes: what is sent at once, and perhaps what is sent after it again and again until the server has enough.
"""

import json
import re
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.faults.served import MODEL_NAME, Address

KEY = "a-key-of-some-length"
MIB = 1 << 20
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE_S = 20.0
"""How long an attacker waits for an answer, and how long something without end goes on at most."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")


@dataclass(frozen=True)
class Attack:
    name: str
    expected: int
    """The status of the answer."""
    wire: bytes
    endless: bytes = b""


def head(method, path, *lines, key=KEY):
    """A request up to its body."""
    authorization = [f"Authorization: Bearer {key}"] if key is not None else []
    text = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *authorization, *lines, "", ""])
    return text.encode("latin-1")


def post(body, path=CHAT, *lines, key=KEY):
    return head("POST", path, "Content-Type: application/json", f"Content-Length: {len(body)}", *lines, key=key) + body


def chunked(*chunks, path=CHAT, key=KEY):
    begin = head("POST", path, "Content-Type: application/json", "Transfer-Encoding: chunked", key=key)
    return begin + b"".join(map(chunk, chunks))


def chunk(content, extension=b""):
    return b"%x%s\r\n%s\r\n" % (len(content), extension, content)


def filled(begin, item, end, size=MIB):
    """begin, as many items as fit, end."""
    return begin + item * ((size - len(begin) - len(end)) // len(item)) + end


def asked(**settings):
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Once?"}], "max_tokens": 4} | settings
    return post(json.dumps(body).encode())


def bodies() -> Iterator[Attack]:
    """Bodies that are too long, or never end."""
    yield Attack("one byte too many, declared", 413, post(b" " * (MIB + 1)))
    yield Attack("one byte too many, in chunks", 413, chunked(*[b" " * (MIB >> 4)] * 16, b" ", b""))
    yield Attack("a petabyte, declared", 413, head("POST", CHAT, f"Content-Length: {10**15}", "Expect: 100-continue"))
    yield Attack("no end of chunks", 413, chunked(), chunk(b" " * 65_536))
    yield Attack("no end of chunks without a key", 401, chunked(key=None), chunk(b" " * 65_536))


def nestings() -> Iterator[Attack]:
    """JSON that is deep, wide, or no JSON."""
    chat = b'{"model":"%s","messages":[' % MODEL_NAME.encode()
    text = b'{"model":"%s","prompt":[' % MODEL_NAME.encode()
    deep, deeper = b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    for fields in ("messages", "stop", "logit_bias", "unknown"):
        for name, nest in (("lists", deep), ("objects", deeper)):
            yield Attack(f"{fields}: 10,000 {name} deep", 400, post(b'{"%s":%s}' % (fields.encode(), nest)))
    yield Attack(
        "messages.0.content: 10,000 lists deep", 400, post(chat + b'{"role":"user","content":' + deep + b"}]}")
    )
    for name, item in {
        "numbers": b"1,",
        "objects": b"{},",
        "lists": b"[],",
        "lists 190 deep": b"[" * 190 + b"]" * 190,
    }.items():
        item = item.removesuffix(b",") + b","
        yield Attack(f"a megabyte of {name} for messages", 400, post(filled(chat, item, b"1]}")))
        yield Attack(f"a megabyte of {name} for prompts", 400, post(filled(text, item, b"1]}"), TEXT))
        unknown = b'{"model":"x","messages":[],"unknown":['
        yield Attack(f"a megabyte of {name} for nothing", 400, post(filled(unknown, item, b"1]}")))
    good, parts = b'{"role":"user","content":"a"},', b'{"type":"text","text":"a"},'
    yield Attack("a megabyte of messages", 400, post(filled(chat, good, good[:-1] + b"]}")))
    parted = chat + b'{"role":"user","content":['
    yield Attack("a megabyte of parts", 400, post(filled(parted, parts, parts[:-1] + b"]}]}")))
    yield Attack("a megabyte of empty texts", 400, post(filled(text, b'"",', b'""]}'), TEXT))
    yield Attack("a megabyte of ids", 400, post(filled(text, b"1,", b"1]}"), TEXT))
    yield Attack("a text of a megabyte", 400, post(filled(chat + b'{"role":"user","content":"', b"a word, ", b'"}]}')))
    biases = b",".join(b'"%d":"a"' % key for key in range(80_000))
    yield Attack("80,000 biases", 400, post(b'{"model":"x","logit_bias":{' + biases + b"}}"))
    keys = b",".join(b'"%x":1' % key for key in range(100_000))
    yield Attack("100,000 keys", 400, post(b'{"model":"x",' + keys + b"}"))
    yield Attack("numbers of 1,000 digits", 400, post(filled(text, b"9" * 1000 + b",", b"1]}"), TEXT))
    yield Attack("a number of a million digits", 400, post(filled(b'{"model":"x","n":', b"1", b"}")))
    for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"01", b"0x1", b"1.", b".5", b"+1"):
        body = b'{"temperature":%s,%s' % (value, chat[1:] + good[:-1] + b"]}")
        yield Attack(f"a temperature of {value.decode()}", 400, post(body))
    for name, character in {
        "a lone surrogate": b"\\ud800",
        "two surrogates in the wrong order": b"\\udc00\\ud800",
        "a byte that is no UTF-8": b"\xff",
        "a surrogate in UTF-8": b"\xed\xa0\x80",
        "an overlong slash": b"\xc0\xaf",
        "a raw line end": b"\n",
    }.items():
        yield Attack(name, 400, post(chat + b'{"role":"user","content":"' + character + b'"}]}'))


HIDDEN = b"0\r\n\r\n" + head("GET", "/metrics")
"""A body for those who see its end in one place, a body and another request for those who see it in another."""


def wire_tricks() -> Iterator[Attack]:
    """Requests that two readers might read in two ways, and names that lead elsewhere."""
    body, coded = b'{"model":"x"}', "Transfer-Encoding: chunked"
    length, both = f"Content-Length: {len(body)}", f"Content-Length: {len(HIDDEN)}"
    yield Attack("two ends: a length, then chunks", 400, head("POST", CHAT, both, coded) + HIDDEN)
    yield Attack("two ends: chunks, then a length", 400, head("POST", CHAT, coded, both) + HIDDEN)
    yield Attack("HTTP/2", 401, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    yield Attack("another site's address", 404, head("GET", "http://evil.example/health"))
    yield Attack("an address of this site", 404, head("GET", "http://localhost/v1/models"))
    for path in (
        "/%0d%0aX:%20y",
        "/page/%0d%0aSet-Cookie:a=b",
        "/v1/models/%0aX",
        "/%00",
        "/%ff",
        "/page/..%2f..%2fapp.py",
    ):
        yield Attack(f"a path of {path!r}", 404, head("GET", path))
    for name in ("x\r\nSet-Cookie: a=b", "../../etc/passwd", "\0", "{{7*7}}", "x" * 100_000, "\u202e"):
        yield Attack(f"a model called {name[:20]!r}", 404, asked(model=name))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "a" * 1000, ""):
        yield Attack(f"a body of type {kind[:20]!r}", 400, head("POST", CHAT, f"Content-Type: {kind}", length) + body)


def malformed() -> Iterator[Attack]:
    """What is not HTTP, which uvicorn refuses before any code of ours sees it."""
    for size in (b"-1", b"0x1", b"f" * 21, b""):
        yield Attack(f"a chunk of size {size.decode()!r}", 400, chunked() + size + b"\r\n \r\n")
    for length in ("-1", "1, 2", "", "9" * 30, "3\r\nContent-Length: 4"):
        yield Attack(f"a length of {length!r}", 400, head("POST", CHAT, f"Content-Length: {length}") + HIDDEN)
    for coding in (
        "chunked, identity",
        "gzip, chunked",
        "x",
        "chunked\r\nTransfer-Encoding: chunked",
        "\r\n\tchunked, x",
    ):
        yield Attack(f"a coding of {coding!r}", 400, head("POST", CHAT, f"Transfer-Encoding: {coding}") + HIDDEN)
    yield Attack("a space before the colon", 400, head("POST", CHAT, "Transfer-Encoding : chunked") + HIDDEN)
    yield Attack("TLS", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    yield Attack("two hosts", 400, head("GET", "/health", "Host: evil.example"))
    yield Attack("a zero byte in a header", 400, head("GET", "/health", "X: a\0b"))
    yield Attack("a line end in a path", 400, head("GET", "/\r\nX: y"))
    yield Attack("headers without end", 400, head("GET", "/health")[:-2], b"A: b\r\n" * 10_000)


CLASSES = {
    "bodies": bodies,
    "nestings": nestings,
    "wire tricks": wire_tricks,
    "malformed": malformed,
}


class Answer(NamedTuple):
    status: int
    """0: the connection ended without an answer."""
    head: bytes
    body: bytes


def strike(address: Address, attack: Attack, *, has_body: bool = True) -> Answer:
    """Attack once; `has_body`: whether the answer will have one, as it does not to HEAD."""
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        try:
            connection.sendall(attack.wire)
            end = time.monotonic() + PATIENCE_S
            while attack.endless and time.monotonic() < end and not select.select([connection], [], [], 0)[0]:
                connection.sendall(attack.endless)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server has hung up; what it said before is still here
        return read_answer(connection, is_last=not has_body)


def read_answer(connection: socket.socket, *, is_last: bool = False) -> Answer:
    """One answer: until its end, as far as it says where that is; or, if it is the last, until the connection's end."""
    seen, end = b"", time.monotonic() + (connection.gettimeout() or 0)
    while time.monotonic() < end:
        begin, blank, body = seen.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", begin)
        if blank and length and len(body) >= int(length[1]) and not is_last:
            break
        try:
            if not (piece := connection.recv(65_536)):
                break
        except ConnectionResetError:
            break
        seen += piece
    begin, _, body = seen.partition(b"\r\n\r\n")
    if not is_last and (length := re.search(rb"(?i)content-length: (\d+)", begin)):
        body = body[: int(length[1])]  # the answer to what came behind it may be here already
    return Answer(int(begin.split(b" ", 2)[1]) if begin else 0, begin, body)
