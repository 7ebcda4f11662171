"""Projected checkpoints, the authors' and ours: as the shadow of a new adapter, of a loaded one, and alone."""

import copy
import json
import sys

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shadowpeft
from foreign import TOLERANCE, greedy, lm_batch
from shadowpeft.core import pseudo_inverse_projection
from shadowpeft.errors import AdapterFileError, ConfigError, UnsupportedModelError
from shadowpeft.hf import formats
from shadowpeft.hf.files import projected, reading
from shadowpeft.hf.formats import projected_writer
from tiny import adapt, adapter_config, base, randomise, small_llama, tokens

shadow_peft = pytest.importorskip("shadow_peft")

FOLDED = 1e-4
"""A folded head rounds the product W_lm W_p, whose sum runs over another dimension than two products one after the other."""


def small_qwen3(**options):
    return base(
        "qwen3", seed=2, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **options
    )


SMALL = {"llama": small_llama, "qwen3": small_qwen3}


@pytest.fixture(params=SMALL)
def made(request, tmp_path):
    """The authors' projected model for a tiny base, saved: folder, their model, base, the small model it came from."""
    plain, small = base("llama"), SMALL[request.param]()
    theirs = shadow_peft.AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small,
        shadow_hidden_projection=torch.nn.Linear(24, 32, bias=False),
        lm_head=plain.lm_head,
        init_optimal_projection=True,
        reference_lm_head=small.lm_head,
    ).eval()
    theirs.save_pretrained(tmp_path / "projected")
    return tmp_path / "projected", theirs, plain, small


def test_the_file_is_read_exactly(made):
    folder, theirs, plain, small = made
    assert projected.is_projected(folder)
    found = projected.read_projected(folder)
    assert torch.equal(found.projection, theirs.shadow_hidden_projection.weight)
    assert torch.equal(found.head, plain.lm_head.weight)
    state = found.backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in theirs.shadow_model.state_dict().items())
    # their start (an SVD) and ours (normal equations) are the same minimiser
    ours = pseudo_inverse_projection(plain.lm_head.weight.detach(), small.lm_head.weight.detach())
    torch.testing.assert_close(ours, found.projection.detach(), atol=1e-4, rtol=0)  # theirs is a float32 SVD


@pytest.mark.parametrize("module", [False, True])
def test_it_starts_a_new_shadow(made, module):
    folder, theirs, plain, _ = made
    ours = get_peft_model(copy.deepcopy(plain), adapter_config(shadow_model=theirs if module else str(folder))).eval()
    ids = tokens()
    with torch.no_grad():
        found, expected = ours(input_ids=ids, return_shadow=True), theirs(input_ids=ids)
        assert torch.equal(found.logits, plain(ids).logits)
    torch.testing.assert_close(found.shadow_logits, expected.logits, atol=TOLERANCE, rtol=0)
    hub = ours.base_model.model.model.shadow_hub
    assert torch.equal(hub.shadowpeft_projection["default"].weight, theirs.shadow_hidden_projection.weight)
    assert not any(p.requires_grad for p in hub.shadowpeft_embedding.parameters())
    assert theirs.shadow_model.embed_tokens is not None  # a module that was given stays as it was


def test_an_adapter_from_it_needs_it_no_more(made, tmp_path):
    folder, _, plain, _ = made
    ours = get_peft_model(copy.deepcopy(plain), adapter_config(shadow_model=str(folder))).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path / "adapter")
    (folder / "model.safetensors").unlink()
    again = shadowpeft.load(tmp_path / "adapter", copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens()).logits, ours(input_ids=tokens()).logits)


def test_it_is_the_explicit_shadow_of_the_authors_adapters(made, tmp_path):
    folder, theirs, plain, _ = made
    config = shadow_peft.ShadowConfig(dropout=0.0, alpha=0.7)
    inner = shadow_peft.get_shadow_model(copy.deepcopy(plain), config, shadow_model=copy.deepcopy(theirs))
    adapted = shadow_peft.ShadowForCausalLM(inner)
    assert torch.equal(inner.shadow_hidden_projection.weight, theirs.shadow_hidden_projection.weight)
    randomise(adapted)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=tokens())
        for given in (theirs, str(folder), folder):
            ours = shadowpeft.load(tmp_path / "adapter", copy.deepcopy(plain), shadow_model=given)
            found = ours(input_ids=tokens(), return_shadow=True)
            torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(found.shadow_logits, expected.shadow_logits, atol=TOLERANCE, rtol=0)


def test_it_is_the_explicit_shadow_of_peft_s_adapters(made, tmp_path):
    folder, _, plain, _ = made
    config = peft.ShadowConfig(task_type="CAUSAL_LM", shadow_model=str(folder), shadow_dropout=0.0, shadow_alpha=0.7)
    adapted = get_peft_model(copy.deepcopy(plain), config)
    randomise(adapted)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    ours = shadowpeft.load(tmp_path / "adapter", copy.deepcopy(plain))
    with torch.no_grad():
        expected, found = adapted(**lm_batch()), ours(**lm_batch())
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_loss, expected.shadow_loss, atol=TOLERANCE, rtol=0)
    formats.write(ours, tmp_path / "back", "peft")
    back = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(back(**lm_batch()).logits, expected.logits)


def test_stock_model_with_a_folded_head(made, tmp_path):
    folder, theirs, _, small = made
    stock = projected.to_stock(projected.read_projected(folder))
    assert type(stock) is type(small)
    stock.save_pretrained(tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    prompt = tokens(2, 6)
    with torch.no_grad():
        expected = theirs(input_ids=tokens()).logits
        torch.testing.assert_close(again(tokens()).logits, expected, atol=FOLDED, rtol=0)
    expected = greedy(lambda x: theirs(input_ids=x), prompt)
    assert torch.equal(again.generate(prompt, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_tied"])
def test_a_shadow_written_in_the_format_runs_in_their_package(tmp_path, name):
    ours = adapt(base(name), shadow_model="small_llama")
    projected_writer.save_projected(ours, tmp_path)
    theirs = shadow_peft.AutoModelForCausalLMWithHiddenProjection.from_pretrained(tmp_path)
    with torch.no_grad():
        found, expected = theirs(input_ids=tokens()).logits, ours(input_ids=tokens(), return_shadow=True).shadow_logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    again = projected.read_projected(tmp_path)
    hub = ours.base_model.model.model.shadow_hub
    assert torch.equal(again.projection, hub.shadowpeft_projection["default"].weight)
    state = again.backbone.state_dict()
    backbone = hub.shadowpeft_backbone["default"].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in backbone.items())
    assert torch.equal(state["embed_tokens.weight"], hub.shadowpeft_embedding["default"].weight)


def test_write_read_write_is_the_same_file(made, tmp_path):
    folder, _, _, _ = made
    parts = projected.read_projected(folder)
    table = parts.backbone.get_input_embeddings().weight
    projected.write_projected(tmp_path / "again", parts.backbone, table, parts.projection, parts.head)
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert set(first) == set(second)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_what_the_format_cannot_express_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no projection"):
        projected_writer.save_projected(adapt(base("llama")), tmp_path)
    with pytest.raises(ConfigError, match="is a classifier's"):
        projected_writer.save_projected(
            adapt(base("llama", task="SEQ_CLS"), task_type="SEQ_CLS", shadow_model="small_llama"), tmp_path
        )
    with pytest.raises(UnsupportedModelError, match="soft-cap"):
        projected_writer.save_projected(adapt(base("gemma3"), shadow_model="small_llama"), tmp_path)


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("key", ["shadow_model_class", "shadow_model_config_class"])
def test_nothing_that_a_file_names_is_imported(tmp_path, key, monkeypatch):
    projected_writer.save_projected(adapt(base("llama"), shadow_model="small_llama"), tmp_path)
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for named in (
        "trap:Trap",
        "trap.LlamaModel",
        "os:system",
        "transformers.models.llama.modeling_llama:LlamaAttention",
    ):
        _edit(tmp_path, **{key: named})
        with pytest.raises(AdapterFileError, match="nothing that a file names is imported"):
            projected.read_projected(tmp_path)
        with pytest.raises(AdapterFileError, match="nothing that a file names is imported"):
            get_peft_model(base("llama"), adapter_config(shadow_model=str(tmp_path)))
    assert "trap" not in sys.modules


def test_bad_files_are_refused_by_name(tmp_path):
    projected_writer.save_projected(adapt(base("llama"), shadow_model="small_llama"), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    inner = content["shadow_model_config"]
    for changes, said in (
        ({"base_hidden_size": 48}, "has shape"),
        ({"vocab_size": 0}, r"lacks \['vocab_size'\]"),
        ({"shadow_model_config": {**inner, "num_hidden_layers": 3}}, "missing"),
        ({"shadow_model_config": {**inner, "model_type": "unheard_of"}}, "unheard_of"),
        ({"shadow_model_config": {**inner, "model_type": projected.MODEL_TYPE}}, projected.MODEL_TYPE),
        ({"shadow_model_config": [1]}, "must be the JSON object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
        with pytest.raises((AdapterFileError, ConfigError), match=said):
            projected.read_projected(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    save_file({**good, "shadow_model.extra": torch.zeros(2)}, path)
    with pytest.raises(AdapterFileError, match=r"unknown.*shadow_model\.extra"):
        projected.read_projected(tmp_path)
    save_file({**good, "lm_head.weight": torch.full((61, 32), float("nan"))}, path)
    with pytest.raises(AdapterFileError, match=r"lm_head\.weight.*NaN"):
        projected.read_projected(tmp_path)
    with pytest.raises(AdapterFileError, match="a model and not an adapter"):
        shadowpeft.load(tmp_path, base("llama"))


def test_a_checkpoint_for_another_base(tmp_path):
    projected_writer.save_projected(adapt(base("llama"), shadow_model="small_llama"), tmp_path)
    wide = base("llama", hidden_size=48)
    with pytest.raises(ConfigError, match="made for a base of width 32 but this base has width 48"):
        get_peft_model(wide, adapter_config(shadow_model=str(tmp_path)))
    with pytest.warns(UserWarning, match="LM head that differs from this base's"):
        get_peft_model(base("llama", seed=9), adapter_config(shadow_model=str(tmp_path)))
    with pytest.raises(ConfigError, match="brings its own projection"):
        get_peft_model(base("llama"), adapter_config(shadow_model=str(tmp_path), projection_init="pseudo_inverse"))


def test_sharded_checkpoints(tmp_path):
    projected_writer.save_projected(adapt(base("llama"), shadow_model="small_llama"), tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    expected = projected.read_projected(tmp_path).head
    (tmp_path / "model.safetensors").unlink()
    index = {}
    for number, key in enumerate(sorted(whole)):
        index[key] = f"model-{number % 2}.safetensors"
    for shard in set(index.values()):
        save_file({k: v for k, v in whole.items() if index[k] == shard}, tmp_path / shard)
    (tmp_path / reading.INDEX).write_text(json.dumps({"weight_map": index}))
    assert torch.equal(projected.read_projected(tmp_path).head, expected)
    (tmp_path / reading.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(AdapterFileError, match="names no files beside it"):
        projected.read_projected(tmp_path)
