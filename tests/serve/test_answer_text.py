"""Tokens that are parts of characters: the text, the bytes, the offsets and the skill that come of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatbase import chat_tokenizer
from shadowpeft.data.actions import parser
from shadowpeft.serve.answers import ResponseBuilder
from shadowpeft.serve.requests import Finish, Request, SamplingParams
from shadowpeft.serve.router import Router, Scores
from shadowpeft.serve.sampling import Choice, append_token

TOKENIZER = chat_tokenizer()
END = TOKENIZER.eos_token_id
LETTERS = st.text(alphabet="ab[]() \u00e9\u0416\u7ad9\U0001f600\u2028", max_size=10)


def said(ids, until=None, **sampling):
    """The events of an answer of these tokens."""
    events = []
    request = Request([1], "m", SamplingParams(**{"max_tokens": 100, **sampling}), events.append, until)
    for token in ids:
        if not append_token(request, Choice(token, -0.1, 1.0, 0.1, [(token, -0.1)]), TOKENIZER, {END}):
            break
    *tokens, end = events
    assert isinstance(end, Finish)
    return tokens, end


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


@settings(deadline=None)
@given(text=LETTERS, stops=st.lists(LETTERS.filter(bool), max_size=2), cut=st.integers(0, 40))
def test_text_bytes_and_offsets_of_any_answer(text, stops, cut):
    ids = ids_of(text)
    assert not text or len(ids) == len(text.encode())  # a token a byte
    tokens, end = said([*ids, END], stop=tuple(stops))
    first = len(text)
    for n in range(len(text) + 1):  # the stop text that is whole first ends the answer
        found = [at for at in (text[:n].find(stop) for stop in stops) if at >= 0]
        if found:
            first = min(found)
            break
    assert "".join(token.text for token in tokens) + end.text == text[:first]
    if first == len(text):
        assert b"".join(token.raw for token in tokens) == text.encode()
        assert "".join(token.piece for token in tokens) == text
        told = ResponseBuilder(False, "m", 1, {})._logprobs(tokens)
        starts = [len(text.encode()[:n].decode(errors="ignore")) for n in range(len(ids))]
        assert told["text_offset"] == starts
        chat = ResponseBuilder(True, "m", 1, {})._logprobs(tokens)["content"]
        assert bytes(byte for entry in chat for byte in entry["bytes"]) == text.encode()
        assert [entry["top_logprobs"][0]["bytes"] for entry in chat] == [entry["bytes"] for entry in chat]
    if ids and cut:  # an answer that ends in the middle of a character holds the whole ones before it
        tokens, end = said(ids, max_tokens=min(cut, len(ids)))
        assert "".join(token.text for token in tokens) + end.text == text.encode()[:cut].decode(errors="ignore")


@pytest.mark.parametrize(
    "skill", ["Sit", "\u5750\u4e0b", "\u00d6ffnen", "\u0421\u0432\u0435\u0442", "\u30e9\u30a4\u30c8"]
)
def test_skills_in_any_letters_are_known(skill):
    router = Router(parser([skill]))
    tokens, _ = said([*ids_of(f"[{skill}()] ok"), END])
    decision = router.decide([token.piece for token in tokens], Scores.of(tokens))
    assert (decision.where, decision.action) == ("device", skill)
    _, end = said([*ids_of("[Nonsense()] and more \u5750 words than that, so that it is lost"), END], until=router.lost)
    assert end.reason == "until"
