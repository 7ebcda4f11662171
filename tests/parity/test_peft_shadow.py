"""Adapters made with PEFT's own SHADOW method: equal numbers here, and back in PEFT."""

import copy
import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import shadowpeft
from foreign import TOLERANCE, assert_gradients, greedy, labels_for, lm_batch, parts_of, train_steps
from products import covering, usual
from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf import formats
from shadowpeft.hf.formats import common, peft_shadow, table
from tiny import adapt, base, padded, randomise, small_llama, tokens

NARROW = {"shadow_intermediate_size": 24, "shadow_num_attention_heads": 2}
CASES = {
    "llama": ("llama", {}),
    "qwen3-narrow": ("qwen3", {"shadow_num_hidden_layers": 2, **NARROW}),
    "gpt2": ("gpt2", {"shadow_num_hidden_layers": 2}),
    "own-table": ("llama", {"share_embeddings": False}),
    "own-table-gpt2": ("gpt2", {"share_embeddings": False}),
    "narrow-width": ("qwen3", {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2}),
    "explicit": ("llama", {"shadow_model": "small"}),
    "some-layers": ("llama", {"target_modules": ["model.layers.1", "model.layers.2"]}),
    "by-pattern": ("qwen3", {"target_modules": r"model\.layers\.[123]"}),
    "index-that-peft-ignores": ("llama", {"layers_to_transform": [0, 1], "layers_pattern": "layers"}),
    "excluded": ("llama", {"target_modules": r".*\.layers\.\d+", "exclude_modules": r".*\.layers\.3"}),
}


USUAL = ("llama", "qwen3-narrow", "gpt2", "own-table-gpt2", "explicit", "some-layers")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the model an explicit shadow starts from."""
    folder = tmp_path_factory.mktemp("small")
    small_llama().save_pretrained(folder)
    return str(folder)


def produce(folder, small, name="llama", config=None, task="CAUSAL_LM", trained=True, save=True):
    """PEFT's model with random (or a few steps trained) weights, saved; and an untouched base."""
    plain = base(name, task=task)
    values = {"r": 5, "update_hidden_size": 3, "shadow_alpha": 0.7, "shadow_dropout": 0.0, "auxiliary_loss_weight": 0.3}
    values.update(config or {})
    if values.get("shadow_model") == "small":
        values["shadow_model"] = small
    theirs = get_peft_model(copy.deepcopy(plain), peft.ShadowConfig(task_type=task, **values))
    if trained and task == "CAUSAL_LM":
        train_steps(theirs, lm_batch)
    else:
        randomise(theirs)
    theirs.eval()
    if save:
        theirs.save_pretrained(folder)
    return plain, theirs


def trained_state(theirs):
    """PEFT's tensors by their name in the file, as parameters (with gradients)."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if ".shadow_" in name or "base_model.shadow_" in name:
            found[name.replace(".base_layer.", ".")] = parameter
    return found


@pytest.mark.filterwarnings("ignore:.*adapts layers 0 to 2 of 4")
@pytest.mark.parametrize("case", usual(CASES, USUAL))
def test_logits_losses_and_tokens_are_theirs(tmp_path, small, case):
    plain, theirs = produce(tmp_path, small, *CASES[case])
    ours = shadowpeft.load(tmp_path, copy.deepcopy(plain))
    ids, mask = padded(tokens(), [0, 2, 4])
    labels = labels_for(ids).masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
        found = ours(input_ids=ids, attention_mask=mask, labels=labels, return_shadow=True)
        alone = theirs.base_model.unload_shadow()(ids, attention_mask=mask)
        assert float((expected.logits - plain(ids, attention_mask=mask).logits).abs().max()) > 0.1
    valid = mask.bool()
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_logits[valid], alone.logits[valid], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_loss, expected.shadow_loss, atol=TOLERANCE, rtol=0)
    joint = found.task_loss + 0.3 * found.shadow_loss
    torch.testing.assert_close(joint, expected.loss, atol=TOLERANCE, rtol=0)
    assert torch.equal(found.loss, found.task_loss)  # theirs joins in eval mode too (docs/defects.md, 3)
    prompt = tokens(2, 6, seed=8)
    ours_tokens = ours.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(greedy(lambda x: theirs(input_ids=x, use_cache=False), prompt), ours_tokens)
    assert torch.equal(theirs.generate(input_ids=prompt, max_new_tokens=8, do_sample=False), ours_tokens)


@pytest.mark.filterwarnings("ignore:.*adapts layers 0 to 2 of 4")
@pytest.mark.parametrize("case", usual(CASES, USUAL))
def test_gradients_are_theirs(tmp_path, small, case):
    plain, theirs = produce(tmp_path, small, *CASES[case])
    ours = shadowpeft.load(tmp_path, copy.deepcopy(plain), is_trainable=True)
    theirs.train(), ours.train()
    expected, found = theirs(**lm_batch(9)), ours(**lm_batch(9))
    torch.testing.assert_close(found.loss, expected.loss, atol=TOLERANCE, rtol=0)
    expected.loss.backward(), found.loss.backward()
    gradients = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in trained_state(theirs).items()}
    parts, config = parts_of(plain), ours.peft_config["default"]
    backbone = theirs.base_model.shadow_backbone["default"]
    shadow = common.ShadowLayout.of(parts, backbone.config, mirror=config.is_mirror, shared=config.shares_embeddings)
    rows = peft_shadow.tensor_table(plain, parts, shadow, {}, config)
    assert_gradients(ours, table.to_ours(rows, gradients))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_falls_in_the_same_places(tmp_path, small, name):
    plain, theirs = produce(tmp_path, small, name, {"shadow_dropout": 0.3})
    ours = shadowpeft.load(tmp_path, plain, is_trainable=True)
    theirs.train(), ours.train()
    torch.manual_seed(3)
    expected = theirs(**lm_batch()).loss
    torch.manual_seed(3)
    found = ours(**lm_batch()).loss
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    torch.manual_seed(4)
    assert float((ours(**lm_batch()).loss - expected).detach().abs()) > 1e-3


def test_settings_come_from_their_file(tmp_path, small):
    plain, _ = produce(tmp_path, small, config={"shadow_dropout": 0.15, "update_hidden_size": None}, trained=False)
    ours = shadowpeft.load(tmp_path, plain).peft_config["default"]
    assert (ours.variant, ours.r, ours.update_width, ours.shadow_alpha, ours.shadow_dropout) == (
        "peft",
        5,
        5,
        0.7,
        0.15,
    )
    assert (ours.auxiliary_loss_weight, ours.refined_layers) == (0.3, None)


@pytest.mark.parametrize(("name", "side"), covering(["llama", "qwen3"], ["left", "right"]))
def test_classifiers(tmp_path, small, name, side):
    plain, theirs = produce(tmp_path, small, name, task="SEQ_CLS")
    ours = shadowpeft.load(tmp_path, copy.deepcopy(plain))
    ids, mask = padded(tokens(), [0, 2, 4], side)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
        found = ours(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_loss, expected.shadow_loss, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.task_loss + 0.3 * found.shadow_loss, expected.loss, atol=TOLERANCE, rtol=0)
    assert not torch.equal(ours.base_model.model.score.modules_to_save["default"].weight, plain.score.weight)
    formats.write(ours, tmp_path / "back", "peft")
    back = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back")
    with torch.no_grad():
        again = back(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(again.shadow_loss, expected.shadow_loss)


def test_saved_modules(tmp_path, small):
    plain, theirs = produce(tmp_path, small, config={"modules_to_save": ["lm_head"]})
    ours = shadowpeft.load(tmp_path, copy.deepcopy(plain))
    with torch.no_grad():
        expected, found = theirs(**lm_batch()), ours(**lm_batch())
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(
        found.shadow_loss, expected.shadow_loss, atol=TOLERANCE, rtol=0
    )  # it reads the trained head
    assert not torch.equal(ours.base_model.model.lm_head.modules_to_save["default"].weight, plain.lm_head.weight)


@pytest.mark.filterwarnings("ignore:.*adapts layers 0 to 2 of 4")
@pytest.mark.parametrize("case", usual(CASES, USUAL))
def test_written_back_it_runs_in_peft_and_returns_to_the_bit(tmp_path, small, case):
    plain, theirs = produce(tmp_path / "theirs", small, *CASES[case])
    ours = shadowpeft.load(tmp_path / "theirs", copy.deepcopy(plain))
    formats.write(ours, tmp_path / "back", "peft")
    original, back = (load_file(tmp_path / name / peft_shadow.WEIGHTS) for name in ("theirs", "back"))
    assert set(back) == set(original)
    last = list(ours.peft_config["default"].refined(4))[-1]
    dead = {key for key in original if f".{last}.shadow_update_" in key}
    assert len(dead) == 8
    if case == "gpt2":
        dead |= {"base_model.shadow_backbone.default.wte.weight"}
    assert {key for key in original if not torch.equal(original[key], back[key])} == dead
    again = shadowpeft.load(tmp_path / "back", copy.deepcopy(plain))
    mine = dict(ours.named_parameters())
    assert all(torch.equal(value, mine[key]) for key, value in again.named_parameters())
    reloaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits)


def test_an_adapter_made_here_runs_in_peft(tmp_path):
    plain = base("llama")
    for number, fields in enumerate([{}, {"shadow_num_hidden_layers": 2, "share_embeddings": False}]):
        ours = adapt(plain, variant="peft", auxiliary_loss_weight=0.3, **fields)
        formats.write(ours, tmp_path / str(number), "peft")
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / str(number))
        with torch.no_grad():
            found, expected = theirs(**lm_batch()), ours(**lm_batch())
        torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
        joint = expected.task_loss + 0.3 * expected.shadow_loss
        torch.testing.assert_close(found.loss, joint, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "variant='paper'"),
        ({"variant": "authors"}, "variant='authors'"),
        ({"variant": "peft", "use_update": False}, "use_update=False"),
        ({"variant": "peft", "own_shadow_head": True}, "own_shadow_head=True"),
        ({"variant": "peft", "shadow_num_key_value_heads": 1}, "num_key_value_heads"),
        ({"variant": "peft", "shadow_model": "small_llama"}, "given as a module"),
    ],
)
def test_what_peft_s_format_cannot_express_is_refused_by_name(tmp_path, fields, named):
    with pytest.raises(ConfigError, match=named):
        formats.write(adapt(base("llama"), **fields), tmp_path, "peft")


def test_the_base_comes_from_their_record(tmp_path, small):
    base("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.ShadowConfig(task_type="CAUSAL_LM", shadow_dropout=0.0),
    )
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = shadowpeft.load(tmp_path / "theirs")
    assert ours.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    with torch.no_grad():
        found, expected = ours(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(shadowpeft.load(tmp_path / "ours")(input_ids=tokens()).logits, found)


def test_another_adapter_name(tmp_path, small):
    plain, theirs = produce(tmp_path, small, save=False)
    theirs.add_adapter("second", theirs.peft_config["default"])
    theirs.set_adapter("second")
    randomise(theirs)
    theirs.save_pretrained(tmp_path, selected_adapters=["second"])
    ours = shadowpeft.load(tmp_path / "second", plain)
    with torch.no_grad():
        found, expected = ours(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_an_explicit_shadow_can_be_given(tmp_path, small):
    plain, theirs = produce(tmp_path, small, config={"shadow_model": "small"})
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shadow_model": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match="pass shadow_model="):
        shadowpeft.load(tmp_path, copy.deepcopy(plain))
    ours = shadowpeft.load(tmp_path, copy.deepcopy(plain), shadow_model=small_llama())
    with torch.no_grad():
        found, expected = ours(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shadow_alhpa": 0.1}, "unknown key 'shadow_alhpa'.*did you mean 'shadow_alpha'"),
        ({"shadow_alpha": ...}, r"lacks the keys \['shadow_alpha'\]"),
        ({"task_type": "TOKEN_CLS"}, "TOKEN_CLS"),
        ({"r": 6}, "has shape"),
        ({"r": "5"}, "r is '5'"),
        ({"shadow_num_hidden_layers": 2}, "missing"),
        ({"shadow_num_hidden_layers": 0}, "shadow_num_hidden_layers is 0"),
        ({"share_embeddings": False}, "missing.*embed_tokens"),
        ({"share_embeddings": "yes"}, "share_embeddings is 'yes' but must be a valid boolean"),
        ({"target_modules": ["model.layers.0"]}, r"choose \[0\]"),
        ({"target_modules": ["model.layers.0"], "layers_pattern": "layers"}, "PEFT refuses"),
        ({"modules_to_save": ["lm_head"]}, "missing.*lm_head"),
        ({"modules_to_save": ["nothing"]}, "does not have"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3 but must be a valid string"),
        ({"revision": 3}, "revision is 3 but must be a valid string"),
    ],
)
def test_bad_configurations_are_refused_by_name(tmp_path, small, changes, said):
    plain, _ = produce(tmp_path, small, trained=False)
    path = tmp_path / "adapter_config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not Ellipsis}))
    before = set(dict(plain.named_modules()))
    with pytest.raises((ConfigError, AdapterFileError), match=said):
        shadowpeft.load(tmp_path, plain)
    assert set(dict(plain.named_modules())) == before


def test_bad_weights_are_refused_by_name(tmp_path, small):
    plain, _ = produce(tmp_path, small, trained=False)
    path = tmp_path / peft_shadow.WEIGHTS
    good = load_file(path)
    down = "base_model.model.model.layers.2.shadow_down.default.weight"

    def refused(tensors, said, model=plain):
        save_file(tensors, path)
        with pytest.raises(AdapterFileError, match=said):
            shadowpeft.load(tmp_path, copy.deepcopy(model))

    refused({k: v for k, v in good.items() if k != down}, r"layers \[0, 1, 3\]")
    refused({**good, "base_model.model.model.norm.weight": torch.zeros(32)}, "unknown.*norm.weight")
    refused({**good, down: torch.full((5, 32), float("inf"))}, "NaN or infinite")
    refused({**good, down: torch.zeros(5, 31)}, "has shape")
    refused(good, "pass the base it was trained on", base("llama", num_hidden_layers=3))
    with pytest.warns(UserWarning, match="layers 0 to 3 of 6"):  # PEFT says nothing (docs/defects.md, 22)
        shadowpeft.load(tmp_path, base("llama", num_hidden_layers=6))
    with pytest.raises(ConfigError, match="does not name its base"):
        shadowpeft.load(tmp_path)
    with pytest.raises(ConfigError, match="is a CAUSAL_LM adapter but the base is a LlamaForSequenceClassification"):
        shadowpeft.load(tmp_path, base("llama", task="SEQ_CLS"))
