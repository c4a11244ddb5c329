"""How long does `nanollm --help` take, from the first word to the last, beside Python that does nothing?

Its limit is half a second: a command imports torch only when it computes.
"""

import argparse
import subprocess
import sys
from typing import Any

from benchmarks.measuring import in_turns, seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    def command(*words: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True))

    sides = {"python": lambda: command("-c", "pass"), "nanollm --help": lambda: command("-m", "nanollm", "--help")}
    return {"unit": "s", **in_turns(sides, options.repeats, warm_up=True)}
