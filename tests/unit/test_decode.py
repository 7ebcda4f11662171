"""Tokens to text, one by one and whole: no half characters, nothing lost, on tokenizers of each kind."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shadowpeft.data.actions import parser
from shadowpeft.decode import Decoder, TokenBytes, decode

SPECIAL = ["<pad>", "<eos>"]


def fast(made, **options):
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", **options)


def byte_level(**options):
    """One token a byte, as GPT-2 and its kin write bytes, and one that holds a space and a third of a character."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġå"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("Ġ", "å")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return fast(made, **options)


def byte_fallback():
    """Characters, words with a leading space, and a token for each byte of the others, as Llama 2 has them."""
    words = [*SPECIAL, "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", ".", "▁a", "开", "�"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return fast(made)


KINDS = {
    "byte level": byte_level(),
    "cleans up spaces": byte_level(clean_up_tokenization_spaces=True),
    "byte fallback": byte_fallback(),
}
UTF8 = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def streamed(tokenizer, ids):
    decoder = Decoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    return [*pieces, decoder.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=UTF8)
@example(text="▁ a▁")
def test_a_text_comes_back_and_every_piece_is_whole(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    text = text.replace("▁", " ") if kind == "byte fallback" else text  # how such a tokenizer writes a space
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids) == text
    assert "".join(pieces).count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
    read = b"".join(map(TokenBytes(tokenizer), ids))
    assert read.decode() == (" " + text if kind == "byte fallback" and text else text)
    for cut in range(len(ids)):  # an answer that was cut off: whole characters, and the beginning of the text
        assert text.startswith("".join(streamed(tokenizer, ids[:cut])))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_whatever_the_tokens_streamed_is_decoded(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=12))  # a model may have more rows than tokens
    assert "".join(streamed(tokenizer, ids)) == decode(tokenizer, ids)


def test_a_tokenizer_that_cleans_up_spaces_loses_nothing():
    text = "it 's . well , yes ! do n't"
    for kind in ("byte level", "cleans up spaces"):
        tokenizer = KINDS[kind]
        assert "".join(streamed(tokenizer, tokenizer(text).input_ids)) == text


@pytest.mark.parametrize("skill", ["Sit", "坐下", "Öffnen", "Свет", "ライト"])
def test_skills_in_all_letters_are_known_as_soon_as_they_are_said(skill):
    tokenizer = KINDS["byte level"]
    ids = tokenizer(f"[{skill}()] ok").input_ids
    parse, decoder, text, known = parser([skill]), Decoder(tokenizer), "", []
    for token in ids:
        text += decoder.push(token)
        known.append(parse(text))
    assert known.index(skill) == len(f"[{skill}()]".encode()) - 1
    assert set(known[: known.index(skill)]) == {None}


def test_special_tokens_are_kept_on_request():
    tokenizer = KINDS["byte level"]
    ids = tokenizer("a<eos>b").input_ids
    assert decode(tokenizer, ids) == "ab"
    assert decode(tokenizer, ids, skip_special_tokens=False) == "a<eos>b"
