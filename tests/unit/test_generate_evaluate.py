"""Answers in batches equal answers one by one, streamed equals whole, and evaluation counts what it says."""

import json
import math

import pytest
import torch

import shadowpeft
from chatbase import chat_model, chat_tokenizer, write_rows
from products import covering
from shadowpeft.apps.common import in_mode
from shadowpeft.data import chat
from shadowpeft.data.tasks import get_task
from shadowpeft.data.tasks.rows import Rows
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate import accuracy, answer_loss, evaluate_task, wilson
from shadowpeft.generate import answer, encode_prompts, routing_reason, stream
from tiny import adapt

PROMPTS = ["sit", "a much longer request, please", "x", "站起来", "another one of middle length"]


@pytest.fixture(scope="module")
def model():
    return adapt(chat_model(), auxiliary_loss_weight=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def ending(tokenizer):
    """A model whose every second answer or so ends early: the end token is made likely."""
    made = chat_model()
    with torch.no_grad():
        made.lm_head.weight[3] *= 3.0
    return adapt(made)


# -------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_batched_answers_are_those_given_one_by_one_in_order(model, tokenizer, mode):
    done = []
    with in_mode(model, mode) as runner:
        together = answer(runner, tokenizer, PROMPTS, max_new_tokens=8, batch_size=3, progress=done.append)
        alone = [answer(runner, tokenizer, [p], max_new_tokens=8)[0] for p in PROMPTS]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert len({a.text for a in together}) > 2  # not all the same, or order could not be told
    assert done == [3, 5]
    assert all(a.seconds > 0 for a in together)


def test_answers_end_where_the_end_token_is(tokenizer):
    model = ending(tokenizer)
    together = answer(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=5)
    alone = [answer(model, tokenizer, [p], max_new_tokens=12)[0] for p in PROMPTS]
    assert [(a.text, a.tokens) for a in together] == [(a.text, a.tokens) for a in alone]
    assert len({a.tokens for a in together}) > 1  # some end early
    assert min(a.tokens for a in together) < 12
    assert all("<|im_end|>" not in a.text for a in together)


def test_a_padding_token_that_is_the_end_token(tokenizer):
    model = ending(tokenizer)
    same = chat_tokenizer(pad="<|im_end|>")
    expected = [(a.text, a.tokens) for a in answer(model, tokenizer, PROMPTS, max_new_tokens=12)]
    assert [(a.text, a.tokens) for a in answer(model, same, PROMPTS, max_new_tokens=12)] == expected


def test_modes_answer_differently(model, tokenizer):
    found = []
    for mode in ("attached", "detached", "base"):
        with in_mode(model, mode) as runner:
            found.append(tuple(a.text for a in answer(runner, tokenizer, PROMPTS, max_new_tokens=8)))
    assert len(set(found)) == 3
    with pytest.raises(ConfigError, match="mode is 'cloud'"), in_mode(model, "cloud"):
        pass


def test_message_lists_and_system(model, tokenizer):
    plain = answer(model, tokenizer, ["sit"], max_new_tokens=6, system="be brief")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sit"}]
    assert answer(model, tokenizer, [turns], max_new_tokens=6, system="ignored")[0].text == plain[0].text
    assert answer(model, tokenizer, ["sit"], max_new_tokens=6)[0].text != plain[0].text
    assert answer(model, tokenizer, []) == []


def test_prompts_are_padded_on_the_left(tokenizer):
    inputs = encode_prompts(tokenizer, [[{"role": "user", "content": p}] for p in ("x", "longer")], "cpu")
    assert inputs["attention_mask"][0].tolist() == [0] * 5 + [1] * (inputs["input_ids"].shape[1] - 5)
    assert inputs["input_ids"][0, :5].tolist() == [tokenizer.pad_token_id] * 5
    assert tokenizer.decode(inputs["input_ids"][0, 5:]).endswith("<|im_start|>assistant\n")


def test_sampling_follows_the_seed(model, tokenizer):
    def drawn(seed):
        torch.manual_seed(seed)
        return [a.text for a in answer(model, tokenizer, PROMPTS, max_new_tokens=8, do_sample=True, temperature=2.0)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("how", ["answer", "stream"])
def test_a_prompt_that_does_not_fit(model, tokenizer, how):
    def ask(length):
        if how == "answer":
            return answer(model, tokenizer, ["x" * length], max_new_tokens=20)
        return list(stream(model, tokenizer, [{"role": "user", "content": "x" * length}], max_new_tokens=20))

    frame = len(tokenizer(chat.render_prompt(tokenizer, [{"role": "user", "content": ""}])).input_ids)
    with pytest.raises(
        DataError, match=rf"has {256 - 20 + 1} tokens and 20 more are asked for, but the model reads 256"
    ):
        ask(256 - 20 - frame + 1)
    assert ask(256 - 20 - frame)


@pytest.mark.parametrize(("ends", "mode"), covering([False, True], ["attached", "detached", "base"]))
def test_streamed_is_answered(model, tokenizer, mode, ends):
    model = ending(tokenizer) if ends else model
    with in_mode(model, mode) as runner:
        for prompt in PROMPTS[:3]:
            pieces = list(stream(runner, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens=10))
            assert "".join(pieces).strip() == answer(runner, tokenizer, [prompt], max_new_tokens=10)[0].text


def test_streaming_stops_at_the_turns_end_that_only_the_template_knows(tokenizer):
    made = ending(tokenizer)
    made.generation_config.eos_token_id = None
    other = chat_tokenizer(eos="<eos>")
    expected = answer(ending(tokenizer), tokenizer, PROMPTS, max_new_tokens=12)
    assert [a.tokens for a in answer(made, other, PROMPTS, max_new_tokens=12)] == [a.tokens for a in expected]
    pieces = list(stream(made, other, [{"role": "user", "content": PROMPTS[0]}], max_new_tokens=12))
    assert "".join(pieces).strip() == expected[0].text


def test_a_failure_while_streaming_reaches_the_reader(model, tokenizer):
    with pytest.raises(ValueError, match="temperature"):
        list(
            stream(
                model, tokenizer, [{"role": "user", "content": "x"}], max_new_tokens=4, do_sample=True, temperature=-1.0
            )
        )


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe (1998), table I, method 3 (Wilson without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_accuracy():
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(str(round(wilson(0, n)[0], 4)) == "0.0" and wilson(n, n)[1] <= 1.0 for n in range(1, 1000))  # never -0.0
    record = accuracy([True, False, True, True])
    assert (record["accuracy"], record["n"]) == (0.75, 4)
    assert record["interval"] == [round(x, 4) for x in wilson(3, 4)]


def test_routing_reason():
    assert routing_reason(None) == "unknown answer"
    assert routing_reason("REMOTE") == "[REMOTE]"
    assert routing_reason("Sit") == "known skill"


def rows(tokenizer):
    raw = [
        {"prompt": "sit", "response": "[Sit()] ok"},
        {"prompt": "why?", "response": "because of something longer"},
        {"prompt": "stand", "response": "up"},
    ]
    checked = [chat.check_row(row, "row") for row in raw]
    return checked, chat.encode(checked, tokenizer, max_length=256)


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_the_loss_is_per_answer_token_however_rows_are_batched(model, tokenizer, mode):
    _, sequences = rows(tokenizer)
    with in_mode(model, mode) as runner:
        found = [answer_loss(runner, sequences, 0, batch_size=size) for size in (1, 2, 8)]
        total, count = 0.0, 0
        for s in sequences:  # by hand: log-probabilities of the answer's tokens, one sequence at a time
            with torch.no_grad():
                log_p = runner(input_ids=torch.tensor([s.ids])).logits[0].log_softmax(-1)
            for t in range(s.start, len(s.ids)):
                total -= float(log_p[t - 1, s.ids[t]])
                count += 1
    for record in found:
        assert record["loss"] == pytest.approx(total / count, rel=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
        assert record["tokens"] == count


def test_the_detached_loss_is_the_shadow_loss(model, tokenizer):
    _, sequences = rows(tokenizer)
    batch = chat.ChatCollator(0)([s.features() for s in sequences])
    with torch.no_grad():
        out = model(**batch)
    assert answer_loss(shadowpeft.detach(model), sequences, 0)["loss"] == pytest.approx(
        float(out.shadow_loss), rel=1e-5
    )
    assert answer_loss(model, sequences, 0)["loss"] == pytest.approx(float(out.task_loss), rel=1e-5)


def asked(model, tokenizer, task, mode="attached", **options):
    return evaluate_task(model, tokenizer, task, mode=mode, progress=lambda done: None, **options)


def test_exact_match_counts_each_paths_own_answer(model, tokenizer, tmp_path):
    texts = {}
    for mode in ("attached", "detached"):
        with in_mode(model, mode) as runner:
            texts[mode] = answer(runner, tokenizer, ["sit"], max_new_tokens=6)[0].text
    right = {"prompt": "sit", "response": texts["attached"], "shadow_response": texts["detached"] + " "}
    wrong = {"prompt": "sit", "response": "something else"}
    only = {"prompt": "sit", "response": texts["attached"], "path": "base"}
    task = Rows(write_rows(tmp_path / "rows.jsonl", [right, wrong, only]), max_new_tokens=6)
    for mode, values in (("attached", [1.0, 0.0, 1.0]), ("detached", [1.0, 0.0])):
        record = asked(model, tokenizer, task, mode, folder=tmp_path / mode, loss=True)
        kept = sorted(
            map(json.loads, (tmp_path / mode / "predictions.jsonl").read_text().splitlines()), key=lambda r: r["id"]
        )
        assert [row["value"] for row in kept] == values
        assert (record["score"], record["n"]) == (sum(values) / len(values), len(values))
        assert record["wilson_interval"] == list(wilson(int(sum(values)), len(values)))
        chosen = task.for_path(task.load("test"), "shadow" if mode == "detached" else "base")
        sequences = chat.encode(
            [chat.check_row({"prompt": "sit", "response": e.answer}, "row") for e in chosen], tokenizer, max_length=256
        )
        with in_mode(model, mode) as runner:
            assert record["loss"] == pytest.approx(answer_loss(runner, sequences, 0)["loss"], rel=1e-6)


def test_a_file_without_a_row_for_a_path(model, tokenizer, tmp_path):
    task = Rows(write_rows(tmp_path / "rows.jsonl", [{"prompt": "sit", "response": "ok", "path": "base"}]))
    with pytest.raises(DataError, match=r"rows\.jsonl' has no row for the shadow path"):
        asked(model, tokenizer, task, "detached")
    with pytest.raises(DataError, match="has no form with worked examples"):
        asked(model, tokenizer, task, shots=2)


@pytest.mark.parametrize("beside", [{"tool_calls": [{"id": "1"}]}, {"reasoning_content": "so"}])
def test_an_answer_that_is_more_than_text_is_not_judged_by_its_text(tmp_path, beside):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **beside}]
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}, {"messages": messages}])
    with pytest.raises(DataError, match=rf"line 2 has '{next(iter(beside))}', which an evaluation by text cannot judge"):
        Rows(file)


def test_intents_are_parsed_from_answers(model, tokenizer, monkeypatch, tmp_path):
    task = get_task("robot")
    rows = task.load("test_normal", limit=4)
    texts = iter([f"[{e.gold}()] ok" for e in rows[:1]] + ["[REMOTE] later", "[Fly()] no such", "words"])
    monkeypatch.setattr(tokenizer.__class__, "decode", lambda self, ids, **options: next(texts))
    record = asked(model, tokenizer, task, split="test_normal", limit=4, batch_size=1, folder=tmp_path)
    kept = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in kept][1:] == ["REMOTE", None, None]
    assert kept[0]["prediction"] == rows[0].gold
    assert [row["text"] for row in kept] == [f"[{rows[0].gold}()] ok", "[REMOTE] later", "[Fly()] no such", "words"]
    assert record["n"] == 4


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_a_model_in_the_mode_it_was_in(tokenizer, training, tmp_path):
    model = adapt(chat_model(), auxiliary_loss_weight=0.5).train(training)
    row = chat.check_row({"prompt": "sit", "response": "something"}, "row")
    answer(model, tokenizer, ["sit"], max_new_tokens=2)
    asked(model, tokenizer, Rows(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}]), 2), loss=True)
    answer_loss(model, chat.encode([row], tokenizer, max_length=256), tokenizer.pad_token_id)
    list(stream(model, tokenizer, [{"role": "user", "content": "sit"}], max_new_tokens=2))
    for mode in ("attached", "base"):
        with in_mode(model, mode) as runner:
            assert not runner.training
    assert model.training is training
