"""Every answer of a conversation as a target: spans, weights, templates that rewrite earlier turns, runs."""

import pytest

from chatbase import CHATML, chat_tokenizer, run_file, save_base, write_rows
from shadowpeft.core.losses import IGNORE
from shadowpeft.data import chat
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import train

OPTIONS = {"max_length": 512, "every_turn": True}
TALK = {
    "messages": [
        {"role": "system", "content": "a dog"},
        {"role": "user", "content": "sit"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "bye!"},
    ]
}


def encoded(row, words=None, **options):
    checked = chat.check_row(row, "here", every_turn=True)
    return chat.encode([checked], words or chat_tokenizer(), **{**OPTIONS, **options})


def learnt(words, sequence, key="labels"):
    """The texts between masked tokens."""
    pieces, inside = [], False
    for target in sequence.features()[key]:
        if target != IGNORE:
            pieces = [*pieces, []] if not inside else pieces
            pieces[-1].append(target)
        inside = target != IGNORE
    return [words.decode(piece) for piece in pieces]


def test_every_answer_is_learnt_with_its_end_and_nothing_else():
    words = chat_tokenizer()
    (several,) = encoded(TALK, words)
    assert learnt(words, several) == ["ok<|im_end|>", "no<|im_end|>", "bye!<|im_end|>"]
    assert learnt(words, several, "shadow_labels") == learnt(words, several)
    (last,) = chat.encode([chat.check_row(TALK, "here")], words, max_length=512)
    assert several.ids == last.ids  # the same tokens, more of them learnt
    assert learnt(words, last) == ["bye!<|im_end|>"]
    assert words.decode(several.learnt) == "ok<|im_end|>no<|im_end|>bye!<|im_end|>"
    alone = several.alone()
    assert (alone.base, alone.shadow, alone.spans) == (False, True, several.spans)


def test_a_weight_of_0_leaves_an_answer_out():
    words = chat_tokenizer()
    messages = [dict(m) for m in TALK["messages"]]
    messages[2]["weight"] = 0
    messages[4]["weight"] = 1
    (several,) = encoded({"messages": messages}, words)
    assert learnt(words, several) == ["no<|im_end|>", "bye!<|im_end|>"]
    assert several.ids == encoded(TALK, words)[0].ids
    messages[4]["weight"] = 0
    assert learnt(words, encoded({"messages": messages}, words)[0]) == ["bye!<|im_end|>"]
    messages[4]["weight"] = 0.5
    with pytest.raises(DataError, match=r"here: message 5 has weight 0\.5 but is learnt with weight 1 or 0"):
        encoded({"messages": messages}, words)
    messages[4]["weight"] = 1
    with pytest.raises(DataError, match="only the last answer is learned"):  # without assistant_only_loss
        chat.check_row({"messages": messages}, "here")


def test_one_turn_is_as_before_and_paths_keep_their_own_answers():
    words = chat_tokenizer()
    row = {"prompt": "sit", "response": "[Sit()] fine", "shadow_response": "[Sit()]"}
    assert encoded(row, words) == chat.encode([chat.check_row(row, "here")], words, max_length=512)
    talk = {**TALK, "shadow_response": "[REMOTE]"}
    base, shadow = encoded(talk, words)
    assert (base.base, base.shadow, shadow.base, shadow.shadow) == (True, False, False, True)
    assert len(learnt(words, base)) == 3
    assert learnt(words, shadow, "shadow_labels") == ["[REMOTE]<|im_end|>"]


GREETED = {
    "conversations": [
        {"from": speaker, "value": text}
        for speaker, text in [("gpt", "hello"), ("human", "sit"), ("gpt", "ok"), ("human", "bye"), ("gpt", "bye!")]
    ]
}


def test_an_answer_that_begins_the_conversation_is_read_but_not_learnt():
    words = chat_tokenizer()
    (several,) = encoded(GREETED, words)
    assert learnt(words, several) == ["ok<|im_end|>", "bye!<|im_end|>"]
    assert words.decode(several.ids).startswith("<|im_start|>assistant\nhello<|im_end|>")
    (last,) = encoded({"conversations": GREETED["conversations"][:3]}, words)
    assert learnt(words, last) == ["ok<|im_end|>"]
    picky = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
    for every_turn in (True, False):
        with pytest.raises(DataError, match=r"^here: the chat template refuses .*the user begins.*; reorder them"):
            encoded(GREETED, chat_tokenizer(picky), every_turn=every_turn)


FORGETS = CHATML.replace("{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% else %}...{% endif %}")
NO_END = CHATML.replace("<|im_end|>\n", "\n")


@pytest.mark.parametrize(
    ("template", "message"), [(FORGETS, "writes an answer otherwise once"), (NO_END, "does not close an answer")]
)
def test_a_template_that_cannot_do_it_is_refused(template, message):
    with pytest.raises(DataError) as refused:
        encoded(TALK, chat_tokenizer(template))
    assert str(refused.value).startswith("here: the tokenizer's chat template")
    assert message in str(refused.value)


def test_a_run_learns_every_turn(tmp_path):
    base, rows = save_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", [TALK] * 8)
    sections = {"data": {"assistant_only_loss": True, "validation": rows}, "training": {"max_steps": 20}}
    end = train(parse_run(run_file(tmp_path / "run", base, rows, **sections), "here"), quiet=True)
    both = {"data": {"assistant_only_loss": True, "validation": rows}, "training": {"max_steps": 1, "learning_rate": 1e-12}}
    start = train(parse_run(run_file(tmp_path / "start", base, rows, **both), "here"), quiet=True)
    assert end["eval_task_loss"] < 0.9 * start["eval_task_loss"]
    assert end["eval_shadow_loss"] < 0.9 * start["eval_shadow_loss"]
    with pytest.raises(ConfigError, match=r"assistant_only_loss learns every answer but data\.shadow_answers is 'action'"):
        parse_run(run_file(tmp_path / "x", base, rows, data={"assistant_only_loss": True, "shadow_answers": "action"}), "x")
