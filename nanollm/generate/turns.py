"""Turns: an environment answers what a model says, within one request.

When a message of the model ends, the environment's answer is appended as given ids, as a tool's words are: the whole
conversation is one reply of many parts, read once, of which only what the model sampled is trained.
"""

import math
from collections.abc import Sequence

from nanollm.generate.request import Completion, MakeTool
from nanollm.sources.environments import Environment, Verdict
from nanollm.text.chat import reply_ends, reply_text, transcript
from nanollm.text.tokenizer import ASSISTANT, END, USER, Tokenizer

MAX_TURNS = 32
"""Messages of the model after which a conversation that is still going on ends unsolved."""


class Turns:
    """One conversation: told each of the model's tokens, it returns what follows (`Request.tool`)."""

    def __init__(self, environment: Environment, tokenizer: Tokenizer, make_tool: MakeTool | None = None) -> None:
        self.environment, self.tokenizer, self.make_tool = environment, tokenizer, make_tool
        self.ends = reply_ends(tokenizer)
        self.turns = 0
        self.outcome: Verdict = 0.0
        """0 until the environment says otherwise: a conversation that is cut off is not solved."""
        self._listen()

    def _listen(self) -> None:
        self.message: list[int] = []
        self.tool = self.make_tool() if self.make_tool else None

    def __call__(self, token: int) -> Sequence[int]:
        if token not in self.ends:
            given = self.tool(token) if self.tool else ()
            self.message += [token, *given]
            return given
        self.turns += 1
        answer = self._step(reply_text(self.message, self.tokenizer))
        if answer is None or self.turns == MAX_TURNS:
            return ()
        self._listen()
        mark = self.tokenizer.mark_id
        return [mark(USER), *self.tokenizer.encode(answer), mark(END), mark(ASSISTANT)]

    def _step(self, reply: str) -> str | None:
        """The environment's answer; None when the conversation is over, with its outcome kept."""
        try:
            answer = self.environment.step(reply)
        except Exception as error:  # of someone's own environment: one conversation must not end a run
            self.outcome = f"raised {type(error).__name__}: {error}"
            return None
        if isinstance(answer, str) and answer:
            return answer
        is_reward = isinstance(answer, int | float) and math.isfinite(answer)
        self.outcome = float(answer) if is_reward else f"returned {answer!r:.60}, expected a message or a finite number"
        return None


def outcome_of(completion: Completion) -> Verdict | None:
    """What the environment of a conversation said; None for a reply without one."""
    turns = completion.request.tool
    return turns.outcome if isinstance(turns, Turns) else None


def said(ids: Sequence[int], outcome: Verdict | None, tokenizer: Tokenizer) -> str:
    """The text that is graded and shown: of a conversation, which has an outcome, all of its messages."""
    return reply_text(ids, tokenizer) if outcome is None else transcript(ids, tokenizer)
