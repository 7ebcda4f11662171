"""Pretraining with a teacher: the loss against a naive one, the cache of packed text, kill and resume, what is refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from chatbase import chat_model, save_base, write_rows
from conftest import documents
from shadowpeft.core import teacher_loss
from shadowpeft.data import teacher as teacher_module
from shadowpeft.data.packing import collate
from shadowpeft.data.teacher import TeacherCache
from shadowpeft.errors import BaseMismatchError, ConfigError, DataError, UnsupportedModelError
from shadowpeft.hf.base.fingerprint import fingerprint
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.pretraining.base_ends import open_base
from shadowpeft.hf.pretraining.model import ProjectedShadow, check_teacher_separation
from shadowpeft.train import pretrain_teacher
from shadowpeft.train.pretrain import PretrainCallback, end_token, load_tokenizer, make_stream, pretrain
from shadowpeft.train.progress import read_metrics

V, K = 260, 7


def run(made_config, **options):
    return pretrain(made_config, quiet=True, **options)


def folder_of(result):
    return Path(result["shadow"]).parent


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def sequences_of(made_config, count):
    tokenizer = load_tokenizer(made_config.base)
    stream = make_stream(
        made_config,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        end_token(made_config, tokenizer),
    )
    return [next(stream) for _ in range(count)]


def taught(config, name="run", loss="both", teacher=None, **sections):
    return config(name, loss=loss, teacher={"k": K, "batch_size": 3, **(teacher or {})}, **sections)


# --------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("loss", ["kl", "both"])
def test_the_loss_of_a_step_is_that_of_each_document_alone(config, made, loss):
    """All tokens of the vocabulary are kept, so the cache's loss is the full divergence, up to its 16 bits."""
    weight = 1.0 if loss == "kl" else 0.5
    result = run(
        taught(config, loss=loss, teacher={"k": V, "weight": weight}, training={"max_steps": 1, "learning_rate": 1e-9})
    )
    found = next(r["loss"] for r in read_metrics(folder_of(result)) if "loss" in r)
    base = AutoModelForCausalLM.from_pretrained(made["base"]).double()
    student = AutoModelForCausalLM.from_pretrained(result["stock"]).double()
    total, count = 0.0, 0
    for sequence in sequences_of(config(), 4):
        starts = [i for i, p in enumerate(sequence.positions) if p == 0] + [32]
        for begin, end in pairwise(starts):
            ids = torch.from_numpy(sequence.ids[begin:end])[None]
            with torch.no_grad():
                log_p, log_q = (m(ids).logits[0, :-1].log_softmax(-1) for m in (base, student))
            total += weight * float((log_p.exp() * (log_p - log_q)).sum())
            total += float(F.nll_loss(log_q, ids[0, 1:], reduction="sum")) if loss == "both" else 0.0
            count += end - begin - 1
    assert found == pytest.approx(total / count, rel=2e-3)  # log-probabilities are kept in float16
    assert result["objective"] == loss
    assert result["teacher"] == {"k": V, "sequences": 4}


def test_the_gradient_is_that_of_the_losses_apart():
    torch.manual_seed(3)
    model = ProjectedShadow(
        chat_model(hidden_size=24, num_attention_heads=2).model, torch.randn(32, 24), torch.randn(V, 32)
    )
    ids = torch.randint(4, V, (2, 30))
    positions = torch.cat([torch.arange(n) for n in (9, 21)]).expand(2, -1)
    labels = torch.where(positions == 0, -100, ids)
    log_probs, known = torch.randn(2, 30, V).log_softmax(-1).topk(K)
    wanted = [p for p in model.parameters() if p.requires_grad]
    total, count = model(ids, positions, labels, teacher_ids=known, teacher_log_probs=log_probs, weights=(1.0, 0.3))
    assert int(count) == 2 * 28
    found = torch.autograd.grad(total, wanted)
    chosen = labels[:, 1:] != -100
    states = model.shadow_hidden_projection(model.state(ids, positions)[:, :-1][chosen])
    kl = teacher_loss(states, known[:, :-1][chosen], log_probs[:, :-1][chosen], model.logits, frozen=False)
    expected = 0.3 * kl + F.cross_entropy(model.logits(states), labels[:, 1:][chosen], reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    for one, other in zip(found, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # in chunks, without a graph
        again, _ = model(ids, positions, labels, teacher_ids=known, teacher_log_probs=log_probs, weights=(1.0, 0.3))
    torch.testing.assert_close(again, total.detach())


def test_the_cache_holds_what_the_base_says_of_each_document_alone(config, made):
    made_config = taught(config, training={"max_steps": 1})
    result = run(made_config)
    cache = TeacherCache(folder_of(result) / "teacher")
    sequences = sequences_of(made_config, 4)
    base = AutoModelForCausalLM.from_pretrained(made["base"])
    assert len(cache) == 4
    for number, sequence in enumerate(sequences):
        ids, log_probs = cache[number]
        starts = [i for i, p in enumerate(sequence.positions) if p == 0] + [32]
        assert len(starts) > 2
        for begin, end in pairwise(starts):
            with torch.no_grad():
                alone = base(torch.from_numpy(sequence.ids[begin:end])[None]).logits[0].log_softmax(-1)
            torch.testing.assert_close(alone.gather(-1, ids[begin:end]), log_probs[begin:end], rtol=2e-3, atol=1e-3)
    batch = collate(sequences)
    known, _ = cache.look_up(batch["numbers"].tolist(), batch["input_ids"])
    assert torch.equal(known[2], cache[2][0])


def test_a_teacher_teaches(config, made):
    """By its own measure: the divergence from the base falls, and the held-out number stays the cross-entropy."""
    result = run(taught(config, loss="kl", training={"max_steps": 12}))
    losses = [r["loss"] for r in read_metrics(folder_of(result)) if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]
    plain = run(config("plain", training={"max_steps": 1}))
    assert result["perplexity_at_start"] == plain["perplexity_at_start"]


# ----------------------------------------------------------------------------------------------------------- kill, resume


class _Stop(Exception):
    pass


def test_stopped_while_the_cache_is_built_and_while_it_trains_it_ends_bit_identical(config, monkeypatch):
    monkeypatch.setattr(pretrain_teacher, "SHARD_TOKENS", 64)  # three sequences a shard
    whole = run(taught(config, "whole"))
    made_config = taught(config, "cut")
    own = Path(made_config.output)
    stock, calls = teacher_module._likely, []

    def cut(model, rows, *rest, **options):
        calls.append(len(rows))
        if len(calls) == 4:
            raise _Stop
        return stock(model, rows, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "_likely", cut)
        with pytest.raises(_Stop):
            run(made_config)
    assert sorted(p.name for p in (own / "teacher").iterdir()) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "shard-00002.safetensors",
        "teacher.json",
    ]
    with pytest.raises(ConfigError, match="continue it with --resume"):
        run(made_config)

    step = PretrainCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise _Stop
        return step(self, args, state, control, **kwargs)

    calls.clear()

    def counted(model, rows, *rest, **options):
        calls.append(len(rows))
        return stock(model, rows, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainCallback, "on_step_end", stop)
        patch.setattr(teacher_module, "_likely", counted)
        with pytest.raises(_Stop):
            run(made_config, resume=True)
    assert sum(calls) == 24 - 9  # nine sequences were on disk
    with monkeypatch.context() as patch:  # a finished cache needs no base
        patch.setattr(pretrain_teacher, "load_base", None)
        again = run(made_config, resume=True)
    assert again["resumed_from_step"] == 2
    assert files(own / "teacher") == files(folder_of(whole) / "teacher")
    for name in ("shadow", "checkpoint-6"):
        mine, theirs = (load_file(f / name / "model.safetensors") for f in (own, folder_of(whole)))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    assert (again["loss"], again["perplexity"]) == (whole["loss"], whole["perplexity"])


def test_a_cache_serves_other_runs_over_the_same_text(config, made, monkeypatch, tmp_path):
    shared = {"folder": str(tmp_path / "shared")}
    first = run(taught(config, "first", teacher=shared, training={"max_steps": 3}))
    assert not (folder_of(first) / "teacher").exists()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_teacher, "load_base", None)
        second = run(
            taught(
                config,
                "second",
                loss="kl",
                teacher=shared,
                backbone={"layers": "first", "count": 1},
                training={"max_steps": 2, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 0.1},
            )
        )
    assert second["teacher"]["sequences"] == first["teacher"]["sequences"] == 12
    with pytest.raises(DataError, match="has 12 sequences but the run reads 16"):
        run(taught(config, "third", teacher=shared, training={"max_steps": 4}))


# ---------------------------------------------------------------------------------------------------------------- refused


def test_a_wrong_cache_is_refused_before_a_folder_is_made(config, made, tmp_path):
    shared = {"folder": str(tmp_path / "shared")}
    text = write_rows(tmp_path / "own.jsonl", documents(40))
    sections = {"text": {"corpora": [{"path": text}]}, "training": {"max_steps": 1}}
    run(taught(config, "right", teacher=shared, **sections))
    other = tmp_path / "other"
    shutil.copytree(made["base"], other)
    model = chat_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    model.save_pretrained(other)
    for changes, error, message in (
        ({"base": str(other)}, BaseMismatchError, r"teacher cache '.*' is of another base: .*; use another folder"),
        ({"teacher": {**shared, "k": K + 1}}, DataError, "k = 7, not 8"),
        ({"text": {**sections["text"], "sequence_length": 16}}, DataError, "has data = "),
        ({"text": {**sections["text"], "shuffle_buffer": 6}}, DataError, "has data = "),
        ({"training": {"max_steps": 1, "seed": 1}}, DataError, "has data = "),
        ({"teacher": {**shared, "precision": "bfloat16"}}, DataError, "has data = "),
        ({"teacher": {"folder": str(Path(made["base"]))}}, DataError, "is no teacher cache and not empty"),
        ({"teacher": {**shared, "k": 261}}, ConfigError, "teacher.k is 261 but the base has a vocabulary of 260"),
    ):
        made_config = taught(config, "wrong", **{"teacher": shared, **sections, **changes})
        with pytest.raises(error, match=message):
            run(made_config)
        assert not Path(made_config.output).exists()
    # a file that changed within its size: found when the sequence is read
    Path(text).write_text(Path(text).read_text().replace("word", "work"))
    with pytest.raises(DataError, match=r"sequence 0 of the stream differs from the one in the teacher cache"):
        run(taught(config, "changed", teacher=shared, **sections))


def test_a_disk_that_is_too_small_is_refused(config, monkeypatch):
    made_config = taught(config)
    usage = type(shutil.disk_usage("/"))(100, 90, 10)
    monkeypatch.setattr(pretrain_teacher.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB more but 0\.0 GB are free; give another teacher\.folder"):
        run(made_config)


def test_the_settings_of_the_loss_are_part_of_a_run(config):
    stopped = taught(config, loss="kl", training={"max_steps": 1})
    run(stopped)
    result = folder_of({"shadow": str(Path(stopped.output) / "shadow")}) / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "interrupted": True}))
    with pytest.raises(ConfigError, match=r"other settings \(loss\)"):
        run(taught(config, loss="both", training={"max_steps": 1}), resume=True)
    with pytest.raises(ConfigError, match=r"other settings \(loss, teacher\)"):
        run(config(training={"max_steps": 1}), resume=True)


def test_a_run_from_before_there_were_teachers_is_resumed(config):
    old = config(training={"max_steps": 1})
    run(old)
    file = Path(old.output) / "config.yaml"
    kept = [line for line in file.read_text().splitlines() if not line.startswith(("loss:", "teacher:"))]
    file.write_text("\n".join(kept) + "\n")
    assert run(old, resume=True)["steps"] == 1


def test_a_base_that_mixes_documents_cannot_teach():
    class Mixing(type(chat_model())):
        def forward(self, input_ids, position_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, position_ids=None, **kwargs)

    check_teacher_separation(chat_model())
    with pytest.raises(UnsupportedModelError, match=r"mixes documents .*; use another base or loss: ce"):
        check_teacher_separation(Mixing(chat_model().config).eval())


def test_the_fingerprint_from_the_files_is_that_of_the_loaded_base(made, tmp_path):
    tied = save_base(tmp_path / "tied", tie_word_embeddings=True)
    for name in (made["base"], tied):
        model = AutoModelForCausalLM.from_pretrained(name)
        assert open_base(name).fingerprint() == fingerprint(model, find_decoder(model))
        assert set(open_base(name).fingerprint()["values"]) == {
            "embedding",
            "first.input_layernorm.weight",
            "last.input_layernorm.weight",
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"k": 4}}, "loss is 'ce', which needs none"),
        ({"loss": "kl", "teacher": {"weight": 0.5}}, "only scales the loss"),
        ({"loss": "both", "teacher": {"wieght": 0.5}}, "did you mean 'weight'"),
        ({"loss": "mse"}, "'loss' is 'mse'"),
    ],
)
def test_impossible_lessons(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_loss_that_needs_a_teacher_has_one(config):
    assert config(loss="kl").teacher.k == 32
    assert config().teacher is None
