"""The vLLM plugin without vLLM: the arithmetic of ``shadowpeft.ops``, a place for every tensor, refusals by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from shadowpeft_vllm import RELEASES, release_problem, step
from shadowpeft_vllm import adapter as plugin
from shadowpeft_vllm.adapter import AdapterError, read_adapter, rename
from vllm_cases import CASES, SHAPE, make_case

from shadowpeft.ops import reference
from shadowpeft.settings import VARIANTS

T, D, R, M = 7, 16, 4, 6
FACTS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
ALPHA = 0.7
WIDTHS = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8}


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_is_that_of_the_reference(name):
    variant = VARIANTS[name]
    h, s, w_down, w_up, w_in, w_out = (
        drawn(T, D),
        drawn(T, D),
        drawn(R, D),
        drawn(D, R),
        drawn(2 * M, D),
        drawn(2, D, M),
    )
    biases = {"b_in": drawn(2 * M), "b_out": drawn(2, D)} if variant.update_bias else {}
    norm = {"norm_weight": drawn(D), "norm_bias": drawn(D)} if variant.update_norm else {}
    rest = {"gate_start": variant.gate_start, "activation": variant.update_activation}
    theirs = reference.advance(s, h, w_in, w_out, **biases, **norm, **rest)
    corrected = reference.inject(h, reference.correction(h, theirs, w_down, w_up, normalised=variant.normalised), ALPHA)
    parts = dict(zip(("b_t", "b_g"), biases["b_out"], strict=True)) | {"b_in": biases["b_in"]} if biases else {}
    given = ((D,), *norm.values(), 1e-5) if norm else None
    # float64 sums in another order, and alpha inside the matrix: rounding is 1e-15 of the largest value
    ours = step.advance(s, h, w_in.mT, *w_out.mT, **parts, norm=given, **rest)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    mine = step.inject(h, ours, w_down.mT, ALPHA * w_up.mT, normalised=variant.normalised)
    torch.testing.assert_close(mine, corrected, rtol=1e-12, atol=1e-12)
    assert (ours is s, mine is h) == (True, True)  # in place


def test_the_variants_are_those_of_the_package():
    assert set(plugin.VARIANTS) == set(VARIANTS)
    for name, mine in plugin.VARIANTS.items():
        assert all(value == getattr(VARIANTS[name], field) for field, value in vars(mine).items())


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    made = {}

    def get(name):
        if name not in made:
            model, _, adapter = make_case(name, folder)
            made[name] = ({key: getattr(model.get_base_model().config, key) for key in FACTS}, adapter)
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_an_adapter_has_its_place(name, cases):
    facts, folder = cases(name)
    adapter = read_adapter(folder, facts)
    stored, mine = load_file(folder / "adapter_model.safetensors"), dict(adapter.tensors())
    parts = sum(name.endswith(("w_out", "b_out")) for name in stored)  # an update's two matrices are two tensors in vLLM
    assert len(mine) == len([n for n in stored if "shadowpeft_head" not in n]) + parts
    for layer in adapter.layers:
        links = {n.rpartition(".")[2]: tuple(v.shape) for n, v in mine.items() if n.startswith(f"links.{layer}.")}
        assert links == adapter.link_shapes(layer)
    last = max(adapter.layers)
    link = f"base_model.model.model.layers.{last}.shadow_link.shadowpeft_injection"
    assert torch.equal(mine[f"links.{last}.w_down"], stored[f"{link}.w_down"].T)
    assert torch.equal(mine[f"links.{last}.w_up"], stored[f"{link}.w_up"].T * 0.7)  # alpha as recorded
    if adapter.has_update(last):
        update = stored[f"base_model.model.model.layers.{last}.shadow_link.shadowpeft_update.w_out"]
        assert all(torch.equal(mine[f"links.{last}.w_{n}"], update[i].T) for i, n in enumerate("tg"))
    assert torch.equal(mine["norm.weight"], stored["base_model.model.model.shadow_hub.shadowpeft_backbone.norm.weight"])
    assert (("projection.weight" in mine), ("embed_tokens.weight" in mine)) == (
        adapter.d_s != adapter.d,
        adapter.own_embedding,
    )


def test_the_base_is_recognised_by_its_weights(cases):
    facts, folder = cases("llama")
    adapter = read_adapter(folder, facts)
    table = load_file(folder.parent / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    assert adapter.check_value("model.embed_tokens.weight", table)
    assert not adapter.check_value("model.layers.1.input_layernorm.weight", table)
    assert adapter.check_value("model.layers.3.input_layernorm.weight", torch.ones(SHAPE["hidden_size"]))
    with pytest.raises(AdapterError, match=r"base with other weights \(relative difference"):
        adapter.check_value("model.embed_tokens.weight", table.flip(0))


def changed(folder, to, **values):
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    for key, value in values.items():
        if value is KeyError:
            del config[key]
        else:
            config[key] = value
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "other"}, "variant is other but must be one of paper, authors, peft, scaled"),
        ({"r": KeyError}, "lacks r;"),
        ({"shadow_betta": 1}, "setting shadow_betta, which this shadowpeft-vllm does not know"),
        ({"format_version": 2}, "format version 2, this shadowpeft-vllm reads 1"),
        ({"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS"),
        ({"modules_to_save": ["lm_head"]}, "replaces modules of the base"),
        ({"shadow_reads_tokens": True}, "shadow_reads_tokens"),
        ({"peft_type": "LORA"}, "is a LORA adapter"),
        ({"shadow_backbone_config": {**WIDTHS, "model_type": "gpt2"}}, "shadow is a gpt2 model but must be one of llama"),
        ({"refined_layers": [1, 9]}, "base has layers 0 to 3"),
        ({"r": 5}, r"has shape \(4, 64\) but its configuration asks for \(5, 64\)"),
        ({"use_update": False}, "configuration asks for none"),
        ({"weights_sha256": "0" * 64}, "does not hold the weights"),
        ({"weights_sha256": 3}, "weights_sha256 is 3 but must be a text or null"),
        ({"shadow_alpha": "x"}, "shadow_alpha is 'x' but must be a number; copy the whole folder again"),
        ({"shadow_alpha": 10**400}, "shadow_alpha is 1000.* but must be a number"),
        ({"shadow_alpha": None}, "shadow_alpha is None but must be a number"),
        ({"refined_layers": "all"}, "refined_layers is 'all' but must be null, or a list of two layers"),
        ({"refined_layers": [1]}, r"refined_layers is \[1\] but must be null, or a list of two layers"),
        ({"variant": ["paper"]}, r"variant is \['paper'\] but must be a text"),
        ({"format_version": "1"}, "format_version is '1' but must be a whole number"),
        ({"use_update": "no"}, "use_update is 'no' but must be true or false"),
        ({"r": True}, "r is True but must be a whole number"),
        ({"shadow_backbone_config": []}, r"shadow_backbone_config is \[\] but must be an object"),
        ({"shadow_backbone_config": None}, "lacks shadow_backbone_config"),
        ({"share_embeddings": False}, "embed_tokens.weight has shape none"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values, message, cases, tmp_path):
    facts, folder = cases("llama")
    with pytest.raises(AdapterError, match=message):
        read_adapter(changed(folder, tmp_path / "changed", **values), facts)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("shadow_backbone_config", "hidden_size", KeyError, r"shadow_backbone_config\.hidden_size is None but must be a whole"),
        ("shadow_backbone_config", "num_hidden_layers", "1", r"shadow_backbone_config\.num_hidden_layers is '1' but"),
        ("shadow_backbone_config", "layer_types", [["full"]], r"layer_types is \[\['full'\]\] but must be a list of texts"),
        ("base_fingerprint", "values", {"embedding": "0.1"}, "base_fingerprint is damaged"),
        ("base_fingerprint", "values", {"embedding": [10**400]}, "base_fingerprint is damaged"),
        ("base_fingerprint", "shapes", {}, "base_fingerprint is damaged"),
    ],
)
def test_a_damaged_part_of_the_configuration_is_refused_by_name(section, key, value, message, cases, tmp_path):
    facts, folder = cases("llama")
    part = json.loads((folder / "adapter_config.json").read_text())[section]
    part = {name: old for name, old in part.items() if name != key} | ({} if value is KeyError else {key: value})
    with pytest.raises(AdapterError, match=message):
        read_adapter(changed(folder, tmp_path / "changed", **{section: part}), facts)


@pytest.mark.parametrize("key", FACTS)
def test_another_base_is_refused(key, cases):
    facts, folder = cases("llama")
    with pytest.raises(AdapterError, match=r"serve (its own base|the adapter's own base)"):
        read_adapter(folder, {**facts, key: "qwen3" if key == "model_type" else facts[key] + 1})


def test_damaged_and_missing_files_are_refused(cases, tmp_path):
    facts, folder = cases("llama")
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path, facts)
    cut = changed(folder, tmp_path / "cut")
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[:-8])
    with pytest.raises(AdapterError, match="is damaged"):
        read_adapter(cut, facts)
    more = changed(folder, tmp_path / "more", weights_sha256=None)
    tensors = load_file(more / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.model.layers.0.mlp.x": torch.ones(1)}, more / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="has no place for"):
        read_adapter(more, facts)


def test_only_an_adapter_of_the_same_shape_and_base_replaces_another(cases):
    facts, folder = cases("llama")
    first = read_adapter(folder, facts)
    first.check_replaces(read_adapter(folder, facts))
    with pytest.raises(AdapterError, match="differs from the running one"):
        read_adapter(cases("llama-scaled")[1], facts).check_replaces(first)


def test_only_known_releases_are_registered():
    assert release_problem(f"{RELEASES[0]}.3") is None
    assert "this is 0.11.2" in release_problem("0.11.2")
    assert rename("base_model.model.model.shadow_hub.shadowpeft_head.weight") is None
