"""Text and conversations that are hard on a tokenizer, drawn by hypothesis and collected, to be asked in one go."""

from functools import cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanollm.text.chat import Conversation, Message, template_for
from nanollm.text.tokenizer import MARKS

TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)
ALL_MARKS = ("<pad>", "<unk>", "<s>", "</s>", *MARKS)
TEMPLATE = template_for(ALL_MARKS)
SPELLINGS = [*ALL_MARKS, "<0x41>", "<0x0A>", "<|", "|>", "<|end|", "<|end |>", "end|>", "</s", "\\x7c"]
INJECTIONS = [
    "{{ 7*7 }}",
    "{% raw %}",
    "{%- endif -%}",
    "{{ bos_token }}",
    "{# x #}",
    "{{ raise_exception('x') }}",
    "$",
]
WORDS = [
    "the",
    " the",
    " sea",
    "The boat",
    "na\u00efve",
    " \u65e5\u672c\u8a9e",
    "\U0001f469\u200d\U0001f52c",
    "e\u0301",
]
RUNS = [
    " " * 7,
    " " * 300,
    "\n" * 3,
    "\t\t",
    "\r\n",
    "\0",
    "\0\0",
    "=" * 40,
    "aaaa",
    "2024",
    "1,080.50",
    "\u00a0",
    "\u3000",
]
RARE = ["\u2585", "\ufffd", "\ufeff", "\u2047", "\u0378", "\u202e", "\x7f", "\x1b[0m", "\x85", "\u2028", "\U0010ffff"]
LONG = [" " * 20_000, "\n" * 9999, "a" * 20_000, "ab" * 9999, "\0" * 3000, "1" * 3000, "\U0001f600" * 3000]
CHARACTERS = st.characters(exclude_categories=["Cs"])

parts = CHARACTERS | st.sampled_from("\u2581 \n<|>/s0") | st.sampled_from(SPELLINGS + INJECTIONS + WORDS + RUNS + RARE)
texts = st.text(CHARACTERS) | st.lists(parts, max_size=12).map("".join)
"""Any text but lone surrogates, with what is troublesome made likely."""
says_no_mark = texts.filter(lambda text: text and not any(mark in text for mark in ALL_MARKS))


@st.composite
def conversations(draw, contents=says_no_mark):
    """An optional system message, then one to six of user and assistant in turn."""
    system = [Message("system", draw(contents))] if draw(st.booleans()) else []
    turns = draw(st.integers(1, 6))
    return Conversation((*system, *(Message(("user", "assistant")[n % 2], draw(contents)) for n in range(turns))))


def drawn(strategy, count):
    """A list of (about) `count` different values."""
    found = []

    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(value):
        found.append(value)

    collect()
    return found


@cache
def many_texts():
    """100,000 of them, drawn once for all tests: that takes minutes."""
    return drawn(texts, 100_000)


def as_messages(conversation):
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def first_difference(questions, ours, theirs):
    """The shortest question that is answered in two ways, with both answers; None if all are alike."""
    different = [each for each in zip(questions, ours, theirs, strict=True) if each[1] != each[2]]
    return min(different, key=lambda each: len(str(each[0])), default=None)
