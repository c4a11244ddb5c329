"""Do those who read their replies notice that somebody else attacks the server?

python -m tests.faults.server_attack [CLASS ...] --rounds 6 --json FILE

For each class of attack, quiet and attacked windows take turns on one server, with the same questions in each: the
machine's own moods meet both. The class "nothing" is the measure's own noise. Attackers are a process of their own;
each strikes again a quarter of a second after its answer. The model has a hundred million weights, a third of the
largest preset's: what holds up a step counts for more here than there.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import chain
from pathlib import Path

from tests.faults.attacks import CHAT, CLASSES, KEY, head, strike
from tests.faults.served import MODEL_NAME, chat, quantile, request, start, write_bundle

SIZES = {"d_model": 768, "n_blocks": 12, "d_ff": 3072, "d_expert": 1024, "n_heads": 12}
READERS, REPLIES, TOKENS = 4, 3, 40
"""Who reads at once, how many replies each in a window, and of how many tokens."""
ATTACKERS = 4
PAUSE_S = 0.25
IDLE = 500
NAMES = ("nothing", *CLASSES, "slowness")


def ask(number):
    """A question whose reply has TOKENS tokens: the marks that could end it are forbidden."""
    message = {"role": "user", "content": f"Once upon {number} times?"}
    forbidden = {str(token): -100 for token in range(3, 8)}
    asked = {"model": MODEL_NAME, "messages": [message], "max_tokens": TOKENS, "logit_bias": forbidden}
    return asked | {"temperature": 1, "seed": number, "stream": True}


async def window(address):
    """The gaps between tokens, and the times of whole replies, of all readers, in seconds."""

    async def read(reader):
        return [await chat(address, ask(100 * reader + number), key=KEY) for number in range(REPLIES)]

    replies = list(chain(*await asyncio.gather(*map(read, range(READERS)))))
    assert all(reply.is_whole for reply in replies), Counter(reply.status for reply in replies)
    return [gap for reply in replies for gap in reply.gaps], [reply.at[-1] for reply in replies]


def attack(address, name, is_on, is_over, strikes):
    """A process of attackers that strike while `is_on`."""
    targets = [slow] * ATTACKERS if name == "slowness" else [hostile] * ATTACKERS if name in CLASSES else []
    threads = [threading.Thread(target=one, args=(address, name, is_on, is_over, strikes)) for one in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def hostile(address, name, is_on, is_over, strikes):
    attacks = list(CLASSES[name]())
    while not is_over.is_set():
        if is_on.wait(0.1):
            with strikes.get_lock():
                number, strikes.value = strikes.value, strikes.value + 1
            strike(address, attacks[number % len(attacks)])
            time.sleep(PAUSE_S)


def slow(address, name, is_on, is_over, strikes):
    """Many connections that never get on: idle, with half a head, half a body, an answer that nobody reads, and a few
    with twenty requests at once."""
    body = head("POST", CHAT, "Content-Type: application/json", "Content-Length: 1000")
    unread = request(ask(0) | {"logprobs": True, "top_logprobs": 20}, KEY)
    while not is_over.is_set():
        if not is_on.wait(0.1):
            continue
        held = [socket.create_connection(address, timeout=5) for _ in range(IDLE // ATTACKERS)]
        with strikes.get_lock():
            strikes.value += len(held)
        for number, one in enumerate(held):
            one.sendall((b"", head("GET", "/health")[:-2], body, b"")[number % 4])
        held[0].sendall(head("GET", "/health") * 20)
        held[3].sendall(unread)
        while is_on.is_set() and not is_over.is_set():
            for number, one in enumerate(held):
                try:
                    one.sendall((b"", b"a", b" ", b"")[number % 4])
                except OSError:
                    held[number] = socket.create_connection(address, timeout=5)  # the server had enough of it
            time.sleep(0.5)
        for one in held:
            one.close()


def measure(server, name, rounds):
    """Quiet and attacked windows in turn, and how they compare."""
    context = multiprocessing.get_context("spawn")
    is_on, is_over, strikes = context.Event(), context.Event(), context.Value("i", 0)
    attackers = context.Process(target=attack, args=(server.address, name, is_on, is_over, strikes))
    attackers.start()
    windows, attacked_s = {False: [], True: []}, 0.0
    try:
        asyncio.run(window(server.address))  # warm-up
        for number in range(2 * rounds):
            is_attacked = (number + number // 2) % 2 == 1  # quiet, attacked, attacked, quiet
            if is_attacked:
                is_on.set()
                time.sleep(0.2)
            began = time.monotonic()
            windows[is_attacked].append(asyncio.run(window(server.address)))
            is_on.clear()
            if is_attacked:
                attacked_s += time.monotonic() - began
                time.sleep(0.3)
    finally:
        is_over.set()
        attackers.join()
    figures = {"attack": name, "strikes_per_s": round(strikes.value / attacked_s, 1)}
    return figures | {kind: compare(*windows.values(), i) for i, kind in enumerate(("token_gap", "whole_reply"))}


def compare(quiet, attacked, which):
    def quantile_ms(windows, share):
        return round(1e3 * quantile(list(chain(*(window[which] for window in windows))), share), 2)

    p99, p99_attacked = quantile_ms(quiet, 0.99), quantile_ms(attacked, 0.99)
    ratios = sorted(quantile_ms([b], 0.99) / quantile_ms([a], 0.99) for a, b in zip(quiet, attacked, strict=True))
    return {
        "quiet_p50_ms": quantile_ms(quiet, 0.5),
        "quiet_p99_ms": p99,
        "attacked_p99_ms": p99_attacked,
        "ratio": round(p99_attacked / p99, 3),
        "ratio_of_pairs": [round(ratio, 3) for ratio in (ratios[0], statistics.median(ratios), ratios[-1])],
    }


def main(words):
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.server_attack", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("classes", nargs="*", choices=[[], *NAMES], metavar="CLASS", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "bundle", **SIZES)
        server = start(bundle, Path(folder) / "log", key=KEY)
        try:
            seen = []
            for name in options.classes or NAMES:
                seen.append(measure(server, name, options.rounds))
                print(json.dumps(seen[-1]), flush=True)
        finally:
            server.stop()
    if options.json:
        options.json.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    return seen


if __name__ == "__main__":
    main(sys.argv[1:])
