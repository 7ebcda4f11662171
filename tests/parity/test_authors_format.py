"""Adapters made with the authors' package: equal numbers here, and back in their package."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import shadowpeft
from foreign import TOLERANCE, assert_gradients, greedy, labels_for, lm_batch, parts_of, train_steps
from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf import formats
from shadowpeft.hf.formats import authors, common, table
from tiny import adapt, base, padded, randomise, small_llama, tokens

shadow_peft = pytest.importorskip("shadow_peft")

NARROW = {"shadow_intermediate_size": 24, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 1}
CASES = {
    "llama": ("llama", {}, None),
    "qwen3-narrow": ("qwen3", {"num_shadow_layers": 2, "shadow_head_dim": 4, **NARROW}, None),
    "gpt2": ("gpt2", {"num_shadow_layers": 2, "shadow_intermediate_size": 24}, None),
    "mistral": ("mistral", {}, None),
    "explicit": ("llama", {}, "small"),
    "explicit-gpt2": ("gpt2", {}, "small"),
    "explicit-shared": ("qwen3", {}, "shared"),
}


def explicit(kind):
    """A fresh explicit shadow: another width with its own table, or the base's width without one."""
    if kind == "shared":
        return shadow_peft.prepare_shadow_model(base("llama", seed=4, num_hidden_layers=2), remove_embed_tokens=True)
    return small_llama() if kind == "small" else None


def _share(inner, kind):
    """Their own test for a missing table raises on transformers 5.23 and is swallowed: say that the table is missing."""
    if kind == "shared":
        inner._explicit_share_base_embeddings = True


def produce(
    folder, name="llama", config=None, kind=None, task="CAUSAL_LM", trained=True, save=True, weight=0.3, **shape
):
    """Their model with random (or a few steps trained) weights, saved; and an untouched base."""
    plain = base(name, task=task, **shape)
    values = {"injection_hidden_size": 5, "gate_hidden_size": 3, "alpha": 0.7, "dropout": 0.0, **(config or {})}
    inner = shadow_peft.get_shadow_model(
        copy.deepcopy(plain), shadow_peft.ShadowConfig(**values), shadow_model=explicit(kind)
    )
    _share(inner, kind)
    made = shadow_peft.ShadowForCausalLM if task == "CAUSAL_LM" else shadow_peft.ShadowForSequenceClassification
    theirs = made(inner, shadow_loss_weight=weight)
    if trained and task == "CAUSAL_LM":
        train_steps(theirs, lm_batch)
    else:
        randomise(theirs)
    theirs.eval()
    if save:
        theirs.save_pretrained(folder)
    return plain, theirs


def load(folder, plain, kind=None, weight=0.3, **options):
    ours = shadowpeft.load(folder, copy.deepcopy(plain), shadow_model=explicit(kind), **options)
    ours.peft_config["default"].auxiliary_loss_weight = weight  # an argument of theirs, not part of the file
    return ours


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in ("mistral", "explicit-gpt2", "qwen3-narrow"))) for c in CASES]
)
def test_logits_losses_and_tokens_are_theirs(tmp_path, case):
    name, config, kind = CASES[case]
    plain, theirs = produce(tmp_path, name, config, kind)
    ours = load(tmp_path, plain, kind)
    ids, mask = padded(tokens(), [0, 2, 4])
    labels = labels_for(ids).masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
        found = ours(input_ids=ids, attention_mask=mask, labels=labels, return_shadow=True)
        assert float((expected.logits - plain(ids, attention_mask=mask).logits).abs().max()) > 0.1
        theirs.set_inference_mode("shadow_only")
        alone = theirs(input_ids=ids, attention_mask=mask, labels=labels)
        theirs.set_inference_mode("base_shadow")
    valid = mask.bool()
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_logits[valid], expected.shadow_logits[valid], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_loss, alone.loss, atol=TOLERANCE, rtol=0)
    joint = found.task_loss + 0.3 * found.shadow_loss
    torch.testing.assert_close(joint, expected.loss, atol=TOLERANCE, rtol=0)
    assert torch.equal(found.loss, found.task_loss)  # theirs joins in eval mode too; here that is for training alone
    prompt = tokens(2, 6, seed=8)
    assert torch.equal(
        greedy(lambda x: theirs(input_ids=x), prompt), ours.generate(prompt, max_new_tokens=8, do_sample=False)
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_theirs(tmp_path, case):
    name, config, kind = CASES[case]
    plain, theirs = produce(tmp_path, name, config, kind)
    ours = load(tmp_path, plain, kind, is_trainable=True)
    theirs.train(), ours.train()
    expected = theirs(**lm_batch(9))
    found = ours(**lm_batch(9))
    torch.testing.assert_close(found.loss, expected.loss, atol=TOLERANCE, rtol=0)
    expected.loss.backward(), found.loss.backward()
    inner = theirs.peft_model
    gradients = {}
    for key, value in inner.adapter_state_dict().items():
        parameter = inner.get_parameter(key)
        gradients[key] = torch.zeros_like(value) if parameter.grad is None else parameter.grad
    parts = parts_of(plain)
    shadow = common.ShadowLayout.of(parts, inner.shadow_model.config, mirror=kind is None, shared=kind != "small")
    rows = authors.tensor_table(parts, shadow, ours.peft_config["default"])
    assert_gradients(ours, table.to_ours(rows, gradients))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_falls_in_the_same_places(tmp_path, name):
    plain, theirs = produce(tmp_path, name, {"dropout": 0.3})
    ours = load(tmp_path, plain, is_trainable=True)
    theirs.train(), ours.train()
    torch.manual_seed(3)
    expected = theirs(**lm_batch()).loss
    torch.manual_seed(3)
    found = ours(**lm_batch()).loss
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    torch.manual_seed(4)
    assert float((ours(**lm_batch()).loss - expected).detach().abs()) > 1e-3


def test_settings_come_from_their_file(tmp_path):
    config = {"num_shadow_layers": 2, "dropout": 0.15, "alpha": 1.5, **NARROW}
    plain, _ = produce(tmp_path, config=config, trained=False)
    ours = shadowpeft.load(tmp_path, plain).peft_config["default"]
    assert (ours.variant, ours.r, ours.update_width, ours.shadow_alpha, ours.shadow_dropout) == (
        "authors",
        5,
        3,
        1.5,
        0.15,
    )
    assert (ours.shadow_num_hidden_layers, ours.shadow_num_key_value_heads) == (2, 1)
    assert ours.auxiliary_loss_weight == authors.DEFAULT_WEIGHT


def test_a_shadow_of_mixed_attention_takes_the_base_s_first_layers(tmp_path):
    """Gemma 3 starts with a sliding layer: theirs copies that one, a new adapter here takes the first full one."""
    plain, theirs = produce(tmp_path, "gemma3", trained=False)
    ours = load(tmp_path, plain)
    assert ours.peft_config["default"].shadow_backbone_config["layer_types"] == ["sliding_attention"]
    ids = tokens(2, 14)
    with torch.no_grad():
        found, expected = ours(input_ids=ids, return_shadow=True), theirs(input_ids=ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    # theirs leaves the base's soft-cap of 3 out on the shadow's path; here the shadow has the complete head
    torch.testing.assert_close(found.shadow_logits, 3 * torch.tanh(expected.shadow_logits / 3), atol=TOLERANCE, rtol=0)
    _, translation = formats.load(tmp_path, "authors", copy.deepcopy(plain))
    assert any("soft-caps" in note for note in translation.notes)


def test_a_base_of_two_layers(tmp_path):
    plain, theirs = produce(tmp_path, num_hidden_layers=2)
    ours = load(tmp_path, plain)
    with torch.no_grad():
        found, expected = ours(**lm_batch()), theirs(**lm_batch())
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    assert not any("shadowpeft_norm" in n or "shadowpeft_update" in n for n, _ in ours.named_parameters())


# ------------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("listed", [[], ["classifier_head"], ["shadow_classifier_head"]])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_classifier_heads(tmp_path, name, listed):
    plain, theirs = produce(tmp_path, name, {"modules_to_save": listed}, task="SEQ_CLS")
    ours = load(tmp_path, plain)
    ids, mask = padded(tokens(), [0, 2, 4])
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
        found = ours(input_ids=ids, attention_mask=mask, labels=labels, return_shadow=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_logits, expected.shadow_logits, atol=TOLERANCE, rtol=0)
    joint = found.task_loss + 0.3 * found.shadow_loss
    torch.testing.assert_close(joint, expected.loss, atol=TOLERANCE, rtol=0)
    head = ours.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head, plain.score.weight) == (listed == ["shadow_classifier_head"])


@pytest.mark.parametrize("stored", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_classifier_s_base_by_its_folder(tmp_path, stored):
    """The task and the number of classes come from the heads in the file, also for a base that was saved without one."""
    plain, theirs = produce(tmp_path / "theirs", task="SEQ_CLS")
    whole = plain if stored == "SEQ_CLS" else base("llama")
    whole.model.load_state_dict(plain.model.state_dict())
    whole.save_pretrained(tmp_path / "base")
    ours = shadowpeft.load(tmp_path / "theirs", tmp_path / "base")
    with torch.no_grad():
        found, expected = ours(input_ids=tokens(), return_shadow=True), theirs(input_ids=tokens())
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_logits, expected.shadow_logits, atol=TOLERANCE, rtol=0)


def test_what_was_dropped_is_logged(tmp_path, caplog):
    plain, _ = produce(tmp_path, "gpt2", trained=False)
    with caplog.at_level("INFO", logger="shadowpeft"):
        shadowpeft.load(tmp_path, plain)
    for said in ("nothing reads the last update", "shadow_model.wte.weight", "lambda is not in the file"):
        assert said in caplog.text


def test_left_padding_pools_the_last_token_where_theirs_does_not(tmp_path):
    plain, theirs = produce(tmp_path, task="SEQ_CLS")
    ours = load(tmp_path, plain)
    right, right_mask = padded(tokens(), [0, 2, 4])
    left, left_mask = right.clone(), right_mask.clone()
    for row, count in enumerate([0, 2, 4]):
        left[row], left_mask[row] = right[row].roll(count), right_mask[row].roll(count)
    with torch.no_grad():
        expected = theirs(input_ids=right, attention_mask=right_mask).shadow_logits
        wrong = theirs(input_ids=left, attention_mask=left_mask).shadow_logits
        # positions count from the first real token, so that only the place of the padding differs
        positions = (left_mask.cumsum(-1) - 1).clamp(min=0)
        found = ours(input_ids=left, attention_mask=left_mask, position_ids=positions, return_shadow=True).shadow_logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert float((wrong - expected).abs().max()) > 0.1


def test_lost_classifier_heads_are_an_error(tmp_path):
    plain, _ = produce(tmp_path, task="SEQ_CLS")
    (tmp_path / authors.MODULES).unlink()
    with pytest.raises(AdapterFileError, match="classifier heads are missing"):
        shadowpeft.load(tmp_path, plain)


# ------------------------------------------------------------------------------------------------------ trained LM heads


@pytest.mark.parametrize("listed", [["shadow_lm_head"], ["lm_head"], ["lm_head", "shadow_lm_head"]])
def test_trained_lm_heads_are_carried(tmp_path, listed):
    plain, theirs = produce(tmp_path / "theirs", config={"modules_to_save": listed})
    ours = load(tmp_path / "theirs", plain)
    ids = tokens()
    with torch.no_grad():
        expected = theirs(input_ids=ids, labels=ids)
        assert all(not torch.equal(getattr(theirs, head).weight, plain.lm_head.weight) for head in listed)
        for model in (ours, _again(ours, tmp_path / "ours", plain)):
            found = model(input_ids=ids, labels=ids, return_shadow=True)
            torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(found.shadow_logits, expected.shadow_logits, atol=TOLERANCE, rtol=0)
            edge = shadowpeft.detach(model)
            torch.testing.assert_close(edge(ids).logits, expected.shadow_logits, atol=TOLERANCE, rtol=0)
    joint = found.task_loss + 0.3 * found.shadow_loss
    torch.testing.assert_close(joint, expected.loss, atol=TOLERANCE, rtol=0)
    formats.write(ours, tmp_path / "back", "authors")
    back = shadow_peft.ShadowForCausalLM.from_pretrained(copy.deepcopy(plain), tmp_path / "back")
    with torch.no_grad():
        written = back(input_ids=ids)
    torch.testing.assert_close(written.logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(written.shadow_logits, expected.shadow_logits, atol=TOLERANCE, rtol=0)


def _again(ours, folder, plain):
    ours.save_pretrained(folder)
    return shadowpeft.load(folder, copy.deepcopy(plain))


def test_a_shadow_head_that_was_trained_trains_on(tmp_path):
    plain, _ = produce(tmp_path, config={"modules_to_save": ["shadow_lm_head"]})
    ours = load(tmp_path, plain, is_trainable=True)
    ours.train()
    ours(**lm_batch()).loss.backward()
    (head,) = [p for n, p in ours.named_parameters() if "shadowpeft_head" in n]
    assert float(head.grad.norm()) > 0
    assert all(p.grad is None for n, p in ours.named_parameters() if n.endswith("lm_head.weight"))


def test_a_head_equal_to_the_base_s_is_dropped_and_reported(tmp_path):
    plain, theirs = produce(tmp_path, save=False)
    theirs.save_pretrained(tmp_path)
    save_file({"shadow_lm_head.weight": plain.lm_head.weight.detach().clone()}, tmp_path / authors.MODULES)
    ours, translation = formats.load(tmp_path, "authors", copy.deepcopy(plain))
    assert any("shadow_lm_head" in line for line in translation.dropped)
    assert not ours.peft_config["default"].own_shadow_head


def test_a_trained_head_of_a_tied_base_is_refused(tmp_path):
    plain, _ = produce(tmp_path, "llama_tied", {"modules_to_save": ["lm_head"]}, trained=False)
    with pytest.raises(ConfigError, match="token table"):
        shadowpeft.load(tmp_path, plain)


# ------------------------------------------------------------------------------------------------------- and back again


@pytest.mark.parametrize("case", CASES)
def test_written_back_it_runs_in_their_package_and_returns_to_the_bit(tmp_path, case):
    name, config, kind = CASES[case]
    plain, theirs = produce(tmp_path / "theirs", name, config, kind)
    ours = load(tmp_path / "theirs", plain, kind)
    notes = formats.write(ours, tmp_path / "back", "authors")
    assert any("shadow_loss_weight=0.3" in note for note in notes)
    original, back = load_file(tmp_path / "theirs" / authors.WEIGHTS), load_file(tmp_path / "back" / authors.WEIGHTS)
    assert set(back) == set(original)
    differing = {key for key in original if not torch.equal(original[key], back[key])}
    dead = {f"shadow_update_model.update_{n}.2.{i}.weight" for n, i in (("gates", 0), ("gates", 2))}
    dead |= {f"shadow_update_model.update_transforms.2.{i}.weight" for i in (0, 3)}
    assert differing == dead | ({"shadow_model.wte.weight"} if case == "gpt2" else set())
    again = load(tmp_path / "back", plain, kind)
    mine = dict(ours.named_parameters())
    assert all(torch.equal(value, mine[key]) for key, value in again.named_parameters())
    reloaded = shadow_peft.ShadowForCausalLM.from_pretrained(
        copy.deepcopy(plain), tmp_path / "back", shadow_model=explicit(kind)
    )
    _share(reloaded.peft_model, kind)
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits)


@pytest.mark.parametrize(
    ("task", "name", "fields"),
    [
        ("CAUSAL_LM", "llama", {}),
        ("CAUSAL_LM", "gpt2", {"shadow_num_hidden_layers": 2}),
        ("CAUSAL_LM", "llama", {"shadow_init": "base_layers", "update_hidden_size": 2}),
        ("CAUSAL_LM", "llama", {"modules_to_save": ["lm_head"]}),
        ("SEQ_CLS", "qwen3", {"shadow_intermediate_size": 24}),
    ],
)
def test_an_adapter_made_here_runs_in_their_package(tmp_path, task, name, fields):
    plain = base(name, task=task)
    ours = adapt(plain, task_type=task, **fields)
    ours.eval()
    formats.write(ours, tmp_path, "authors")
    made = shadow_peft.ShadowForCausalLM if task == "CAUSAL_LM" else shadow_peft.ShadowForSequenceClassification
    theirs = made.from_pretrained(copy.deepcopy(plain), tmp_path)
    ids = tokens()
    with torch.no_grad():
        found, expected = theirs(input_ids=ids), ours(input_ids=ids, return_shadow=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.shadow_logits, expected.shadow_logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("llama", {"variant": "peft"}, "variant='peft'"),
        ("llama", {"use_update": False}, "use_update=False"),
        ("llama", {"update_hidden_size": 1}, "update_hidden_size=1"),
        ("llama", {"refined_layers": [1, 2]}, r"refined_layers=\[1, 2\]"),
        ("gemma3", {}, "layer_types"),
        ("llama", {"modules_to_save": ["norm"]}, "no further modules"),
    ],
)
def test_what_their_format_cannot_express_is_refused_by_name(tmp_path, name, fields, named):
    with pytest.raises(ConfigError, match=named):
        formats.write(adapt(base(name), **fields), tmp_path, "authors")


# --------------------------------------------------------------------------------------------------------- loading, bad


def test_loaded_adapters_are_ordinary_ones(tmp_path):
    plain, theirs = produce(tmp_path / "theirs")
    plain.save_pretrained(tmp_path / "base")
    ours = shadowpeft.load(tmp_path / "theirs", tmp_path / "base", adapter_name="other")
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours" / "other")
    with torch.no_grad():
        expected = theirs(input_ids=tokens()).logits
        torch.testing.assert_close(again(input_ids=tokens()).logits, expected, atol=TOLERANCE, rtol=0)
        with ours.disable_adapter():
            assert torch.equal(ours(input_ids=tokens()).logits, plain(tokens()).logits)
    assert json.loads((tmp_path / "ours" / "other" / "adapter_config.json").read_text())["base_model_name_or_path"]
    trainable = shadowpeft.load(tmp_path / "theirs", plain, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, _ in trainable.named_parameters() if "shadowpeft_" in n
    }


def test_a_half_precision_file_is_read_exactly(tmp_path):
    plain, _ = produce(tmp_path)
    half = {k: v.bfloat16() for k, v in load_file(tmp_path / authors.WEIGHTS).items()}
    save_file(half, tmp_path / authors.WEIGHTS)
    ours = shadowpeft.load(tmp_path, plain)
    value = ours.base_model.model.model.layers[1].shadow_link.shadowpeft_injection["default"].w_down
    assert value.dtype == torch.float32
    assert torch.equal(value, half["shadow_injection_model.injection_downs"][0].T.float())


def _edit(folder, **changes):
    path = folder / authors.CONFIG
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
        if value is Ellipsis:
            del content[key]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alhpa": 0.1}, "unknown key 'alhpa'.*did you mean 'alpha'"),
        ({"alpha": ...}, r"lacks the keys \['alpha'\]"),
        ({"dropout": 2.0}, "shadow_dropout is 2.0"),
        ({"alpha": "0.1"}, "alpha is '0.1' but must be a valid number"),
        ({"injection_hidden_size": 6}, "has shape"),
        ({"num_shadow_layers": 2}, "missing"),
        ({"num_shadow_layers": 0}, "num_shadow_layers is 0 but must be greater than or equal to 1"),
        ({"shadow_head_dim": "8"}, "shadow_head_dim is '8'"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "trained heads are missing"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head' but must be a valid list"),
    ],
)
def test_bad_configurations_are_refused_by_name(tmp_path, changes, said):
    plain, _ = produce(tmp_path, trained=False)
    _edit(tmp_path, **changes)
    before = set(dict(plain.named_modules()))
    with pytest.raises((ConfigError, AdapterFileError), match=said):
        shadowpeft.load(tmp_path, plain)
    assert set(dict(plain.named_modules())) == before


def test_bad_weights_are_refused_by_name(tmp_path):
    plain, _ = produce(tmp_path, trained=False)
    path = tmp_path / authors.WEIGHTS
    good = load_file(path)

    def refused(tensors, said):
        save_file(tensors, path)
        with pytest.raises(AdapterFileError, match=said):
            shadowpeft.load(tmp_path, copy.deepcopy(plain))

    refused({k: v for k, v in good.items() if "norm.bias" not in k}, "missing.*hidden_norm.bias")
    refused({**good, "shadow_model.extra": torch.zeros(2)}, "unknown.*shadow_model.extra")
    refused({**good, "shadow_model.norm.weight": torch.full((32,), float("nan"))}, "shadow_model.norm.weight.*NaN")
    refused({**good, "shadow_model.norm.weight": torch.zeros(32, dtype=torch.int64)}, "must be floating point")
    save_file(good, path)
    with pytest.raises(AdapterFileError, match=r"missing.*update_gates\.3"):
        shadowpeft.load(tmp_path, base("llama", num_hidden_layers=6))
    with pytest.raises(ConfigError, match="does not name its base"):
        shadowpeft.load(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AdapterFileError, match="truncated"):
        shadowpeft.load(tmp_path, plain)
    path.rename(tmp_path / "shadow_adapter.pt")  # their older files are pickles, which are never read
    with pytest.raises(AdapterFileError, match=r"has no shadow_adapter.safetensors"):
        shadowpeft.load(tmp_path, plain)


def test_an_explicit_shadow_must_be_given(tmp_path):
    plain, _ = produce(tmp_path, kind="small", trained=False)
    with pytest.raises(ConfigError, match="pass shadow_model="):
        shadowpeft.load(tmp_path, plain)
    with pytest.raises(AdapterFileError, match="do not belong together"):
        shadowpeft.load(tmp_path, plain, shadow_model=small_llama(num_hidden_layers=1))


def test_two_formats_in_one_folder_are_refused(tmp_path):
    plain, _ = produce(tmp_path, trained=False)
    adapt(plain).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="both"):
        shadowpeft.load(tmp_path, plain)
