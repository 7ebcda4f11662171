"""The engine scores what a model says, whatever the method, and a killed evaluation ends as an undisturbed one."""

import json

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model

import shadowpeft
from chatbase import chat_model, chat_tokenizer
from shadowpeft.data import chat
from shadowpeft.data.tasks import Example, class_ids
from shadowpeft.data.tasks.base import Task
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate import engine, evaluate_task, runner_in_mode
from shadowpeft.evaluate import record as facts
from shadowpeft.evaluate.engine import sequence_likelihoods
from shadowpeft.generate import answer
from tiny import adapt, randomise

WORDS = ["sit", "a much longer request, please", "x", "站起来", "of middle length", "yy", "zzz"]


class Echo(Task):
    """Is the answer's first letter the gold one?"""

    name = "echo"
    max_new_tokens = 6
    system = "be brief"
    choices = ("a", "b", "cd")
    gold = "b"

    def rows(self, split):
        rows = [{"text": w, "i": i} for i, w in enumerate(WORDS)]
        return rows, {"from": "test", "fingerprint": chat.rows_digest(rows), "partial": False, "rows": len(rows)}

    def example(self, row, identity):
        return Example(identity, row["text"], "an answer " + "y" * row["i"], self.gold, self.choices)

    def parse(self, text):
        return text[:1]


class Open(Echo):
    name, choices = "open", ()


class Classes(Echo):
    name, kind, labels = "classes", "classify", ("u", "v", "w")

    def example(self, row, identity):
        return Example(identity, row["text"], "u", row["i"] % 3)


def lora(dora=False, model=None, **options):
    made = get_peft_model(
        model or chat_model(),
        LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=dora, target_modules=["q_proj", "v_proj"], **options),
    )
    randomise(made)
    return made


@pytest.fixture(scope="module")
def model():
    return adapt(chat_model(), auxiliary_loss_weight=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def run(model, tokenizer, task=None, **options):
    return evaluate_task(
        model,
        tokenizer,
        task or Echo(),
        **{"mode": "attached", "batch_size": 3, "progress": lambda done: None, **options},
    )


def rows_in(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().split("\n")[:-1]]


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_generation_scores_the_answers_that_the_model_gives(tmp_path, model, tokenizer, mode):
    with runner_in_mode(model, mode) as runner:
        said = [answer(runner, tokenizer, [w], max_new_tokens=6, system="be brief")[0] for w in WORDS]
    gold = max({a.text[:1] for a in said}, key=[a.text[:1] for a in said].count)
    task = Echo()
    task.gold = gold
    done = []
    record = run(model, tokenizer, task, mode=mode, folder=tmp_path, progress=done.append)
    kept = {row["id"]: row for row in rows_in(tmp_path)}
    assert [kept[f"echo-test-{i}"]["text"] for i in range(7)] == [a.text for a in said]
    assert [kept[f"echo-test-{i}"]["tokens"] for i in range(7)] == [a.tokens for a in said]
    assert record["score"] == pytest.approx(sum(a.text[:1] == gold for a in said) / 7)
    assert record["score"] > 0
    assert record["tokens"] == sum(a.tokens for a in said)
    assert done == [3, 6, 7]


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
@pytest.mark.parametrize("choices", [("a", "b", "c"), ("a", "bcd", "ef")])
def test_likelihood_of_choices_is_that_of_reading_each_alone(tmp_path, model, tokenizer, mode, choices):
    task = Echo()
    task.choices = choices
    task.gold = choices[1]
    record = run(model, tokenizer, task, mode=mode, method="likelihood", folder=tmp_path)
    kept = {row["id"]: row for row in rows_in(tmp_path)}
    hits = 0
    with runner_in_mode(model, mode) as runner, torch.no_grad():
        for i, word in enumerate(WORDS):
            prompt = CHATML_PROMPT.format(word)
            head = tokenizer(prompt).input_ids
            alone = []
            for choice in choices:
                ids = tokenizer(prompt + choice).input_ids
                log_p = runner(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                alone.append(float(sum(log_p[t - 1, ids[t]] for t in range(len(head), len(ids)))))
            assert kept[f"echo-test-{i}"]["scores"] == pytest.approx(alone, abs=1e-4)  # float32 sums, padded or not
            hits += alone.index(max(alone)) == 1
    assert record["score"] == pytest.approx(hits / 7)


CHATML_PROMPT = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_likelihood_without_choices_is_that_of_the_gold_answer_as_trained(tmp_path, model, tokenizer):
    record = run(model, tokenizer, Open(), method="likelihood", folder=tmp_path)
    kept = {row["id"]: row for row in rows_in(tmp_path)}
    values = []
    for i, word in enumerate(WORDS):
        prompt = CHATML_PROMPT.format(word)
        ids = tokenizer(prompt + "an answer " + "y" * i + "<|im_end|>").input_ids
        labels = torch.tensor([[-100] * len(tokenizer(prompt).input_ids) + ids[len(tokenizer(prompt).input_ids) :]])
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([ids]), labels=labels).task_loss)
        values.append(numpy.exp(-loss))
        assert kept[f"open-test-{i}"]["value"] == pytest.approx(values[-1], rel=1e-4)
    assert record["score"] == pytest.approx(numpy.mean(values), rel=1e-4)
    assert record["scores"]["nll"] == pytest.approx(-numpy.mean(numpy.log(values)), rel=1e-4)
    assert "wilson_interval" not in record


def test_one_token_choices_cost_one_reading(model):
    seen = []
    handle = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    head = [5, 6, 7]
    sums = sequence_likelihoods(model, 0, [(head, [8]), (head, [9]), ([5, 6], [8])])
    handle.remove()
    assert seen == [(2, 3)]
    assert sums[:2] == pytest.approx(
        [sequence_likelihoods(model, 0, [(head, [t]), (head, [8, 9])])[0] for t in (8, 9)], abs=1e-5
    )


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_classification_takes_the_likeliest_class(tmp_path, tokenizer, mode):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(3)
    config = chat_model().config
    config.num_labels = 3
    made = adapt(LlamaForSequenceClassification(config).eval(), task_type="SEQ_CLS")
    record = run(made, tokenizer, Classes(), mode=mode, folder=tmp_path)
    kept = {row["id"]: row for row in rows_in(tmp_path)}
    hits = 0
    with runner_in_mode(made, mode) as runner, torch.no_grad():
        for i, word in enumerate(WORDS):
            best = int(runner(input_ids=torch.tensor([class_ids(tokenizer, word)])).logits[0].argmax())
            assert kept[f"classes-test-{i}"]["prediction"] == best
            hits += best == i % 3
    assert record["method"] == "classify"
    assert record["score"] == pytest.approx(hits / 7)


def test_classification_needs_as_many_classes(model, tokenizer):
    with pytest.raises(ConfigError, match=r"has 3 classes; load a sequence classifier with num_labels=3"):
        run(model, tokenizer, Classes())


@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_go_the_same_way(tokenizer, dora):
    made = lora(dora)
    mode, other = ("dora", "lora") if dora else ("lora", "dora")
    seen = run(made, tokenizer, Open(), mode=mode, method="likelihood")
    bare = run(made, tokenizer, Open(), mode="base", method="likelihood")
    plain = run(chat_model(), tokenizer, Open(), mode="base", method="likelihood")
    assert bare["score"] == pytest.approx(plain["score"], rel=1e-6)
    assert seen["score"] != pytest.approx(bare["score"], rel=1e-3)
    with pytest.raises(ConfigError, match=f"mode is '{other}' but the model is {mode}"):
        run(made, tokenizer, mode=other)
    with pytest.raises(ConfigError, match="has no shadow adapter"):
        run(made, tokenizer, mode="attached")


def test_doras_norms_are_computed_once_and_never_kept_for_other_weights(tokenizer, monkeypatch):
    norms = []
    norm = torch.linalg.norm
    monkeypatch.setattr(torch.linalg, "norm", lambda *a, **k: norms.append(1) or norm(*a, **k))
    made = lora(dora=True)
    norms.clear()
    with runner_in_mode(made, "dora") as runner:
        kept = [answer(runner, tokenizer, [w], max_new_tokens=6)[0].text for w in WORDS]
    layers = [m for m in made.modules() if hasattr(m, "_dora_cache")]
    assert len(norms) == len(layers) > 0
    assert not any(m._dora_cache for m in layers)
    assert kept == [answer(made, tokenizer, [w], max_new_tokens=6)[0].text for w in WORDS]
    before = run(made, tokenizer, Open(), mode="dora", method="likelihood")["score"]
    randomise(made, seed=5)
    again = run(made, tokenizer, Open(), mode="dora", method="likelihood")["score"]
    fresh = lora(dora=True)
    fresh.load_state_dict(made.state_dict())
    assert again == pytest.approx(run(fresh, tokenizer, Open(), mode="dora", method="likelihood")["score"], rel=1e-6)
    assert again != pytest.approx(before, rel=1e-3)


def test_modes_differ_and_leave_the_model_as_it_was(model, tokenizer):
    model.train()
    found = [
        run(model, tokenizer, Open(), mode=m, method="likelihood")["score"] for m in ("attached", "detached", "base")
    ]
    assert model.training
    model.eval()
    assert len({round(f, 8) for f in found}) == 3
    assert run(model, tokenizer, Open(), method="likelihood")["score"] == found[0]


# ------------------------------------------------------------------------------------------------------------ resuming


class Kill(BaseException):
    pass


@pytest.mark.parametrize("method", ["generate", "likelihood"])
def test_a_killed_evaluation_ends_as_an_undisturbed_one(tmp_path, monkeypatch, model, tokenizer, method):
    whole = run(model, tokenizer, method=method, folder=tmp_path / "whole")
    folder, real, calls = tmp_path / "killed", engine._run, []

    def dying(*args):
        calls.append(len(args[3]))
        if len(calls) == 2:
            raise Kill
        return real(*args)

    monkeypatch.setattr(engine, "_run", dying)
    with pytest.raises(Kill):
        run(model, tokenizer, method=method, folder=folder)
    assert len(rows_in(folder)) == 3
    assert not (folder / "record.json").exists()
    with (folder / "predictions.jsonl").open("a") as handle:
        handle.write('{"id": "echo-te')  # the kill came while a line was written
    resumed = run(model, tokenizer, method=method, folder=folder)
    assert calls == [3, 3, 3, 1]  # the first batch is not repeated

    def same(rows):
        return sorted((r["id"], str(r["prediction"]), r["text"], str(r["scores"])) for r in rows)

    assert same(rows_in(folder)) == same(rows_in(tmp_path / "whole"))
    for key in ("score", "interval", "scores", "n", "data", "settings", "tokens"):
        assert resumed[key] == whole[key]


def test_a_batch_that_was_written_in_part_is_computed_whole(tmp_path, model, tokenizer):
    whole = run(model, tokenizer, method="likelihood", folder=tmp_path / "whole")
    run(model, tokenizer, method="likelihood", folder=tmp_path / "part")
    file = tmp_path / "part" / "predictions.jsonl"
    lines = file.read_text().split("\n")[:-1]
    file.write_text("\n".join(lines[:4]) + "\n")
    (tmp_path / "part" / "record.json").unlink()
    again = run(model, tokenizer, method="likelihood", folder=tmp_path / "part")
    assert again["score"] == whole["score"]
    scores = [{r["id"]: r["scores"] for r in rows_in(tmp_path / name)} for name in ("whole", "part")]
    assert scores[0] == scores[1]
    assert len(rows_in(tmp_path / "part")) == 7


def test_a_finished_evaluation_keeps_its_record(tmp_path, model, tokenizer):
    first = run(model, tokenizer, folder=tmp_path)
    assert run(model, tokenizer, folder=tmp_path) == json.loads((tmp_path / "record.json").read_text()) == first


def test_another_evaluation_is_not_mixed_in(tmp_path, model, tokenizer):
    run(model, tokenizer, folder=tmp_path)
    for options, named in (({"mode": "base"}, "mode"), ({"seed": 1}, "seed"), ({"limit": 2}, "limit, examples")):
        with pytest.raises(ConfigError, match=f"holds an evaluation with another {named}"):
            run(model, tokenizer, folder=tmp_path, **options)
    settings = json.loads((tmp_path / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps({**settings, "speculative": True}))  # its times are of drafts
    with pytest.raises(ConfigError, match="another speculative"):
        run(model, tokenizer, folder=tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(settings))
    other = adapt(chat_model())
    randomise(other, seed=9)
    with pytest.raises(ConfigError, match="another weights"):
        run(other, tokenizer, folder=tmp_path)
    with pytest.raises(ConfigError, match="already holds an evaluation"):
        run(model, tokenizer, folder=tmp_path, resume=False)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        run(model, tokenizer, folder=tmp_path)
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(ConfigError, match="they belong to nothing"):
        run(model, tokenizer, folder=tmp_path)


# ------------------------------------------------------------------------------------------------------------- records


def test_the_record_says_how_the_number_came_about(tmp_path, model, tokenizer):
    record = run(model, tokenizer, folder=tmp_path, limit=5, seed=3, extra={"spec": "x"})
    assert (record["n"], record["seed"], record["mode"], record["task"]) == (5, 3, "attached", "echo")
    assert record["interval"][0] <= record["score"] <= record["interval"][1]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["device"]["type"] == "cpu"
    assert record["peak_memory_bytes"] > 1e7
    assert record["tokens_per_second"] > 0
    assert record["wall_seconds"] > 0
    assert record["data"]["fingerprint"] == Echo().rows("test")[1]["fingerprint"]
    assert record["extra"] == {"spec": "x"}
    assert record["commit"] is None or len(record["commit"].removesuffix("-dirty")) == 40
    assert len(record["id"]) == 12


def test_bootstrap_interval_covers_as_the_normal_one_does():
    """For 400 fair coins the normal interval is mean +- 1.96 sqrt(p(1-p)/n); 2,000 draws move its ends by about 0.002."""
    values = [float(v) for v in numpy.random.default_rng(0).integers(0, 2, 400)]
    p = sum(values) / 400
    half = 1.96 * (p * (1 - p) / 400) ** 0.5
    assert facts.bootstrap(values) == pytest.approx([p - half, p + half], abs=0.008)
    assert facts.bootstrap(values, 1) == facts.bootstrap(values, 1) != facts.bootstrap(values, 2)
    assert facts.bootstrap([1.0] * 9) == [1.0, 1.0]


def test_the_weights_digest_sees_a_changed_adapter(model):
    before = facts.weights_digest(model)
    other = adapt(chat_model(), auxiliary_loss_weight=0.5)
    assert facts.weights_digest(other) == before
    randomise(other, seed=11)
    assert facts.weights_digest(other) != before
    assert facts.weights_digest(shadowpeft.detach(model)) != before


# -------------------------------------------------------------------------------------------------------------- misuse


def test_misuse(model, tokenizer):
    with pytest.raises(ConfigError, match="mode is 'cloud'"):
        run(model, tokenizer, mode="cloud")
    with pytest.raises(ConfigError, match="method is 'guess'"):
        run(model, tokenizer, method="guess")
    with pytest.raises(ConfigError, match="task 'classes' is scored by classify; choose that"):
        run(model, tokenizer, Classes(), method="likelihood")
    with pytest.raises(ConfigError, match="task 'echo' is scored by generate or likelihood"):
        run(model, tokenizer, method="classify")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        run(model, tokenizer, batch_size=0)
    long = Open()
    long.system = "x" * 300
    with pytest.raises(DataError, match="but the model reads 256"):
        run(model, tokenizer, long, method="likelihood")
