"""How a shadow is made: parameter counts of Table 1, copied layers, the pseudo-inverse projection, mirrored shapes."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

import shadowpeft
from shadowpeft import ShadowPeftConfig
from tiny import adapt, base, small_llama, tokens


def qwen3(width, layers, heads, mlp, tie):
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tie,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


BASES = {"0.6B": (1024, 28, 16, 3072, True), "4B": (2560, 36, 32, 9728, True), "8B": (4096, 36, 32, 12288, False)}


@pytest.mark.parametrize(
    ("size", "heads", "m", "table", "dead"),
    [("0.6B", 16, 10, 9_073_920, 40_960), ("4B", 16, 8, 23_442_176, 81_920), ("8B", 8, 8, 29_118_720, 131_072)],
)
def test_table_1_counts(size, heads, m, table, dead):
    model = qwen3(*BASES[size])
    adapted = get_peft_model(
        model,
        ShadowPeftConfig(
            task_type="CAUSAL_LM",
            r=16,
            update_hidden_size=m,
            shadow_num_hidden_layers=1,
            shadow_intermediate_size=256,
            shadow_num_attention_heads=heads,
            shadow_num_key_value_heads=8,
            shadow_head_dim=128,
        ),
    )
    assert adapted.get_nb_trainable_parameters()[0] == table - dead
    assert {p.device.type for p in adapted.parameters()} == {"meta"}


def test_table_1_count_of_the_explicit_shadow():
    model, small = qwen3(*BASES["8B"]), qwen3(*BASES["0.6B"])
    adapted = get_peft_model(
        model, ShadowPeftConfig(task_type="CAUSAL_LM", r=16, update_hidden_size=10, shadow_model=small)
    )
    assert adapted.get_nb_trainable_parameters()[0] == 454_991_872 - 163_840


@pytest.mark.parametrize(("layers", "table"), [(5, 100_979_968), (16, 302_923_776), (28, 523_226_112)])
def test_scaling_counts(layers, table):
    adapted = get_peft_model(
        qwen3(*BASES["8B"]),
        ShadowPeftConfig(
            task_type="CAUSAL_LM",
            r=16,
            update_hidden_size=8,
            shadow_num_hidden_layers=layers,
            shadow_intermediate_size=128,
            shadow_num_attention_heads=8,
        ),
    )
    assert adapted.get_nb_trainable_parameters()[0] == table - 4 * 4096 * 8


# --------------------------------------------------------------------------------------------- shadow_init="base_layers"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_copied_layers_give_what_the_bases_own_first_layers_give(name, depth):
    model = base(name)
    adapted = adapt(model, trained=False, shadow_init="base_layers", shadow_num_hidden_layers=depth)
    found = adapted(input_ids=tokens(), return_shadow=True).shadow_state
    body = model.base_model
    layers = body.h if name == "gpt2" else body.layers
    del layers[depth:]
    model.config.num_hidden_layers = depth
    with torch.no_grad():
        expected = body(input_ids=tokens(), use_cache=False).last_hidden_state
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("depth", "indices"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_spread_layers_give_what_a_base_of_those_layers_gives(name, depth, indices):
    model = base(name)
    fields = {"shadow_init": "base_layers_spread", "shadow_num_hidden_layers": depth}
    adapted = adapt(model, trained=False, **fields)
    found = adapted(input_ids=tokens(), return_shadow=True).shadow_state
    body = model.base_model
    layers = body.h if name == "gpt2" else body.layers
    kept = [layers[i] for i in indices]
    del layers[:]
    for place, layer in enumerate(kept):
        layers.append(layer)
        (layer.attn if name == "gpt2" else layer.self_attn).layer_idx = place
    model.config.num_hidden_layers = depth
    if name == "gemma3":
        model.config.layer_types = [model.config.layer_types[i] for i in indices]
    with torch.no_grad():
        expected = body(input_ids=tokens(), use_cache=False).last_hidden_state
    assert torch.equal(found, expected)


def test_spread_layers_of_a_hybrid_base_are_its_first_and_last_attention_layers():
    model = base("qwen3_next", num_hidden_layers=8, layer_types=["linear_attention", "full_attention"] * 4)
    adapted = adapt(model, trained=False, shadow_init="base_layers_spread", shadow_num_hidden_layers=2)
    shadow = adapted.base_model.model.model.shadow_hub.shadowpeft_backbone["default"]
    for layer, index in zip(shadow.layers, (1, 7), strict=True):
        state = layer.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.model.layers[index].state_dict().items() if k in state)


def test_copied_layers_of_a_hybrid_base_are_its_attention_layers():
    model = base("qwen3_next")
    adapted = adapt(model, trained=False, shadow_init="base_layers")
    shadow = adapted.base_model.model.model.shadow_hub.shadowpeft_backbone["default"]
    assert shadow.config.layer_types == ["full_attention"]
    state = shadow.layers[0].state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.model.layers[1].state_dict().items())


def test_copied_layers_are_a_copy_that_trains_and_saves(tmp_path):
    model = base("llama")
    adapted = adapt(model, shadow_init="base_layers", shadow_num_hidden_layers=2)
    assert torch.equal(
        adapted.base_model.model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    )
    adapted.save_pretrained(tmp_path)
    loaded = shadowpeft.load(tmp_path, base("llama"))
    with torch.no_grad():
        first, second = (m(tokens(), return_shadow=True) for m in (adapted, loaded))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.shadow_logits, second.shadow_logits)


def test_copied_layers_of_an_adapted_base_leave_the_first_adapter_out():
    from tiny import adapter_config

    adapted = adapt(base("llama"), shadow_init="base_layers", shadow_num_hidden_layers=2)
    adapted.add_adapter("second", adapter_config(shadow_init="base_layers", shadow_num_hidden_layers=3))
    names = [n for n, _ in adapted.named_parameters() if "shadowpeft_backbone.second" in n]
    assert names
    assert not any("shadow_link" in n for n in names)


# -------------------------------------------------------------------------------------------------------------- Eq. 12


def test_pseudo_inverse_start():
    model, small = base("llama"), small_llama()
    adapted = adapt(model, trained=False, shadow_model=small, projection_init="pseudo_inverse")
    hub = adapted.base_model.model.model.shadow_hub
    found = hub.shadowpeft_projection["default"].weight
    expected = torch.linalg.pinv(model.lm_head.weight.double()) @ small.lm_head.weight.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)  # stored in float32
    random = adapt(model, trained=False, shadow_model=small).base_model.model.model.shadow_hub

    def miss(weight):
        return float((model.lm_head.weight @ weight - small.lm_head.weight).norm().detach())

    assert miss(found) < miss(random.shadowpeft_projection["default"].weight)


def test_pseudo_inverse_start_survives_saving_and_needs_no_source(tmp_path):
    adapted = adapt(base("llama"), shadow_model=small_llama(), projection_init="pseudo_inverse")
    adapted.save_pretrained(tmp_path)
    loaded = shadowpeft.load(tmp_path, base("llama"))
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, adapted(tokens()).logits)


# -------------------------------------------------------------------------------------------------------------- shapes


def test_a_mirror_is_the_bases_class_and_has_no_table_of_its_own():
    model = base("qwen3")
    shadow = adapt(model).base_model.model.model.shadow_hub.shadowpeft_backbone["default"]
    assert type(shadow) is type(model.model)
    assert len(shadow.layers) == 1
    assert not any("embed" in n for n, _ in shadow.named_parameters())


def test_a_hybrid_bases_mirror_copies_its_first_full_attention_layer():
    for name in ("gemma3", "qwen3_next"):
        shadow = adapt(base(name), shadow_num_hidden_layers=2).base_model.model.model.shadow_hub
        assert shadow.shadowpeft_backbone["default"].config.layer_types == ["full_attention"] * 2


def test_a_mixture_of_experts_mirror_keeps_count_and_width():
    shadow = adapt(base("mixtral")).base_model.model.model.shadow_hub.shadowpeft_backbone["default"]
    assert shadow.config.num_local_experts == 4
    assert shadow.config.intermediate_size == 48


def test_narrower_shapes():
    fields = dict(  # noqa: C408
        shadow_num_hidden_layers=3,
        shadow_intermediate_size=20,
        shadow_num_attention_heads=2,
        shadow_num_key_value_heads=1,
        shadow_head_dim=6,
    )
    config = adapt(base("qwen3"), **fields).base_model.model.model.shadow_hub.shadowpeft_backbone["default"].config
    for name, value in fields.items():
        assert getattr(config, name.removeprefix("shadow_")) == value


def test_the_start_is_seeded():
    states = []
    for seed in (1, 1, 2):
        model = base("llama")
        torch.manual_seed(seed)
        model = get_peft_model(model, ShadowPeftConfig(task_type="CAUSAL_LM"))
        states.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_attaching_keeps_the_mode():
    for mode in (True, False):
        adapted = get_peft_model(base("llama").train(mode), ShadowPeftConfig(task_type="CAUSAL_LM"))
        assert {m.training for m in adapted.get_base_model().modules()} == {mode}
