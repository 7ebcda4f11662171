"""A trimmed vocabulary: the data are split as before, logits of kept tokens are unchanged, any text still round-trips."""

import json
import random

import pytest
import torch

import edges
import tiny
from chatbase import write_rows
from shadowpeft.apps.export import Vocabulary
from shadowpeft.data.chat import check_row, prompt_ids
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.export import gguf, verify, vocab
from shadowpeft.train.rows import read_rows, system_of, tools_of_run

ROWS = [
    check_row({"prompt": "Sit down, please", "response": "[Sit()] the dog sits"}, "1"),
    check_row({"prompt": "站起来", "response": "ok", "shadow_response": "[REMOTE] 42"}, "2"),
]


@pytest.fixture(scope="module", params=[("gpt-2", True, False), ("qwen2", False, True)])
def trimmed(request):
    kind, tied, bos = request.param
    source, words = edges.model(tie_word_embeddings=tied), edges.tokenizer(kind, bos=bos)
    return source, words, vocab.trim(source, words, vocab.needed_tokens(words, ROWS, "You are a dog."))


def old_ids(trimmed, text, **options):
    return trimmed.kept[trimmed.tokenizer(text, **options).input_ids].tolist()


def test_the_data_are_split_as_before(trimmed):
    _, words, small = trimmed
    assert len(small.tokenizer) == len(small.kept) < len(words)
    for row in ROWS:
        chat = [{"role": "system", "content": "You are a dog."}, *row["messages"]]
        assert small.kept[prompt_ids(small.tokenizer, chat)].tolist() == prompt_ids(words, chat)
        for text in (row["response"], row["shadow_response"]):
            if text is not None:
                assert old_ids(small, text) == words(text).input_ids  # with what a post-processor puts before it


def test_whatever_needs_kept_tokens_alone_is_split_as_before_and_the_rest_still_round_trips(trimmed):
    _, words, small = trimmed
    letters, kept, draw = "".join(edges.TEXTS), set(small.kept.tolist()), random.Random(0)
    same = 0
    for _ in range(300):
        text = "".join(draw.choice(letters) for _ in range(draw.randint(1, 12)))
        expected = words(text, add_special_tokens=False).input_ids
        found = small.tokenizer(text, add_special_tokens=False).input_ids
        if kept.issuperset(expected):
            same += 1
            assert small.kept[found].tolist() == expected
        assert small.tokenizer.decode(found) == text
    assert 10 < same < 300


def test_logits_of_kept_tokens_are_the_sources(trimmed):
    source, _, small = trimmed
    new = torch.randint(0, len(small.kept), (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = source(input_ids=small.kept[new]).logits[..., small.kept]
        found = small.model(input_ids=new).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # a smaller product adds in another order
    report = verify.compare(source, small.model, small.tokenizer, small.kept)
    assert report["tokens_equal"] == report["tokens"] == 128
    assert report["tokens_kept"] < 128  # a random model would have said other tokens too


def test_the_source_is_untouched_and_the_copy_is_smaller(trimmed):
    source, _, small = trimmed
    assert source.config.vocab_size == 452
    assert small.model.config.vocab_size == len(small.kept)
    assert small.model.config.tie_word_embeddings == source.config.tie_word_embeddings
    tables = 1 if source.config.tie_word_embeddings else 2
    assert source.num_parameters() - small.model.num_parameters() == tables * 64 * (452 - len(small.kept))


def test_ids_in_the_configuration_move_along():
    source, words = edges.model(bos_token_id=1, eos_token_id=2, pad_token_id=0), edges.tokenizer()
    tool = words.convert_tokens_to_ids("<tool>")
    source.generation_config.eos_token_id = [2, tool]
    small = vocab.trim(source, words, [5])
    moved = small.tokenizer.convert_tokens_to_ids("<tool>")
    assert moved != tool
    assert small.model.generation_config.eos_token_id == [2, moved]
    assert source.generation_config.eos_token_id == [2, tool]
    assert small.tokenizer.chat_template == words.chat_template
    assert small.tokenizer.eos_token_id == small.model.config.eos_token_id == 2


def test_all_halves_are_kept():
    content = {
        "model": {
            "vocab": {t: i for i, t in enumerate(["a", "b", "c", "d", "ab", "bc", "abc", "abcd", "cd"])},
            "merges": [["a", "b"], "b c", ["ab", "c"], ["a", "bc"], ["abc", "d"], ["c", "d"]],
        },
        "added_tokens": [{"id": 9}],
    }
    assert vocab.closure(content, {6}) == [0, 1, 2, 3, 4, 5, 6, 9]  # abc by both ways; neither abcd nor cd
    assert vocab.closure(content, {8}) == [0, 1, 2, 3, 8, 9]


def test_the_same_vocabulary_in_gguf(trimmed, tmp_path):
    source, _, small = trimmed
    report = gguf.write(small.model, small.tokenizer, tmp_path / "m.gguf", "f32")
    assert report["pre_tokenizer"] == ("gpt-2" if source.config.tie_word_embeddings else "qwen2")
    found = verify.compare(source, gguf.read(tmp_path / "m.gguf"), small.tokenizer, small.kept)
    assert found["tokens_equal"] == found["tokens"]
    assert found["max_logit_difference"] < 1e-4


def test_refusals():
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        vocab.trim(tiny.base(), tiny.tokenizer(), [3])
    source = edges.model()
    source.generation_config.suppress_tokens = [7]
    with pytest.raises(UnsupportedModelError, match="suppress_tokens"):
        vocab.trim(source, edges.tokenizer(), [3])
    with pytest.raises(UnsupportedModelError, match="has no row"):
        vocab.trim(edges.model(vocab_size=300), edges.tokenizer(), [3])


def test_a_saved_copy_reads_the_same(trimmed, tmp_path):
    from transformers import AutoTokenizer

    _, _, small = trimmed
    small.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in edges.TEXTS:
        assert again(text).input_ids == small.tokenizer(text).input_ids
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) <= len(small.kept)


@pytest.fixture
def device(monkeypatch):
    """A model, and a tokenizer that knows whole words of its actions."""
    monkeypatch.setattr(edges, "SENTENCES", [*edges.SENTENCES, *['[REMOTE] [Dim(percent=30)] [Dim(room="hall")]'] * 20])
    return edges.model(), edges.tokenizer()


PROPERTIES = {"room": {"type": "string"}, "percent": {"type": "integer"}}
DIM = {"name": "Dim", "parameters": {"type": "object", "properties": PROPERTIES}}


def called(**arguments):
    call = {"type": "function", "function": {"name": "Dim", "arguments": json.dumps(arguments)}}
    turns = [{"role": "user", "content": "dim it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": turns}


def test_calls_of_a_device_keep_their_tokens(device, tmp_path):
    source, words = device
    write_rows(tmp_path / "rows.jsonl", [called(percent=30), called(room="hall")])
    (tmp_path / "actions.json").write_text(json.dumps([{"type": "function", "function": DIM}]))
    rows = Vocabulary(str(tmp_path / "rows.jsonl"), str(tmp_path / "actions.json"))
    _, small, kept = rows.trim(source, words)
    assert len(kept) < len(words)
    for text in ("[Dim(percent=30)]", '[Dim(room="hall")]'):
        ids = words(text, add_special_tokens=False).input_ids
        assert kept[small(text, add_special_tokens=False).input_ids].tolist() == ids
        assert len(ids) < len(text)  # so there was something to lose


def test_rows_that_call_need_the_tools(device, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [called(percent=30)])
    with pytest.raises(ConfigError, match=r"rows.jsonl, line 1 calls tools, .* name them with --skills actions.json"):
        Vocabulary(str(tmp_path / "rows.jsonl")).trim(*device)


def test_handing_on_keeps_its_tokens_where_rows_have_words_for_it(device, tmp_path):
    source, words = device
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "why", "response": "so"}])
    _, small, kept = Vocabulary(str(tmp_path / "rows.jsonl")).trim(source, words)
    ids = words("[REMOTE]", add_special_tokens=False).input_ids
    assert kept[small("[REMOTE]", add_special_tokens=False).input_ids].tolist() == ids
    assert len(ids) < len("[REMOTE]")


@pytest.mark.parametrize("name", ["robot_oos", "robot_tools"])
def test_packaged_sets_bring_their_tools_and_their_system_message(name, device):
    source, words = device
    _, small, kept = Vocabulary(name).trim(source, words)
    part = read_rows(name, "train", tools=tools_of_run(name, None))[::97]
    for row in part:
        chat = [{"role": "system", "content": system_of(name, None)}, *row["messages"]]
        assert kept[prompt_ids(small, chat)].tolist() == prompt_ids(words, chat)
        assert kept[small(row["response"]).input_ids].tolist() == words(row["response"]).input_ids
