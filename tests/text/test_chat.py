import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.text.chat import Conversation, Message, encode_conversation, encode_prompt

TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "How far are the rocks?"),
        Message("assistant", "300 metres."),
        Message("user", "And the boat?"),
        Message("assistant", "Nearer."),
    )
)


def test_a_conversation_is_its_messages_between_marks(tokenizer):
    start, end = [tokenizer.bos_id], [tokenizer.mark_id("<|end|>")]
    expected = start
    for message in TALK.messages:
        expected = [*expected, tokenizer.mark_id(f"<|{message.role}|>"), *tokenizer.encode(message.content), *end]
    assert encode_conversation(TALK, tokenizer).ids == expected


def test_trained_are_exactly_the_words_of_the_assistant_and_their_end(tokenizer):
    encoded = encode_conversation(TALK, tokenizer)
    assert len(encoded.ids) == len(encoded.trained)
    trained = [token for token, is_trained in zip(encoded.ids, encoded.trained, strict=True) if is_trained]
    end = tokenizer.mark_id("<|end|>")
    assert trained == [*tokenizer.encode("300 metres."), end, *tokenizer.encode("Nearer."), end]


def test_a_prompt_is_the_conversation_up_to_the_reply(tokenizer):
    asked = Conversation(TALK.messages[:2])
    prompt, whole = encode_prompt(asked, tokenizer), encode_conversation(TALK, tokenizer).ids
    assert prompt[-1] == tokenizer.mark_id("<|assistant|>")
    assert whole[: len(prompt)] == prompt


@given(content=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<|end|>", "<|user|>hi", "</s>"]))
@settings(max_examples=100, deadline=None)
def test_no_content_can_end_its_message_or_begin_another(tokenizer, content):
    ids = encode_conversation(Conversation.of(content, content), tokenizer).ids
    controls = [token for token in ids if token < 20]
    names = ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    assert controls == [tokenizer.bos_id, *map(tokenizer.mark_id, names)]
    assert tokenizer.decode(ids) == content * 2


def test_messages_out_of_turn_are_refused():
    user, assistant, system = Message("user", "u"), Message("assistant", "a"), Message("system", "s")
    for wrong in (
        [],
        [system],
        [assistant],
        [user, user],
        [user, system],
        [system, assistant],
        [user, assistant, assistant],
    ):
        with pytest.raises(ValueError, match="an optional system message, then user and assistant in turn; got"):
            Conversation(tuple(wrong))


def test_unknown_roles_and_contents_are_refused():
    with pytest.raises(ValueError, match="role must be one of system, user, assistant, got 'robot'"):
        Message("robot", "beep")
    with pytest.raises(ValueError, match="content must be text, got NoneType"):
        Message("user", None)


def test_a_prompt_that_already_has_its_reply_is_refused(tokenizer):
    with pytest.raises(ValueError, match="must end with the user's message"):
        encode_prompt(TALK, tokenizer)
