"""8-bit and 4-bit bases (bitsandbytes, torchao): identity at the start, right gradients, files, detached models."""

import pytest
import torch
from peft import prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments

import shadowpeft
from naive import NaiveShadow, assert_same_gradients
from products import covering
from shadowpeft.errors import BaseMismatchError, ConfigError, UnsupportedModelError
from tiny import KINDS, adapt, base, randomise, skip_reentrant, tokens

# the quantisers work in blocks of 32 or 64
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.1}
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4)
QUANTISERS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "nf4_double": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao_int8": lambda: TorchAoConfig(quant_type=Int8WeightOnlyConfig()),
    "torchao_int4": lambda: TorchAoConfig(quant_type=INT4),
}
WEIGHT_ONLY = ["nf4", "nf4_double", "torchao_int8", "torchao_int4"]  # activations stay as they are


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("base")
    base("llama", **SHAPE).save_pretrained(made)
    return made


def quantised(folder, name, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QUANTISERS[name](), dtype=dtype, device_map={"": "cpu"}
    )
    assert type(model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


def dequantised(model):
    """A plain float32 model with the values that the quantised one stands for."""
    made = base("llama", **SHAPE)
    with torch.no_grad():
        for name, module in made.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(dequantize_module_weight(model.get_submodule(name)))
    return made


@pytest.mark.parametrize(
    ("name", "kind", "dtype"), covering(QUANTISERS, ["mirror", "explicit"], [torch.float32, torch.bfloat16])
)
def test_untrained_adapter_leaves_the_quantised_base_as_it_is(folder, name, kind, dtype):
    model = quantised(folder, name, dtype)
    expected = logits(model)
    adapted = adapt(model, copy_base=False, trained=False, **KINDS[kind])
    assert torch.equal(logits(adapted), expected)
    trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert torch.equal(logits(adapted.unload()), expected)


@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "after an evaluation"])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_gradients_are_those_of_the_dequantised_base(folder, name, evaluated):
    # after an evaluation: bitsandbytes packs its weights for a kernel without a backward pass (hf/weights.py)
    model = quantised(folder, name)
    reference = dequantised(model)
    adapted = adapt(model, copy_base=False, auxiliary_loss_weight=0.5)
    if evaluated:
        logits(adapted)
    naive = NaiveShadow(reference, adapted)
    naive(input_ids=tokens(), labels=tokens()).loss.backward()
    adapted.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    # packing stores the blocks' scales in bfloat16, 8 bits, and unpacking cannot bring back the rest
    rounded = evaluated and name.startswith("nf4")
    assert_same_gradients(adapted, naive, tolerance=0.05 if rounded else 2e-4)


@pytest.mark.parametrize(
    ("name", "dtype"),
    covering(
        [n for n in QUANTISERS if n != "torchao_int4"],
        [torch.float32, torch.bfloat16],
    ),
)
def test_trainer_moves_every_float32_weight(folder, tmp_path, name, dtype):
    model = prepare_model_for_kbit_training(quantised(folder, name, dtype), use_gradient_checkpointing=False)
    adapted = adapt(model, copy_base=False, auxiliary_loss_weight=0.5)
    frozen = {n: p for n, p in adapted.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    data = [{"input_ids": row, "labels": row} for row in tokens(4)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=adapted, args=arguments, train_dataset=data, eval_dataset=data).train()
    after = dict(adapted.named_parameters())
    for key, value in before.items():
        assert after[key].dtype == torch.float32
        assert float((after[key] != value).float().mean()) > 0.9, key
    assert all(p.grad is None for p in frozen.values())


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["nf4", "torchao_int8"])
def test_prepare_model_for_kbit_training(folder, name, checkpointing):
    skip_reentrant(checkpointing)
    options = {} if checkpointing is None else {"gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    model = quantised(folder, name)
    reference = dequantised(model)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing is not None, **options)
    adapted = adapt(prepared, copy_base=False, auxiliary_loss_weight=0.5).train()
    naive = NaiveShadow(reference, adapted)
    naive(input_ids=tokens(), labels=tokens()).loss.backward()
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    assert_same_gradients(adapted, naive)


@pytest.mark.parametrize("name", QUANTISERS)
def test_files_go_between_the_quantised_and_the_plain_base(folder, tmp_path, name):
    plain = adapt(base("llama", **SHAPE))
    plain.save_pretrained(tmp_path / "plain")
    on_quantised = shadowpeft.load(tmp_path / "plain", quantised(folder, name))
    found, exact = logits(on_quantised), logits(plain)
    # 4-bit rounding of every weight through four layers: near, and by far nearer than without the adapter
    without = logits(base("llama", **SHAPE))
    assert float((found - exact).norm()) < 0.5 * float((without - exact).norm())

    on_quantised.save_pretrained(tmp_path / "quantised")
    again = shadowpeft.load(tmp_path / "quantised", quantised(folder, name))
    assert torch.equal(logits(again), found)
    back = shadowpeft.load(tmp_path / "quantised", base("llama", **SHAPE))
    assert torch.equal(logits(back), exact)


@pytest.mark.parametrize("name", QUANTISERS)
def test_another_base_is_refused_behind_a_quantiser_too(tmp_path, name):
    adapt(base("llama", **SHAPE)).save_pretrained(tmp_path / "adapter")
    base("llama", seed=99, **SHAPE).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="other weights"):
        shadowpeft.load(tmp_path / "adapter", quantised(tmp_path / "other", name))


@pytest.mark.parametrize(("name", "kind"), covering(QUANTISERS, KINDS))
def test_detached_from_a_quantised_base(folder, tmp_path, name, kind):
    adapted = adapt(quantised(folder, name), copy_base=False, **KINDS[kind])
    edge = shadowpeft.detach(adapted)
    assert {type(p) for p in edge.parameters()} == {nn.Parameter}
    with torch.no_grad():
        expected = adapted(input_ids=tokens(), return_shadow=True).shadow_logits
    torch.testing.assert_close(logits(edge), expected, rtol=1e-4, atol=1e-4)  # the folded projection is rounded
    edge.save_pretrained(tmp_path / "edge")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edge")
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits(again), logits(edge))


@pytest.mark.parametrize("method", [Int8WeightOnlyConfig(), INT4])
def test_quantised_in_place_with_its_head(method):
    model = base("llama", **SHAPE)
    quantize_(model, method)
    assert type(model.lm_head.weight) is not nn.Parameter
    expected = logits(model)
    reference = dequantised(model)
    adapted = adapt(model, copy_base=False, trained=False)
    assert torch.equal(logits(adapted), expected)
    randomise(adapted)
    naive = NaiveShadow(reference, adapted)
    naive(input_ids=tokens(), labels=tokens()).loss.backward()
    adapted.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert_same_gradients(adapted, naive)
    edge = shadowpeft.detach(adapted)
    assert {type(p) for p in edge.parameters()} == {nn.Parameter}
    with torch.no_grad():
        found = adapted.eval()(input_ids=tokens(), return_shadow=True).shadow_logits
    torch.testing.assert_close(logits(edge), found, rtol=1e-4, atol=1e-4)


def test_quantised_activations_run_but_training_is_refused(folder):
    # torchao has no backward pass for them: the gradients of all lower layers would be silently wrong
    model = base("llama", **SHAPE)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    expected = logits(model)
    adapted = adapt(model, copy_base=False, trained=False)
    assert torch.equal(logits(adapted), expected)
    with pytest.raises(UnsupportedModelError, match="Int8WeightOnlyConfig"):
        adapted.train()(input_ids=tokens(), labels=tokens())


@pytest.mark.parametrize("name", QUANTISERS)
def test_quantised_generation_with_and_without_cache(folder, name):
    if name == "int8":
        pytest.skip("bitsandbytes scales activations per batch of tokens, so the base's own cached logits differ too")
    adapted = adapt(quantised(folder, name), copy_base=False)
    options = {"input_ids": tokens(2, 6), "max_new_tokens": 6, "pad_token_id": 0}
    assert torch.equal(adapted.generate(**options), adapted.generate(**options, use_cache=False))


@pytest.mark.parametrize("name", QUANTISERS)
def test_copying_layers_of_a_quantised_base_is_refused(folder, name):
    with pytest.raises(ConfigError, match="quantised"):
        adapt(quantised(folder, name), copy_base=False, shadow_init="base_layers")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchs_own_dynamic_quantisation_comes_after_attaching(tmp_path):
    def quantise(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    adapted = adapt(base("llama", **SHAPE))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match=r"q_proj .*quantize_dynamic.*attach first"):
        shadowpeft.load(tmp_path / "adapter", quantise(base("llama", **SHAPE)))
    expected = logits(adapted)
    error, of_base = (
        float((logits(quantise(model)) - logits(model)).norm() / logits(model).norm())
        for model in (adapted, base("llama", **SHAPE))
    )
    assert torch.equal(logits(adapted), expected)  # quantised is a copy
    assert error < 2 * of_base < 0.5
