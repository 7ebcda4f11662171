"""A loss from hidden states does not train without the shadow's; the base alone does not go on from a shadow's cache."""

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import save_base
from shadowpeft.errors import CacheMismatchError, ConfigError, UnsupervisedShadowError, UnsupportedModelError

IDS = torch.tensor([[5, 9, 11, 7, 6, 12], [8, 5, 10, 9, 13, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), num_hidden_layers=4)


@pytest.fixture
def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def shadow(base, **fields):
    fields = {"task_type": "CAUSAL_LM", "r": 4, "auxiliary_loss_weight": 0.5, "shadow_dropout": 0.0, **fields}
    model = get_peft_model(base, shadowpeft.ShadowPeftConfig(**fields))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "w_up" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.train()


def from_states(model, **given):
    return model(input_ids=IDS, output_hidden_states=True, **given).hidden_states


def body(model):
    return model.get_base_model().model(input_ids=IDS, output_hidden_states=True)


@pytest.mark.parametrize(
    "state",
    [
        lambda m: body(m).last_hidden_state,
        lambda m: body(m).hidden_states[2],
        lambda m: m.get_base_model().model(input_ids=IDS, return_dict=False)[0],
        lambda m: from_states(m)[-1],
        lambda m: from_states(m)[2],
        lambda m: from_states(m, labels=IDS)[-1],
    ],
)
def test_a_loss_from_hidden_states_alone_is_refused(base, state):
    model = shadow(base)
    with pytest.raises(UnsupervisedShadowError):
        state(model).square().mean().backward()


def test_it_trains_where_it_may(base):
    """With lambda 0, with the joint loss beside, with both losses of one's own, or frozen; and without gradients."""
    model = shadow(base, auxiliary_loss_weight=0.0)
    body(model).last_hidden_state.square().mean().backward()
    model = shadow(base.__class__(base.config))
    expected = model(input_ids=IDS, labels=IDS)
    out = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    assert torch.equal(out.loss, expected.loss)
    (out.loss + out.hidden_states[2].square().mean()).backward()
    from_states(model, return_shadow=True)[-1].square().mean().backward()
    model.eval()
    body(model).last_hidden_state.square().mean().backward()
    model.train()
    model.get_base_model().model.shadow_hub.freeze_shadow("default")
    out = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    out.hidden_states[2].square().mean().backward()
    with torch.no_grad():
        plain = model.eval()(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(body(model).last_hidden_state, plain)


def test_the_base_alone_does_not_go_on_from_a_shadows_cache(base):
    model = shadow(base).eval()
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
        with model.disable_adapter():
            with pytest.raises(CacheMismatchError, match="adapter 'default' but now the base answers alone"):
                model(input_ids=IDS[:, 4:], past_key_values=cache)
            cache.reset()
            whole = model(input_ids=IDS).logits
            torch.testing.assert_close(model(input_ids=IDS, past_key_values=cache).logits, whole)


def test_the_transforms_of_torch_func_differentiate(base):
    model = shadow(base)
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(weights, ids):
        return torch.func.functional_call(model, weights, (), {"input_ids": ids, "labels": ids}).loss

    found = torch.func.grad(loss)(own, IDS)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_regional_compilation(base):
    model = shadow(base).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(compile_regions(model, backend="eager")(input_ids=IDS).logits, expected)


def test_injection_with_a_state_dict(base, folder):
    state = get_peft_model_state_dict(shadow(base))
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    config = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=4)
    injected = inject_adapter_in_model(config, AutoModelForCausalLM.from_pretrained(folder), state_dict=state)
    names = {name for name, _ in injected.named_parameters() if "shadow" in name}
    other = inject_adapter_in_model(config, AutoModelForCausalLM.from_pretrained(folder))
    assert names == {name for name, _ in other.named_parameters() if "shadow" in name}
    assert any("injection" in name for name in names)


def test_another_kind_of_adapter_beside_a_shadow_is_named(base):
    base.add_adapter(shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=4), "sh")
    base.add_adapter(LoraConfig(target_modules=["q_proj"]), "lo")
    with pytest.raises(ConfigError, match="adapter 'lo' is active and no shadow; the shadows here are 'sh'"):
        base(input_ids=IDS)


def test_the_remedy_names_labels_for_the_mixin():
    logits = torch.zeros(2, requires_grad=True)
    from shadowpeft.hf.forward.supervision import refuse_gradients

    with pytest.raises(UnsupervisedShadowError, match=r"learns from labels.*of your trainer's own, set auxiliary"):
        F.relu(refuse_gradients(logits)).sum().backward()


def test_a_compiled_base_is_named(base):
    with pytest.raises(UnsupportedModelError, match="attach first and compile then"):
        shadow(torch.compile(base, backend="eager"))
    base.compile(backend="eager")
    assert shadow(base)(input_ids=IDS).logits.shape[:2] == IDS.shape


def test_a_shadow_without_a_model_of_its_own_is_named(tmp_path):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    model = shadow(Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)))
    with pytest.raises(UnsupportedModelError, match="no CausalLM model of Qwen2VLTextConfig"):
        shadowpeft.detach(model)
