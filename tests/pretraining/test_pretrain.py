"""Whole pretraining runs on a tiny base: what they read, compute, leave behind, and how they stop, resume and fail."""

import copy
import json
import math
import signal
from pathlib import Path

import pytest
import safetensors
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaModel

import shadowpeft
from chatbase import chat_model, chat_tokenizer, plain_rows, run_file, save_base, write_rows
from commands import call
from conftest import documents, run_content
from products import usual
from shadowpeft.core import pseudo_inverse_projection
from shadowpeft.errors import AdapterFileError, ConfigError, DataError, NonFiniteLossError, UnsupportedModelError
from shadowpeft.hf.files import reading
from shadowpeft.hf.files.projected import read_projected
from shadowpeft.hf.pretraining.base_ends import open_base
from shadowpeft.hf.pretraining.model import ProjectedShadow, build_projected_shadow, check_separation, save_shadow
from shadowpeft.hf.shadow.mirror import copied_layers
from shadowpeft.storage import exclusive
from shadowpeft.train import pretrain_trainer
from shadowpeft.train.config import parse_run
from shadowpeft.train.pretrain import PretrainCallback, pretrain
from shadowpeft.train.pretrain_config import parse_pretraining
from shadowpeft.train.pretrain_text import check_held_out
from shadowpeft.train.progress import read_metrics
from shadowpeft.train.run import train

TIMES = ("runtime", "per_second", "tokens_per_second", "seconds")


def run(made_config, **options):
    return pretrain(made_config, quiet=True, **options)


def untimed(folder):
    return [{k: v for k, v in r.items() if not k.endswith(TIMES)} for r in read_metrics(Path(folder))]


def assert_same_files(one, other, names=("shadow/model.safetensors", "stock/model.safetensors")):
    for name in names:
        mine, theirs = load_file(Path(one) / name), load_file(Path(other) / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items()), name


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory, request):
    """A run that nothing disturbed, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished")
    content = run_content(made, folder / "run")
    return folder / "run", run(parse_pretraining(content, "the test's run"))


# --------------------------------------------------------------------------------------------- what a run reads and leaves


def test_the_folder_and_the_result(finished):
    folder, result = finished
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint-4",
        "checkpoint-6",
        "config.yaml",
        "data.json",
        "loss.png",
        "metrics.jsonl",
        "result.json",
        "shadow",
        "stock",
        "versions.json",
    ]
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["steps"], result["tokens"], result["start"]["layers"]) == (6, 6 * 2 * 2 * 32, [0, 2])
    assert result["perplexity"] < 0.2 * result["perplexity_at_start"]
    assert {"commit", "versions", "tokens_per_second", "seconds"} <= result.keys()
    assert not any(
        "lm_head" in name or "embed" in name for name in load_file(folder / "checkpoint-6/model.safetensors")
    )


def test_the_base_s_other_layers_are_never_read(made, config, tmp_path, monkeypatch):
    names = []

    class Watched:
        def __init__(self, path, framework):
            self.handle = safetensors.safe_open(path, framework=framework)

        def __enter__(self):
            self.handle.__enter__()
            return self

        def __exit__(self, *details):
            self.handle.__exit__(*details)

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def get_tensor(self, name):
            names.append(name)
            return self.handle.get_tensor(name)

    monkeypatch.setattr(reading, "safe_open", Watched)
    base = open_base(made["base"])
    model, _ = build_projected_shadow(base, layers="spread", count=2)
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"0", "2"}
    assert {name for name in names if ".layers." not in name} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    assert all(p.device.type == "meta" for p in base.parts.backbone.parameters())
    whole = AutoModelForCausalLM.from_pretrained(made["base"])
    for mine, theirs in ((0, 0), (1, 2)):
        state = whole.model.layers[theirs].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.shadow_model.layers[mine].state_dict().items())
    # a file without them does as well, a file without one of the layers that are copied does not
    cut = save_base(tmp_path / "cut")
    tensors = load_file(Path(cut) / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.1." not in k}, Path(cut) / "model.safetensors")
    assert build_projected_shadow(open_base(cut), layers="spread", count=2)
    save_file({k: v for k, v in tensors.items() if ".layers.2." not in k}, Path(cut) / "model.safetensors")
    with pytest.raises(AdapterFileError, match=r"has no tensor 'model\.layers\.2\."):
        build_projected_shadow(open_base(cut), layers="spread", count=2)


def test_only_the_shards_that_are_needed_are_opened(made, tmp_path):
    folder = Path(save_base(tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: "needless.safetensors" if ".layers.1." in name else "needed.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({k: v for k, v in tensors.items() if ".layers.1." not in k}, folder / "needed.safetensors")
    assert build_projected_shadow(
        open_base(str(folder)), layers="spread", count=2
    )  # the other shard does not even exist


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("base_layers", 3, [0, 1, 2]),
        ("base_layers_spread", 1, [0]),
        ("base_layers_spread", 2, [0, 29]),
        ("base_layers_spread", 4, [0, 10, 19, 29]),
    ],
)
def test_which_layers_are_taken(layers, count, expected):
    assert copied_layers(chat_model(num_hidden_layers=30).config, count, layers) == expected


def test_a_hybrid_base_gives_its_attention_layers():
    config = chat_model(num_hidden_layers=4).config
    config.layer_types = ["linear_attention", "full_attention"] * 2
    assert copied_layers(config, 2, "base_layers_spread") == [1, 3]
    with pytest.raises(ConfigError, match="3 layers of the base was asked for but the base has 2 attention layers"):
        copied_layers(config, 3)


def test_equation_12_starts_a_narrow_backbone(made):
    base = open_base(made["base"])
    model, record = build_projected_shadow(base, model=made["small"])
    small = AutoModelForCausalLM.from_pretrained(made["small"])
    expected = pseudo_inverse_projection(base.read_head(), small.lm_head.weight.detach())
    assert torch.equal(model.shadow_hidden_projection.weight.detach(), expected)
    assert record == {"model": made["small"], "start": "pseudo_inverse", "projection": [32, 24]}
    random, record = build_projected_shadow(base, model=made["small"], start="random")
    assert not torch.equal(random.shadow_hidden_projection.weight.detach(), expected)
    assert record["start"] == "random"
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "shadow_hidden_projection.weight" in trains
    assert not {"lm_head.weight", "shadow_model.embed_tokens.weight"} & trains


@pytest.mark.parametrize(("ours", "theirs"), [(260, 300), (272, 264)])
def test_tables_with_other_padding_rows_are_aligned(tmp_path, ours, theirs):
    base = open_base(save_base(tmp_path / "base", vocab_size=ours))
    narrow = save_base(tmp_path / "narrow", hidden_size=24, vocab_size=theirs)
    small = AutoModelForCausalLM.from_pretrained(narrow)
    model, _ = build_projected_shadow(base, model=narrow)
    expected = torch.linalg.pinv(base.read_head().double()[:260]) @ small.lm_head.weight.detach().double()[:260]
    found = model.shadow_hidden_projection.weight.detach()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)  # products in float32
    table, given = (m.get_input_embeddings().weight for m in (model.shadow_model, small))
    assert (len(table), model.shadow_model.config.vocab_size) == (ours, ours)
    assert torch.equal(table[:260], given[:260])
    assert not bool(table[theirs:].any())
    same, _ = build_projected_shadow(base, model=save_base(tmp_path / "same", vocab_size=theirs))
    assert same.shadow_hidden_projection is None
    assert len(same.shadow_model.embed_tokens.weight) == ours
    save_shadow(model, base, tmp_path / "shadow")
    with torch.no_grad():
        assert torch.equal(read_projected(tmp_path / "shadow").backbone(pack()[0])[0], model.shadow_model(pack()[0])[0])


# ------------------------------------------------------------------------------------------------------ packing and loss


def tiny_shadow(attention="sdpa", width=24):
    torch.manual_seed(3)
    small = chat_model(hidden_size=width, num_hidden_layers=2, num_attention_heads=2)
    small.set_attn_implementation(attention)
    return ProjectedShadow(small.model, torch.randn(32, width), torch.randn(260, 32))


def pack(lengths=(5, 9, 1, 17), rows=2):
    torch.manual_seed(5)
    ids = torch.randint(4, 260, (rows, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)
    labels = torch.where(positions == 0, -100, ids)
    return ids, positions, labels


@pytest.mark.parametrize(
    "attention",
    ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)],  # it compiles for a minute
)
def test_a_document_in_a_pack_is_the_document_alone(attention):
    model = tiny_shadow(attention)
    check_separation(model)
    ids, positions, _ = pack()
    with torch.no_grad():
        together = model.logits(model.shadow_hidden_projection(model.state(ids, positions)))
        start = 0
        for length in (5, 9, 1, 17):
            part = slice(start, start + length)
            alone = model.logits(model.shadow_hidden_projection(model.state(ids[:, part], positions[:, part])))
            torch.testing.assert_close(together[:, part], alone, atol=1e-5 * float(alone.abs().max()), rtol=0)
            start += length


def test_a_backbone_that_carries_over_the_boundary_is_refused():
    torch.manual_seed(0)
    recurrent = MambaModel(MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4))
    model = ProjectedShadow.__new__(ProjectedShadow)
    torch.nn.Module.__init__(model)
    model.shadow_model, model.lm_head = recurrent, torch.nn.Linear(32, 260, bias=False)
    model.state = lambda ids, positions: recurrent(input_ids=ids, use_cache=False).last_hidden_state
    with pytest.raises(UnsupportedModelError, match=r"MambaModel with attention '.*' mixes documents"):
        check_separation(model)


def test_the_loss_and_its_gradients_are_those_of_each_document_alone_in_float64():
    model = tiny_shadow().double()
    ids, positions, labels = pack()

    def double(rows, goals):
        return F.cross_entropy(model.logits(rows), goals, reduction="sum")

    total, count = model(ids, positions, labels, double)
    assert int(count) == 2 * (4 + 8 + 0 + 16)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()))
    naive = copy.deepcopy(model)
    expected, start = 0.0, 0
    for length in (5, 9, 1, 17):
        part = ids[:, start : start + length]
        state = naive.shadow_model(input_ids=part).last_hidden_state
        logits = state @ naive.shadow_hidden_projection.weight.T @ naive.lm_head.weight.T
        expected = expected + F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        start += length
    theirs = torch.autograd.grad(expected, [p for p in naive.parameters() if p.requires_grad])
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)  # the sum of chunks is kept in float32
    for one, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # Llama's norms are float32 inside


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch):
    model = tiny_shadow()
    ids, positions, labels = (t.repeat(30, 1) for t in pack())
    sizes = []
    stock = ProjectedShadow.logits
    monkeypatch.setattr(ProjectedShadow, "logits", lambda self, rows: sizes.append(len(rows)) or stock(self, rows))
    model(ids, positions, labels)
    with torch.no_grad():
        model(ids, positions, labels)
    assert max(sizes) == 512
    assert sum(sizes) == 2 * 60 * 28


def test_perplexity_is_that_of_the_stock_model_over_the_documents(finished, made):
    folder, result = finished
    stock = AutoModelForCausalLM.from_pretrained(folder / "stock")
    tokenizer = chat_tokenizer()
    ids = [t for row in documents(20, 100) for t in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    losses = []
    for start in range(0, 4 * 32, 32):
        part, begin = ids[start : start + 32], 0
        ends = [i + 1 for i, t in enumerate(part) if t == tokenizer.eos_token_id] + [32]
        for end in ends:
            if end - begin > 1:
                piece = torch.tensor([part[begin:end]])
                with torch.no_grad():
                    logits = stock(piece).logits[0, :-1]
                losses.append(F.cross_entropy(logits, piece[0, 1:], reduction="none"))
            begin = end
    assert math.exp(torch.cat(losses).double().mean()) == pytest.approx(result["perplexity"], rel=1e-4)


def test_accumulated_micro_batches_are_one_batch(config):
    one = run(config("one", training={"batch_size": 4, "gradient_accumulation": 1, "max_steps": 3}))
    two = run(config("two", training={"batch_size": 1, "gradient_accumulation": 4, "max_steps": 3}))
    mine, theirs = (load_file(Path(r["shadow"]) / "model.safetensors") for r in (one, two))
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], atol=2e-5, rtol=0)  # Adam divides by small gradients


def test_bfloat16_and_checkpointing_run_and_the_head_stays_exact(config, made):
    result = run(
        config(training={"precision": "bfloat16", "gradient_checkpointing": True, "schedule": "wsd", "decay": 0.5})
    )
    assert result["perplexity"] < 0.3 * result["perplexity_at_start"]
    head = load_file(Path(result["shadow"]) / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, load_file(Path(made["base"]) / "model.safetensors")["lm_head.weight"])
    rates = [r["learning_rate"] for r in read_metrics(Path(result["shadow"]).parent) if "loss" in r]
    assert rates[1:4] == [0.01] * 3
    assert rates[4] > rates[5]


def test_checkpointing_computes_the_same(config):
    one = run(config("one", training={"max_steps": 2}))
    two = run(config("two", training={"max_steps": 2, "gradient_checkpointing": True}))
    assert_same_files(Path(one["shadow"]).parent, Path(two["shadow"]).parent)


# ------------------------------------------------------------------------------------------------------ stopped, resumed


def test_the_seed_decides(finished, config):
    folder, _ = finished
    assert_same_files(folder, Path(run(config("again"))["shadow"]).parent)
    other = load_file(Path(run(config("other", training={"seed": 1}))["shadow"]) / "model.safetensors")
    assert not torch.equal(
        other["shadow_model.norm.weight"], load_file(folder / "shadow/model.safetensors")["shadow_model.norm.weight"]
    )


class _Stop(Exception):
    pass


@pytest.mark.parametrize("when", usual([1, 3, 5, 6], [3, 6]))
def test_a_run_cut_off_at_any_step_ends_bit_identical(finished, config, monkeypatch, when):
    folder, result = finished
    stock = PretrainCallback.on_step_end

    def cut(self, args, state, control, **kwargs):
        if state.global_step == when:
            raise _Stop
        return stock(self, args, state, control, **kwargs)

    made_config = config()
    with monkeypatch.context() as patch:
        patch.setattr(PretrainCallback, "on_step_end", cut)
        with pytest.raises(_Stop):
            run(made_config, resume=True)  # resume also starts
    again = run(made_config, resume=True)
    assert again["resumed_from_step"] == (when - 1) // 2 * 2
    own = Path(made_config.output)
    assert_same_files(
        folder, own, ("shadow/model.safetensors", "stock/model.safetensors", "checkpoint-6/model.safetensors")
    )
    assert untimed(own) == untimed(folder)
    for name in ("stream.json", "stream.safetensors"):
        mine, theirs = ((f / "checkpoint-6" / name).read_bytes() for f in (own, folder))
        assert mine == theirs
    different = {"seconds", "tokens_per_second", "resumed_from_step", "peak_memory_bytes", "shadow", "stock", "commit"}
    assert {k for k in result if again[k] != result[k]} <= different


def test_ctrl_c_saves_and_resume_ends_the_same(finished, config, monkeypatch):
    folder, _ = finished
    stock = PretrainCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return stock(self, args, state, control, **kwargs)

    made_config = config()
    with monkeypatch.context() as patch:
        patch.setattr(PretrainCallback, "on_step_end", interrupt)
        result = run(made_config)
    assert (result["interrupted"], result["steps"]) == (True, 3)
    assert run(made_config, resume=True)["resumed_from_step"] == 3
    assert_same_files(folder, made_config.output)


def test_a_run_folder_has_one_writer(config):
    with exclusive(Path(config("two").output)), pytest.raises(ConfigError, match="another process is writing to"):
        run(config("two"))
    assert run(config("two", training={"max_steps": 1}))["steps"] == 1


def test_a_finished_run_gives_its_result_again(finished):
    folder, result = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = pretrain(
        parse_pretraining(yaml.safe_load((folder / "config.yaml").read_text()), "x"), resume=True, quiet=True
    )
    assert again == result
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_what_may_not_be_resumed(config, made, tmp_path):
    text = write_rows(tmp_path / "own.jsonl", documents(40))
    sections = {"text": {"corpora": [{"path": text}]}}
    stopped = config(**sections)
    run(stopped)
    result = Path(stopped.output) / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "interrupted": True}))
    with pytest.raises(ConfigError, match="holds a run; continue it with --resume"):
        run(stopped)
    with pytest.raises(ConfigError, match=r"other settings \(text, training\.learning_rate\)"):
        run(config(text={"sequence_length": 16}, training={"learning_rate": 0.02}), resume=True)
    write_rows(tmp_path / "own.jsonl", documents(41))
    with pytest.raises(ConfigError, match="the train text has changed since"):
        run(stopped, resume=True)
    write_rows(tmp_path / "own.jsonl", documents(40))
    (Path(stopped.output) / "checkpoint-6" / "stream.json").write_text("{")
    with pytest.raises(AdapterFileError, match="remove this checkpoint and resume from the one before"):
        run(stopped, resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt' and no run"):
        run(config("full"))


# ------------------------------------------------------------------------------------------------------------- bad input


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_text(config, made, monkeypatch):
    made_config = config()
    stock = ProjectedShadow.row_loss
    bad = chat_tokenizer()("3")["input_ids"][0]

    def spoiled(self, rows, targets):
        value = stock(self, rows, targets)
        return value * float("nan") if steps["now"] >= 4 and bool((targets == bad).any()) else value

    steps = {"now": 0}
    counted = PretrainCallback.on_step_end

    def count(self, args, state, control, **kwargs):
        steps["now"] = state.global_step
        return counted(self, args, state, control, **kwargs)

    monkeypatch.setattr(ProjectedShadow, "row_loss", spoiled)
    monkeypatch.setattr(PretrainCallback, "on_step_end", count)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss became nan in step [56], at sequence \d+ .*text\.jsonl', row \d+"
    ):
        run(made_config)
    assert [p.name for p in sorted(Path(made_config.output).glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    kept = load_file(Path(made_config.output) / "checkpoint-4" / "model.safetensors")
    assert all(bool(torch.isfinite(v).all()) for v in kept.values())


def test_a_gradient_that_is_not_finite_never_reaches_a_weight(config, monkeypatch):
    def clip(self, model):
        return torch.tensor(float("inf"))

    monkeypatch.setattr(pretrain_trainer.Trainer, "_clip_grad_norm", clip)
    with pytest.raises(NonFiniteLossError, match="the gradient's norm became inf in step 1, at sequence 0"):
        run(config())


def test_a_corpus_that_ends_early(config, made):
    result = run(config(text={"on_end": "stop", "shuffle_buffer": 0}, training={"max_steps": 50}))
    assert result["ended_early"] == made["text"]
    assert 5 < result["steps"] < result["planned_steps"] == 50
    assert result["corpora"][0]["documents"] == 40
    assert (Path(result["shadow"]).parent / f"checkpoint-{result['steps']}").is_dir()
    assert result["perplexity"] < result["perplexity_at_start"]
    with pytest.raises(DataError, match="the corpora end before the first step of 6,400 tokens"):
        run(config("short", text={"on_end": "stop"}, training={"batch_size": 100}))
    assert not Path(config("short").output).exists()  # nothing is left that a corrected run would have to be moved from
    with pytest.raises(DataError, match=r"validation corpus .* is no whole sequence of 128"):
        run(config("held", text={"sequence_length": 128, "validation": [{"path": short(made)}]}))


def test_text_that_is_trained_on_is_not_held_out(config, made, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(made["text"])
    folder = str(Path(made["text"]).parent)
    hub = {"hub": "owner/name"}
    for name, corpora, validation, said in (
        ("same", [{"path": made["text"]}], [{"path": made["held"]}, {"path": made["text"]}], made["text"]),
        ("link", [{"path": made["text"]}], [{"path": str(link)}], str(link)),
        ("folder", [{"path": folder}], [{"path": made["held"]}], made["held"]),
        ("hub", [hub], [hub], "owner/name"),
    ):
        text = {"corpora": corpora, "validation": validation}
        with pytest.raises(ConfigError, match=f"text.validation names '{said}', but '.*is trained on"):
            run(config(name, text=text))
        assert not Path(config(name).output).exists()
    check_held_out(config(text={"validation": [{**hub, "split": "test"}], "corpora": [hub]}))  # another part of it


def short(made):
    return write_rows(Path(made["text"]).with_name("short.jsonl"), documents(2))


def test_skipped_shards_are_in_the_result(config, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    write_rows(tmp_path / "text" / "good.jsonl", documents(40))
    (tmp_path / "text" / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    corpora = [{"path": str(tmp_path / "text")}]
    with pytest.raises(DataError, match=r"bad\.jsonl' cannot be read \(line 2 is not valid JSON"):
        run(config("stop", text={"corpora": corpora}))
    result = run(config("skip", text={"corpora": corpora, "on_bad_shard": "skip"}))
    assert [each["shard"] for each in result["skipped"]] == [str(tmp_path / "text" / "bad.jsonl")]
    assert "is skipped" in " ".join(capsys.readouterr().err.split())


def test_models_that_do_not_belong_together(config, tmp_path, made):
    other = save_base(tmp_path / "other", hidden_size=24)
    chat_tokenizer(eos="<eos>").save_pretrained(other)
    file = Path(other) / "tokenizer.json"
    file.write_text(file.read_text().replace('"<|im_start|>"', '"<|other|>"'))
    with pytest.raises(ConfigError, match=r"tokenizers of base and shadow differ: token '<\|im_start\|>' with id 2"):
        run(config(backbone={"model": other}))
    with pytest.raises(
        ConfigError, match=r"do not fit together; the head is \(V, d\), so the projection must be \(32, 24\)"
    ):
        ProjectedShadow(chat_model(hidden_size=24).model, torch.zeros(24, 32), torch.zeros(260, 32))
    with pytest.raises(ConfigError, match="token table has 260 rows and the base's head 300"):
        ProjectedShadow(chat_model().model, None, torch.zeros(300, 32))
    same = save_base(tmp_path / "same")
    with pytest.raises(ConfigError, match="has the base's width 32, where the projection is the identity"):
        run(config(backbone={"model": same}, start="pseudo_inverse"))
    with pytest.raises(ConfigError, match="the backbone reads 256 tokens"):
        run(config(text={"sequence_length": 512}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"layers": "first"}}, "set both or neither"),
        ({"backbone": {"model": "m", "layers": "first", "count": 1}}, "exactly one of layers and model"),
        ({"start": "pseudo_inverse"}, "use base_layers_spread or random"),
        ({"text": {"corpora": [{"path": "a", "hub": "b"}]}}, "exactly one of path, hub and builtin"),
        ({"text": {"corpora": [{"path": "a", "wieght": 2.0}]}}, "did you mean 'weight'"),
        ({"text": {"corpora": []}}, "'text.corpora' is"),
        ({"training": {"tokens": 100}}, "exactly one of training.tokens and training.max_steps"),
        ({"training": {"decay": 0.5}}, "belongs to the schedule wsd"),
        ({"training": {"learning_rat": 0.5}}, "did you mean 'learning_rate'"),
        ({"lr": 1.0}, "unknown key 'lr'"),
        ({"text": {"validation": []}}, "training.eval_every is set but text.validation is empty"),
    ],
)
def test_impossible_configurations(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_the_command(config, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config(training={"max_steps": 2}).model_dump(exclude_unset=True)))
    code, out, _ = call(monkeypatch, capsys, "pretrain", file, "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 2
    code, out, err = call(monkeypatch, capsys, "pretrain", file)
    assert (code, "continue it with --resume" in err) == (2, True)
    code, out, _ = call(monkeypatch, capsys, "pretrain", file, "--resume")
    assert (code, "perplexity" in out) == (0, True)


# ------------------------------------------------------------------------------------------------------- both formats


@pytest.mark.parametrize("kind", usual(["pruned", "narrow"], ["narrow"]))
def test_a_fine_tuning_run_starts_from_either_format(config, made, tmp_path, kind):
    backbone = {"layers": "spread", "count": 2} if kind == "pruned" else {"model": made["small"]}
    result = run(config(backbone=backbone, training={"max_steps": 4}))
    shadow, stock = result["shadow"], result["stock"]
    given = read_projected(shadow)
    ids = torch.randint(4, 260, (2, 12))
    plain = AutoModelForCausalLM.from_pretrained(stock).eval()
    with torch.no_grad():
        state = given.backbone(input_ids=ids).last_hidden_state
        expected = state @ given.projection.T @ given.head.T
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=0)  # a folded head rounds its product
    rows = write_rows(tmp_path / "rows.jsonl", plain_rows())
    for name, source in (("shadow", shadow), ("stock", stock)):
        # a stock model has no projection: Eq. 12 recovers it from the folded head
        start = "pseudo_inverse" if (kind, name) == ("narrow", "stock") else "random"
        section = {"shadow_model": source, "projection_init": start, "share_embeddings": kind == "pruned"}
        content = run_file(tmp_path / f"tuned-{name}", made["base"], rows, training={"max_steps": 1}, shadow=section)
        untrained = {**content["training"], "learning_rate": 1e-12}
        summary = train(parse_run({**content, "training": untrained}, "x"), quiet=True)
        edge = shadowpeft.detach(shadowpeft.load(summary["adapter"]))
        with torch.no_grad():
            torch.testing.assert_close(edge(input_ids=ids).logits, expected, atol=1e-3, rtol=0)


def test_a_projected_checkpoint_goes_on(config, made):
    first = run(config("first", backbone={"model": made["small"]}))
    second = run(config("second", backbone={"model": first["shadow"]}))
    assert second["perplexity_at_start"] == pytest.approx(first["perplexity"], rel=1e-5)
    assert second["perplexity"] < first["perplexity"]
    assert second["start"]["start"] == "projected"
