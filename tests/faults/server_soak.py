"""Many clients for many minutes, and a server that is killed in the middle: replies stay right, and nothing is used up.

python -m tests.faults.server_soak --minutes 15 --clients 32 --json FILE
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from tests.conftest import STORY
from tests.faults.served import MODEL_NAME, chat, quantile, start, write_bundle

ASKS = 32
WHOLE = 0.25
LEAVING = 0.1
"""Shares: of all replies, those that are asked for at once; of all streams, those whose readers leave."""
SAMPLE_EVERY_S = 5.0
MAX_DRIFT_PERCENT = 2.0


@dataclass
class Life:
    """What a server used from its start to its end: seconds, bytes, descriptors, threads."""

    samples: list[tuple[float, int, int, int]] = field(default_factory=list)

    def figures(self):
        """Medians of the first minute after a minute of warm-up, and of the last; a short life has shorter minutes."""
        began, ended = self.samples[0][0], self.samples[-1][0]
        minute = min(60.0, (ended - began) / 4)
        first = [sample for sample in self.samples if began + minute <= sample[0] <= began + 2 * minute]
        last = [sample for sample in self.samples if sample[0] >= ended - minute]
        memory, descriptors, threads = ([median(s[i] for s in part) for part in (first, last)] for i in (1, 2, 3))
        return {
            "seconds": round(ended - began),
            "memory_mib": [round(size / 2**20, 2) for size in memory],
            "memory_drift_percent": round(100 * (memory[1] / memory[0] - 1), 2),
            "descriptors": descriptors,
            "threads": threads,
        }


@dataclass
class Soak:
    """One run: who is asked what, and what was seen."""

    asks: list[dict]
    alone: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    wrong: list[dict] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    is_down: bool = False
    end: float = float("inf")

    def figures(self):
        return {
            "replies": self.counts["whole"] + self.counts["streamed"],
            "of_them_streamed": self.counts["streamed"],
            "left_in_the_middle": self.counts["left"],
            "wrong_bytes": len(self.wrong),
            "lost_or_refused_while_the_server_was_dead": self.counts["lost while down"],
            "lost_otherwise": self.counts["lost"],
            "other_answers": {key: n for key, n in self.counts.items() if isinstance(key, int)},
            "first_token_ms": {f"p{q}": round(1e3 * quantile(self.first_s, q / 100), 1) for q in (50, 99)},
            "whole_reply_ms": {f"p{q}": round(1e3 * quantile(self.whole_s, q / 100), 1) for q in (50, 99)},
            "lives": [life.figures() for life in self.lives],
        }


def make_asks():
    """Requests of many lengths: two of three at temperature 0, the others with a seed at temperature 1."""
    words, asks = STORY.read_text(encoding="utf-8").split(), []
    for number in range(ASKS):
        chosen = random.Random(number)
        question = " ".join(chosen.choices(words, k=chosen.randint(1, 25)))
        ask = {"messages": [{"role": "user", "content": question}], "max_tokens": chosen.randint(4, 48)}
        asks.append({"model": MODEL_NAME, "temperature": int(number % 3 == 2), "seed": number} | ask)
    return asks


async def soak(bundle, log, minutes, clients):
    """Start, ask alone, ask together; at half-time kill and start again on the same port."""
    run, server = Soak(make_asks()), start(bundle, log)
    try:
        for ask in run.asks:
            reply = await chat(server.address, ask)
            assert reply.is_whole, reply
            run.alone.append((reply.text, reply.finish))
        run.end = time.monotonic() + 60 * minutes
        together = [asyncio.create_task(live(run, server.address, random.Random(n))) for n in range(clients)]
        await watch(run, server, run.end - 30 * minutes)
        run.is_down = True
        server.kill()
        server = await asyncio.to_thread(start, bundle, log, port=server.address[1])
        run.is_down = False
        await watch(run, server, run.end)
        await asyncio.gather(*together)
    finally:
        server.stop()
    return run


async def watch(run, server, until):
    """Sample what the server uses, while the clients go on."""
    process, life = psutil.Process(server.process.pid), Life()
    run.lives.append(life)
    while (now := time.monotonic()) < until:
        life.samples.append((now, process.memory_info().rss, process.num_fds(), process.num_threads()))
        await asyncio.sleep(min(SAMPLE_EVERY_S, max(0.5, (until - now) / 4)))


async def live(run, address, chance):
    """One client: ask, read to the end or leave, compare."""
    while time.monotonic() < run.end:
        number, is_stream = chance.randrange(len(run.asks)), chance.random() >= WHOLE
        leave_after = chance.randint(1, 5) if is_stream and chance.random() < LEAVING else None
        try:
            reply = await chat(address, run.asks[number] | {"stream": is_stream}, leave_after=leave_after)
        except (OSError, EOFError):
            run.counts["lost while down" if run.is_down else "lost"] += 1
            await asyncio.sleep(0.1)
            continue
        if reply.status != 200:
            run.counts[reply.status] += 1
            continue
        run.counts["left" if not reply.is_whole else "streamed" if is_stream else "whole"] += 1
        text, finish = run.alone[number]
        is_right = (reply.text, reply.finish) == (text, finish) if reply.is_whole else text.startswith(reply.text)
        if not is_right or not (reply.is_whole or leave_after):
            run.wrong.append({"ask": run.asks[number], "alone": text, "together": reply.text, "whole": reply.is_whole})
        if is_stream:
            run.first_s.append(reply.at[0])
        if reply.is_whole:
            run.whole_s.append(reply.at[-1])


def main(words):
    parser = argparse.ArgumentParser(prog="python -m tests.faults.server_soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        run = asyncio.run(soak(write_bundle(Path(folder) / "bundle"), log, options.minutes, options.clients))
        print(log.read_text(encoding="utf-8"), file=sys.stderr)
    figures = {"minutes": options.minutes, "clients": options.clients} | run.figures()
    text = json.dumps(figures, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    drifts = [life["memory_drift_percent"] for life in figures["lives"]]
    return 1 if run.wrong or run.counts["lost"] or max(drifts) > MAX_DRIFT_PERCENT else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
