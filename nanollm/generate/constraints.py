"""Constraints: which tokens may come next, so that a reply follows a JSON schema, a regular expression, a list of
choices, or the arguments of a function.

A constraint is a grammar of bytes in Lark's form. llguidance compiles it; a mask of the vocabulary comes of it before
each token. The vocabulary has a piece for every byte, so that whatever a grammar allows can be spelled; marks are
never allowed, but for the end where the grammar may end, and the mark of a call where the grammar names it.

Source: github.com/guidance-ai/llguidance, docs/syntax.md and docs/json_schema.md.
"""

import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from nanollm.extras import require
from nanollm.text.chat import Calls, reply_ends
from nanollm.text.tokenizer import CALL, Tokenizer

MAX_SIZE = 2**17
"""Characters of a grammar. One of this size takes about a second to compile, one that people write milliseconds."""
MAX_COMPILE_S, MAX_WAIT_S = 0.3, 3.0
"""Some short patterns take years: their compilation is tried out in a process that ends after so many seconds of a
processor, or, where others keep the processor busy, of the clock."""
HAS_TIMER = hasattr(signal, "setitimer")  # not on Windows, where the clock decides
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "max_items_in_row": 2000,
    "verbose_errors": False,
}
"""A mask takes milliseconds at worst, because all rows of the engine wait for it."""
MAX_REASON = 300  # characters

# --- grammars ---

TEXT = "/(?s:.*)/"
OBJECT: Mapping[str, Any] = {"type": "object"}
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As json.dumps writes, and training data with it. Free spaces invite a small model to write nothing else."""


def json_rule(schema: Mapping[str, Any], *, is_strict: bool = True) -> str:
    """JSON by a schema; without is_strict, keywords that cannot be followed are passed over."""
    options = LAYOUT if is_strict else {**LAYOUT, "lenient": True, "coerce_one_of": True}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def regex_rule(pattern: str) -> str:
    """Text that the whole pattern matches, in the words of Rust's regex crate."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(pattern, '')}/"


def choice_rule(choices: Sequence[str]) -> str:
    """One of the texts."""
    return " | ".join(map(json.dumps, choices))


def reply_grammar(reply: str, tokenizer: Tokenizer, calls: Calls) -> str:
    """A reply by its rule, or calls of functions; free text may come before calls.

    Only where a call is certain, or a function is `strict`, is a schema refused that cannot be followed altogether.
    """
    functions, is_required, is_parallel = calls
    if not functions:
        return f"start: {reply}"
    number = {(True, True): "+", (True, False): "", (False, True): "*", (False, False): "?"}[is_required, is_parallel]
    called = f"(<[{tokenizer.mark_id(CALL)}]> call){number}"
    start = called if is_required else f"reply {called}" if reply == TEXT else f"reply | {called}"
    names = [f"call{place}" for place in range(len(functions))]
    lines = [f"start: {start}", f"reply: {reply}"[: None if "reply" in start else 0], f"call: {' | '.join(names)}"]
    for rule, function in zip(names, functions, strict=True):
        schema = {"type": "object", **(function.get("parameters") or {"additionalProperties": False})}
        arguments = json_rule(schema, is_strict=is_required or bool(function.get("strict")))
        lines += [f"{rule}: {json.dumps(function['name'] + ' ')} {rule}_arguments", f"{rule}_arguments: {arguments}"]
    return "\n".join(lines)


# --- masks ---


class Constraint:
    """What one reply may say, and how far it has come (`Request.constraint`)."""

    def __init__(self, matcher: Any, ends: frozenset[int], size: int) -> None:
        self._matcher, self._ends, self._size = matcher, ends, size

    def allow(self, address: int) -> None:
        """Set the bit of each token that may come next, in a row of zeros there with a bit for each token."""
        self._matcher.unsafe_compute_mask_ptr(address, -(-self._size // 32) * 4)

    def take(self, token: int) -> bool:
        """Go on with this token, if it may come next."""
        if token in self._ends:
            return bool(self._matcher.is_accepting())
        return token < self._size and self._matcher.try_consume_tokens([token]) == 1

    @property
    def reason(self) -> str:
        """Why nothing may come next."""
        return f"the grammar cannot be followed any further: {told(self._matcher)}"

    def copy(self) -> "Constraint":
        """The same for another reply."""
        return Constraint(self._matcher.deep_copy(), self._ends, self._size)


class Compiler:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        require("constraining a reply", ["llguidance"], "serve")
        import llguidance

        self.tokenizer, self.ends = tokenizer, reply_ends(tokenizer)
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(Vocabulary(tokenizer)), eos_token=sorted(self.ends)
        )

    def compile(self, grammar: str) -> Constraint:
        """ValueError with the reason for a grammar that cannot be followed."""
        import llguidance

        # Unforced: the model chooses how to spell what can only be spelled in several ways.
        grammar = f'%llguidance {{"no_forcing": true}}\n{grammar}'
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_stopped() and not matcher.is_accepting():
            raise ValueError(told(matcher))
        return Constraint(matcher, self.ends, self.tokenizer.vocab_size)


class Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode, marks = tokenizer.encode, tokenizer.symbols
        self.bos_token_id, self.eos_token_id, self.special_token_ids = tokenizer.bos_id, tokenizer.eos_id, [*marks]
        # A mark has no bytes; 0xFF, which no text holds, keeps its name apart from text.
        self.tokens = [
            b"\xff" + marks[token].encode() if token in marks else tokenizer.bytes_of(token)
            for token in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


def told(matcher: Any) -> str:
    """The reason of llguidance, without the place in a grammar that nobody has seen."""
    reason = re.sub(r"\n +\d+ \| .*|<state>.*|<non-verbose/>", "", matcher.get_error(), flags=re.DOTALL)
    reason = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: | \(in regex\)", "", reason)
    return " ".join(reason.split()).replace("NoExtensionBias", "")[:MAX_REASON] or "nothing fits it"


# --- grammars of strangers ---


class Examiner:
    """Tries grammars out in a process of its own, which is ended where one takes too long. One thread at a time."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self._process: SpawnProcess | None = None
        self._is_ready = False

    def compile(self, grammar: str) -> Constraint:
        """As Compiler's; ValueError also for one that is too large, or takes too long."""
        if len(grammar) > MAX_SIZE:
            raise ValueError(f"it has {len(grammar):,} characters as a grammar, expected at most {MAX_SIZE:,}")
        self.start()
        try:
            if not self._is_ready:
                self._pipe.recv()
                self._is_ready = True
            self._pipe.send(grammar)
            if not self._pipe.poll(MAX_WAIT_S if HAS_TIMER else MAX_COMPILE_S):
                raise TimeoutError
            reason = self._pipe.recv()
        except (EOFError, OSError) as error:  # TimeoutError is one
            code = self.stop()
            self.start()  # for the next
            is_slow = isinstance(error, TimeoutError) or (HAS_TIMER and code == -signal.SIGPROF)
            what = f"takes longer than {MAX_COMPILE_S} s" if is_slow else "crashes"
            raise ValueError(f"compiling it {what}; ask for something simpler") from None
        if reason:
            raise ValueError(reason)
        return self.compiler.compile(grammar)

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self._process is None:
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=examine, args=[self.compiler.tokenizer, theirs], daemon=True)
            self._process.start()
            theirs.close()
            self._is_ready = False

    def stop(self) -> int | None:
        """End it at once: what it does need not be finished. Returns its exit code."""
        if self._process is None:
            return None
        self._process.kill()
        self._process.join()
        self._pipe.close()
        code, self._process = self._process.exitcode, None
        return code


def examine(tokenizer: Tokenizer, pipe: Connection) -> None:
    """The process: answers each grammar with what is wrong with it, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it
    if hasattr(os, "nice"):
        os.nice(10)  # who waits for tokens goes first
    compiler = Compiler(tokenizer)
    pipe.send(None)
    while True:
        try:
            grammar = pipe.recv()
        except EOFError:
            return
        if HAS_TIMER:
            signal.setitimer(signal.ITIMER_PROF, MAX_COMPILE_S)
        try:
            compiler.compile(grammar)
            reason = None
        except ValueError as error:
            reason = str(error)
        if HAS_TIMER:
            signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(reason)
