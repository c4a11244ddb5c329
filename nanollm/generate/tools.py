"""Tools: functions that write into a reply while a model writes it.

A tool sees the text of a reply so far and returns what follows. The engine appends it as ids behind those that were
sampled, which are never tokenised again: what a model was trained on and what it reads stay the same. Given ids have
no log-probability and are not trained.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from nanollm.progress import say
from nanollm.text.chat import Tool
from nanollm.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # both bring torch, for which preprocess would wait two seconds
    from nanollm.bundle import Bundle
    from nanollm.generate.request import MakeTool

TOOLS = {"calculator": "nanollm.sources.calculator", "python": "nanollm.sources.python_tool"}
"""Modules, each with a function of the tool's name: imported when it is asked for."""
ON_REQUEST = ("python",)
"""Tools that a bundle cannot bring with it: they run what a model writes."""


class ToolCaller:
    """The tools of one reply, asked after each of its tokens."""

    def __init__(self, tools: Sequence[Tool], tokenizer: Tokenizer):
        self.tools, self.tokenizer = tools, tokenizer
        self.spelled = b""

    def __call__(self, token: int) -> list[int]:
        """The ids that follow this one, the next of the reply; mostly none."""
        if not (spelled := self.tokenizer.bytes_of(token)):
            return []
        self.spelled += spelled
        reply = self.spelled.decode(errors="replace")
        for tool in self.tools:
            if given := tool(reply):
                self.spelled += given.encode()
                return self.tokenizer.encode(given)
        return []


def with_tools(bundle: "Bundle", names: Sequence[str] | None) -> "Bundle":
    """The bundle with these tools in place of those that it was trained with; ["none"]: none.

    None: it keeps them, but for those that must be asked for by name.
    """
    chosen = [] if names == ["none"] else list(bundle.tools if names is None else names)
    if names is None and (left_out := [name for name in chosen if name in ON_REQUEST]):
        say(f"this model was trained with {', '.join(left_out)}, which runs what it writes: ask for it with --tools")
        chosen = [name for name in chosen if name not in ON_REQUEST]
    check_tools(chosen, bundle.tokenizer)
    return replace(bundle, tools=chosen)


def tool_caller(bundle: "Bundle") -> "MakeTool | None":
    """What makes the `Request.tool` of each reply of a bundle; None without tools."""
    tools = check_tools(bundle.tools, bundle.tokenizer)
    return partial(ToolCaller, tools, bundle.tokenizer) if tools else None


def check_tools(names: Sequence[str], tokenizer: Tokenizer) -> list[Tool]:
    """The tools of these names. ValueError for one that is not known or whose answers this tokenizer cannot spell."""
    for name in names:
        if name not in TOOLS:
            raise ValueError(f"tools must be of {', '.join(TOOLS)}, got {name!r}")
    sample = "-0.123456789>>"
    if names and tokenizer.decode(tokenizer.encode(sample)) != sample:
        raise ValueError(f"this tokenizer cannot spell {sample!r}, so a model of it cannot read a tool's answers")
    return [getattr(import_module(TOOLS[name]), name) for name in names]
