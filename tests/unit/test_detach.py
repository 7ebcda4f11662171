"""Property 8: the detached model is the base's head on s0, in an ordinary class that reloads without this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ModernBertDecoderConfig

import shadowpeft
from products import covering
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.files.projected import read_projected
from shadowpeft.hf.formats.projected_writer import save_projected
from tiny import ARCHITECTURES, KINDS, adapt, adapter_config, base, padded, randomise, small_llama, tokens

CASES = {
    **KINDS,
    "own_table": {"share_embeddings": False},
    "narrow_width": {"shadow_hidden_size": 16, "share_embeddings": False},
    "two_layers": {"shadow_num_hidden_layers": 2},
    "copied": {"shadow_init": "base_layers", "shadow_num_hidden_layers": 2},
}


def both(adapted, edge, ids=None, mask=None):
    ids = tokens() if ids is None else ids
    with torch.no_grad():
        expected = adapted(input_ids=ids, attention_mask=mask, return_shadow=True).shadow_logits
        return edge(input_ids=ids, attention_mask=mask).logits, expected


@pytest.mark.parametrize("shadow", ["mirror", "small_llama"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma3"])
def test_a_head_of_its_own_goes_with_the_shadow(name, shadow):
    if (name, shadow) == ("gemma3", "small_llama"):
        pytest.skip("a Llama cannot express Gemma's soft-cap, see the next test")
    adapted = adapt(base(name), own_shadow_head=True, shadow_model=shadow)
    edge = shadowpeft.detach(adapted)
    found, expected = both(adapted, edge)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)  # a projection is folded in
    assert not edge.config.tie_word_embeddings
    stock = adapted.get_base_model().get_output_embeddings().weight
    assert edge.get_output_embeddings().weight.shape != stock.shape or not torch.equal(
        edge.get_output_embeddings().weight, stock
    )


@pytest.mark.parametrize(("name", "case"), covering([*ARCHITECTURES, "llama_tied", "mixtral", "qwen3_next"], CASES))
def test_detached_logits_are_the_shadows(name, case):
    if case == "narrow_width" and name == "gpt2":
        case = "two_layers"
    if case == "copied" and name == "qwen3_next":  # two attention layers: the third would be a linear one
        fields = {"shadow_init": "base_layers", "shadow_num_hidden_layers": 1}
    else:
        fields = CASES[case]
    adapted = adapt(base(name), **fields)
    if name == "gemma3" and "shadow_model" in fields:
        with pytest.raises(UnsupportedModelError, match=r"soft-cap 3\.0"):
            shadowpeft.detach(adapted)
        return
    edge = shadowpeft.detach(adapted)
    assert "shadowpeft" not in type(edge).__module__
    found, expected = both(adapted, edge)
    projected = any("shadowpeft_projection" in n for n, _ in adapted.named_parameters())
    if projected:  # W_lm (W_p z) against (W_lm W_p) z: float32 sums of 32 and of 24 products
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    else:
        assert torch.equal(found, expected)
    tied = name in ("llama_tied", "gpt2")
    own_table = "shadow_model" in fields or not fields.get("share_embeddings", True)
    assert bool(edge.config.tie_word_embeddings) == (tied and not own_table and not projected)
    shares = edge.get_input_embeddings().weight is edge.get_output_embeddings().weight
    assert shares == bool(edge.config.tie_word_embeddings)


def test_tied_soft_cap_is_carried_over():
    adapted = adapt(base("gemma3", tie_word_embeddings=True))
    edge = shadowpeft.detach(adapted)
    assert edge.config.final_logit_softcapping == 3.0
    found, expected = both(adapted, edge)
    assert torch.equal(found, expected)
    assert float(found.abs().max()) <= 3.0


def test_the_model_stays_as_it_was_and_the_copy_is_its_own():
    adapted = adapt(base("llama"))
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    edge = shadowpeft.detach(adapted)
    with torch.no_grad():
        for parameter in edge.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
    assert not edge.training


def test_left_padding():
    adapted = adapt(base("qwen3"))
    ids, mask = padded(tokens(), [0, 3, 1], "left")
    found, expected = both(adapted, shadowpeft.detach(adapted), ids, mask)
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_which_adapter():
    adapted = adapt(base("llama"))
    adapted.add_adapter("second", adapter_config(shadow_intermediate_size=24))
    adapted.set_adapter("second")
    randomise(adapted, seed=8)
    found, expected = both(adapted, shadowpeft.detach(adapted))
    assert torch.equal(found, expected)
    first = shadowpeft.detach(adapted, "default")
    adapted.set_adapter("default")
    found, expected = both(adapted, first)
    assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match=r"'nobody'.*default.*second"):
        shadowpeft.detach(adapted, "nobody")
    with pytest.raises(ConfigError, match="no shadow adapter"):
        shadowpeft.detach(base("llama"))


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_trained_head_or_embedding_is_that_of_the_adapter_asked_for(name, saved):
    adapted = adapt(base(name), modules_to_save=saved)
    adapted.add_adapter("second", adapter_config(modules_to_save=saved))
    adapted.set_adapter("second")
    randomise(adapted, seed=8)
    expected = {}
    for adapter in ("default", "second"):
        adapted.set_adapter(adapter)
        with torch.no_grad():
            expected[adapter] = adapted(input_ids=tokens(), return_shadow=True).shadow_logits
    assert not torch.allclose(expected["default"], expected["second"], atol=0.1)
    for active in ("default", "second"):
        adapted.set_adapter(active)
        for adapter, logits in expected.items():
            with torch.no_grad():
                assert torch.equal(shadowpeft.detach(adapted, adapter)(tokens()).logits, logits)
                with adapted.disable_adapter():
                    assert torch.equal(shadowpeft.detach(adapted, adapter)(tokens()).logits, logits)


def test_a_head_that_is_more_than_a_matrix_is_that_of_the_adapter_asked_for():
    torch.manual_seed(1)
    config = ModernBertDecoderConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        cls_token_id=1,
        sep_token_id=1,
    )
    saved = ["lm_head.dense", "decoder"]
    adapted = adapt(AutoModelForCausalLM.from_config(config).eval(), modules_to_save=saved)
    adapted.add_adapter("second", adapter_config(modules_to_save=saved))
    with torch.no_grad():
        expected = adapted(input_ids=tokens(), return_shadow=True).shadow_logits
        adapted.set_adapter("second")
        torch.testing.assert_close(shadowpeft.detach(adapted, "default")(tokens()).logits, expected)


def test_a_projected_checkpoint_has_the_head_and_table_of_the_adapter_asked_for(tmp_path):
    small = small_llama()
    adapted = adapt(base("llama"), shadow_model=small, modules_to_save=["lm_head"])
    adapted.add_adapter("second", adapter_config(shadow_model=small, modules_to_save=["lm_head"]))
    adapted.set_adapter("second")
    save_projected(adapted, tmp_path, "default")
    head = adapted.get_base_model().lm_head.modules_to_save
    assert torch.equal(read_projected(tmp_path).head, head["default"].weight)
    assert not torch.equal(head["default"].weight, head["second"].weight)


def test_an_adapter_without_a_trained_head_has_the_bases():
    adapted = adapt(base("llama"))
    found, expected = both(adapted, shadowpeft.detach(adapted))
    adapted.add_adapter("second", adapter_config(modules_to_save=["lm_head"]))
    adapted.set_adapter("second")
    randomise(adapted, seed=8)
    with torch.no_grad():
        assert torch.equal(shadowpeft.detach(adapted, "default")(tokens()).logits, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "kind", "side"), covering(["llama", "gpt2", "qwen3"], KINDS, ["right", "left"]))
def test_detached_classifier(name, kind, side):
    adapted = adapt(base(name, task="SEQ_CLS"), task_type="SEQ_CLS", **KINDS[kind])
    edge = shadowpeft.detach(adapted)
    ids, mask = padded(tokens(), [0, 3, 1], side)
    found, expected = both(adapted, edge, ids, mask)
    assert edge.config.num_labels == 3
    assert edge.config.pad_token_id == adapted.config.pad_token_id
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # a folded projection sums in another order
    if kind != "explicit":
        assert torch.equal(found, expected)


def test_label_names_travel():
    model = base("llama", task="SEQ_CLS")
    model.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    model.config.label2id = {"no": 0, "yes": 1, "maybe": 2}
    edge = shadowpeft.detach(adapt(model, task_type="SEQ_CLS"))
    assert edge.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


def test_a_head_with_a_bias():
    model = base("llama")
    model.lm_head = torch.nn.Linear(32, 61, bias=True)
    adapted = adapt(model)
    with pytest.raises(UnsupportedModelError, match="bias"):
        shadowpeft.detach(adapted)


def test_logit_scale_is_carried_over():
    from transformers import GraniteConfig

    torch.manual_seed(1)
    config = GraniteConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=4.0,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    adapted = adapt(model)
    found, expected = both(adapted, shadowpeft.detach(adapted))
    assert torch.equal(found, expected)
    explicit = adapt(model, shadow_model="small_llama")
    with pytest.raises(UnsupportedModelError, match=r"scale 0\.25"):
        shadowpeft.detach(explicit)


def test_an_embedding_that_scales_is_folded_into_the_edge_models_table():
    # Gemma multiplies inside its embedding module, a Llama has no such place
    model = base("gemma3", final_logit_softcapping=None)
    small = base("llama", seed=2)
    adapted = adapt(model, shadow_model=small, share_embeddings=True)
    found, expected = both(adapted, shadowpeft.detach(adapted))
    assert torch.equal(found, expected)


def test_edge_generates_what_the_shadow_predicts():
    adapted = adapt(base("llama"))
    edge = shadowpeft.detach(adapted)
    ids = tokens(1, 5)
    found = edge.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for _ in range(8):
            token = adapted(input_ids=ids, return_shadow=True).shadow_logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
    assert torch.equal(found, ids)


def test_bfloat16_base_gives_a_float32_edge():
    adapted = adapt(base("llama").bfloat16())
    edge = shadowpeft.detach(adapted)
    assert {p.dtype for p in edge.parameters()} == {torch.float32}
    found, expected = both(adapted, edge)
    torch.testing.assert_close(found, expected.float(), rtol=3e-2, atol=3e-2)  # the base's head runs in bfloat16


CHILD = """
import sys, pathlib, torch
from transformers import AutoModelForCausalLM
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = torch.load(folder / "ids.pt", weights_only=True)
    torch.save(model.eval()(ids).logits, folder / "logits.pt")
assert "shadowpeft" not in sys.modules, "the edge model must not need this package"
"""


def test_reloading_in_a_process_without_this_package(tmp_path):
    names = ["llama", "llama_tied", "gemma3", "gpt2", "mistral"]
    cases = [(name, "mirror") for name in names] + [("llama", "explicit"), ("llama_tied", "explicit")]
    expected = {}
    for name, case in cases:
        edge = shadowpeft.detach(adapt(base(name), **CASES[case]))
        folder = tmp_path / f"{name}-{case}"
        edge.save_pretrained(folder)
        torch.save(tokens(), folder / "ids.pt")
        with torch.no_grad():
            expected[folder] = edge(tokens()).logits
        assert not any("shadow" in key for key in load_file(folder / "model.safetensors"))
        text = (folder / "config.json").read_text()
        assert "shadow" not in text
        assert json.loads(text)["architectures"] == [type(edge).__name__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), logits), folder
