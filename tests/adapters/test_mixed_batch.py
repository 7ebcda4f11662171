"""A mixed batch gives each row what its own adapter gives alone."""

import pytest
import torch
import torch.nn.functional as F

from naive import NaiveShadow
from several import ADAPTERS, BASE, HEADED, NAMES, classifiers, each_alone, rows_of, several
from shadowpeft.errors import ConfigError, UnsupportedModelError
from tiny import ARCHITECTURES, adapt, adapter_config, base, padded, randomise, tokens

# float32: an adapter's own rows go through the shadow in a smaller batch, and matrix products of another number of rows
# may add up in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def llama():
    plain = base("llama")
    return plain, several(plain)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral", "qwen3_next"])
@torch.no_grad()
def test_each_row_is_its_own_adapters(name):
    plain = base(name)
    model = several(plain)
    ids, mask = padded(tokens(len(NAMES), 9), [0, 2, 0, 3, 1, 0, 0, 4], "left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    alone = each_alone(model, plain, NAMES, **inputs)
    for first in ADAPTERS:  # whichever is active
        model.set_adapter(first)
        found = model(**inputs, adapter_names=NAMES).logits
        expected = rows_of(alone, NAMES)
        read = mask.bool()
        # linear attention runs a recurrence over the tokens, which makes such differences grow
        close = {"rtol": 1e-3, "atol": 2e-4} if name == "qwen3_next" else CLOSE
        torch.testing.assert_close(found[read], expected[read], **close)
        rows = [i for i, n in enumerate(NAMES) if n == BASE]
        if name != "mixtral" and name != "qwen3_next":  # experts get tokens of all rows, in batches of another size
            assert torch.equal(found[rows], expected[rows])
    assert len({found[i, -1].sum().item() for i in range(len(NAMES))}) == len(NAMES)


@torch.no_grad()
def test_rows_are_bit_identical_where_no_row_shares_a_product(llama):
    plain, model = llama
    ids = tokens(1, 9).repeat(len(NAMES), 1)  # the same text for every adapter: only the adapters differ
    alone = each_alone(model, plain, NAMES, input_ids=ids)
    found = model(input_ids=ids, adapter_names=NAMES).logits
    rows = [i for i, n in enumerate(NAMES) if n == BASE]
    assert torch.equal(found[rows], rows_of(alone, NAMES)[rows])
    torch.testing.assert_close(found, rows_of(alone, NAMES), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_the_naive_loop(name):
    plain = base(name)
    model = several(plain)
    ids = tokens(len(NAMES), 8)
    expected = []
    for i, adapter in enumerate(NAMES):
        if adapter == BASE:
            expected.append(plain(input_ids=ids[i : i + 1]).logits[0])
            continue
        model.set_adapter(adapter)  # the naive loop takes what is trainable
        expected.append(NaiveShadow(plain, model, adapter).states(ids[i : i + 1])[0].logits[0])
    found = model(input_ids=ids, adapter_names=NAMES).logits
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_one_name_for_all_rows_is_that_adapter_alone_to_the_bit(llama):
    plain, model = llama
    ids = tokens(3)
    alone = each_alone(model, plain, [*ADAPTERS, BASE], input_ids=ids)
    model.set_adapter("default")
    for name in (*ADAPTERS, BASE):
        assert torch.equal(model(input_ids=ids, adapter_names=[name] * 3).logits, alone[name].logits), name


@torch.no_grad()
def test_through_the_transformers_models_own_forward(llama):
    _, model = llama
    ids = tokens(len(NAMES))
    inner = model.get_base_model()
    assert torch.equal(inner(ids, adapter_names=NAMES).logits, model(input_ids=ids, adapter_names=NAMES).logits)


@torch.no_grad()
def test_a_shadow_runs_on_its_own_rows_only(llama):
    _, model = llama
    hub = model.get_submodule("base_model.model.model.shadow_hub")
    seen = {}
    handles = [
        hub.shadowpeft_backbone[name].register_forward_hook(
            lambda m, a, out, name=name: seen.setdefault(name, []).append(len(out.last_hidden_state))
        )
        for name in ADAPTERS
    ]
    try:
        model(input_ids=tokens(len(NAMES)), adapter_names=NAMES)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {"deep": [1], "default": [2], "explicit": [1], "late": [1], "early": [1]}


@torch.no_grad()
def test_shadow_state_and_logits_by_row():
    plain = base("llama")
    model = several(plain, HEADED)
    names = [name for name in NAMES if name != BASE]
    ids = tokens(len(names))
    alone = each_alone(model, plain, names, input_ids=ids, return_shadow=True)
    found = model(input_ids=ids, adapter_names=names, return_shadow=True)
    for field in ("shadow_state", "shadow_logits"):
        torch.testing.assert_close(getattr(found, field), rows_of(alone, names, field), **CLOSE)
    with pytest.raises(ConfigError, match=r"return_shadow.*row 1 is '__base__'"):
        model(input_ids=tokens(len(NAMES)), adapter_names=NAMES, return_shadow=True)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_losses(llama, side):
    """The task's loss counts every row; the shadows' every row that has one, over the number of their targets."""
    plain, model = llama
    ids, mask = padded(tokens(len(NAMES), 9), [0, 2, 0, 3, 1, 0, 0, 4], side)
    labels = ids.masked_fill(mask == 0, -100)
    found = model(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=NAMES)
    targets = labels[:, 1:]
    logits = found.logits[:, :-1]
    assert torch.allclose(found.task_loss, F.cross_entropy(logits.reshape(-1, 61), targets.reshape(-1)), rtol=1e-5)
    assert torch.equal(found.loss, found.task_loss)
    total, count = 0.0, 0
    for i, name in enumerate(NAMES):
        if name != BASE:
            model.set_adapter(name)
            row = slice(i, i + 1)
            one = model(input_ids=ids[row], attention_mask=mask[row], labels=labels[row])
            n = int((targets[row] != -100).sum())
            total, count = total + float(one.shadow_loss) * n, count + n
    assert float(found.shadow_loss) == pytest.approx(total / count, rel=1e-4)
    everyone = model(input_ids=ids, labels=labels, adapter_names=[BASE] * len(NAMES))
    assert everyone.shadow_loss is None
    assert torch.equal(everyone.task_loss, plain(input_ids=ids, labels=labels).loss)


def test_gradients_of_an_evaluation_reach_each_adapter_through_its_own_rows(llama):
    plain = base("llama")
    model = several(plain)
    ids = tokens(3)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    names = ["default", BASE, "late"]
    out = model(inputs_embeds=embeds, adapter_names=names)
    out.logits[0].sum().backward()
    assert embeds.grad[0].abs().sum() > 0
    assert not embeds.grad[1:].any()


# -------------------------------------------------------------------------------------------------------- classifiers


@torch.no_grad()
def test_classifiers_with_their_own_heads():
    plain, model = classifiers()
    ids, mask = padded(tokens(len(NAMES), 9), [0, 2, 0, 3, 1, 0, 0, 4])
    labels = torch.arange(len(NAMES)) % 3
    inputs = {"input_ids": ids, "attention_mask": mask}
    alone = each_alone(model, plain, NAMES, **inputs)
    for active in ("default", "late"):
        model.set_adapter(active)
        found = model(**inputs, labels=labels, adapter_names=NAMES)
        torch.testing.assert_close(found.logits, rows_of(alone, NAMES), **CLOSE)
        task = F.cross_entropy(found.logits, labels)
        assert float(found.loss) == pytest.approx(float(task), rel=1e-5)
    shadows = []
    for i, name in enumerate(NAMES):
        if name != BASE:
            model.set_adapter(name)
            row = {k: v[i : i + 1] for k, v in inputs.items()}
            shadows.append(float(model(**row, labels=labels[i : i + 1]).shadow_loss))
    assert float(found.shadow_loss) == pytest.approx(sum(shadows) / len(shadows), rel=1e-4)
    names = [name for name in NAMES if name != BASE]
    chosen = {k: v[: len(names)] for k, v in inputs.items()}
    alone = each_alone(model, plain, names, **chosen, return_shadow=True)
    found = model(**chosen, adapter_names=names, return_shadow=True)
    torch.testing.assert_close(found.shadow_logits, rows_of(alone, names, "shadow_logits"), **CLOSE)


@torch.no_grad()
def test_trained_modules_of_the_base_that_only_some_adapters_have():
    plain = base("llama")
    model = several(
        plain,
        {"default": {}, "normed": {"modules_to_save": ["model.norm"]}, "headed": {"modules_to_save": ["lm_head"]}},
    )
    names = ["default", "normed", BASE, "headed", "normed"]
    ids = tokens(len(names))
    alone = each_alone(model, plain, names, input_ids=ids, labels=ids)
    for active in ("default", "normed", "headed"):
        model.set_adapter(active)
        found = model(input_ids=ids, labels=ids, adapter_names=names)
        torch.testing.assert_close(found.logits, rows_of(alone, names), **CLOSE)
        for name in ("default", "normed", "headed", BASE):
            uniform = model(input_ids=ids, adapter_names=[name] * len(ids)).logits
            assert torch.equal(uniform, alone[name].logits), (active, name)
    # the shadow reads the head of its own adapter
    n = 9
    total = 0.0
    for i, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
            total += float(model(input_ids=ids[i : i + 1], labels=ids[i : i + 1]).shadow_loss) * n
    assert float(found.shadow_loss) == pytest.approx(total / (4 * n), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_refused(llama):
    _, model = llama
    ids = tokens(2)
    for names, said in (
        (["default", "explict"], r"'explict', which is not loaded \(did you mean 'explicit'\?\)"),
        (["default"], r"1 entries but the batch has 2 rows"),
        (["default"] * 3, r"3 entries but the batch has 2 rows"),
        ("default", "must be a list"),
        ([0, 1], "must be a list"),
    ):
        for call in (model, model.get_base_model()):
            with pytest.raises(ConfigError, match=said):
                call(input_ids=ids, adapter_names=names)
        with pytest.raises(ConfigError, match=said):
            model.generate(input_ids=ids, adapter_names=names, max_new_tokens=2)
    model.train()
    try:
        for call in (model, model.get_base_model()):
            with pytest.raises(ConfigError, match="training mode"):
                call(input_ids=ids, adapter_names=["default", "late"])
    finally:
        model.eval()


@torch.no_grad()
def test_disabled_adapters_leave_the_base(llama):
    plain, model = llama
    ids = tokens(2)
    with model.disable_adapter():  # as with LoRA, PEFT does not hand the names on
        assert torch.equal(model(input_ids=ids, adapter_names=["default", "late"]).logits, plain(input_ids=ids).logits)
        with pytest.raises(ConfigError, match="disabled"):
            model.get_base_model()(input_ids=ids, adapter_names=["default", "late"])


@torch.no_grad()
def test_names_do_not_outlive_their_call(llama):
    _, model = llama
    ids = tokens(2)
    model.set_adapter("default")
    expected = model(input_ids=ids).logits
    model(input_ids=ids, adapter_names=["late", BASE])
    assert torch.equal(model(input_ids=ids).logits, expected)
    with pytest.raises(ConfigError):
        model(input_ids=ids, adapter_names=["late"])
    assert torch.equal(model(input_ids=ids).logits, expected)


@torch.no_grad()
def test_a_prepared_mask_is_divided_by_rows(llama):
    plain, model = llama
    ids = tokens(3, 6)
    names = ["default", BASE, "explicit"]
    mask = torch.full((6, 6), float("-inf")).triu(1)
    four = mask.expand(3, 1, 6, 6).clone()
    four[2, :, 3:, 1] = float("-inf")
    alone = each_alone(model, plain, names, input_ids=ids, attention_mask=four)
    found = model(input_ids=ids, attention_mask=four, adapter_names=names).logits
    torch.testing.assert_close(found, rows_of(alone, names), **CLOSE)
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask[None, None], adapter_names=names).logits,
        model(input_ids=ids, adapter_names=names).logits,
        **CLOSE,
    )


@torch.no_grad()
def test_positions_of_each_row(llama):
    plain, model = llama
    ids, names = tokens(3, 6), ["default", BASE, "explicit"]
    positions = torch.stack([torch.arange(6) + shift for shift in (0, 3, 40)])
    alone = each_alone(model, plain, names, input_ids=ids, position_ids=positions)
    found = model(input_ids=ids, position_ids=positions, adapter_names=names).logits
    torch.testing.assert_close(found, rows_of(alone, names), **CLOSE)


@torch.no_grad()
def test_under_autocast_and_on_a_bfloat16_base():
    names = ["default", BASE, "late"]
    ids = tokens(3)
    plain, half = base("llama"), base("llama").bfloat16()
    for model, stock, where in (
        (several(plain), plain, torch.autocast("cpu", torch.bfloat16)),
        (several(half), half, torch.no_grad()),
    ):
        with where:
            alone = each_alone(model, stock, names, input_ids=ids)
            found = model(input_ids=ids, adapter_names=names).logits
        assert found.dtype == alone["default"].logits.dtype == torch.bfloat16
        torch.testing.assert_close(found, rows_of(alone, names), rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits
        assert torch.equal(found[1], alone[BASE].logits[1])


@torch.no_grad()
def test_names_with_dots_and_other_characters():
    plain = base("llama")
    model = adapt(plain)
    odd = ["tuned-v1", "nom été", "a b", "__x__"]
    for i, name in enumerate(odd):
        model.add_adapter(name, adapter_config(r=i + 1))
        model.set_adapter(name)
        randomise(model, seed=40 + i)
    names = [*odd, BASE, "default"]
    ids = tokens(len(names))
    alone = each_alone(model, plain, names, input_ids=ids)
    torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, rows_of(alone, names), **CLOSE)
    with pytest.raises((KeyError, ValueError), match=r"\."):  # torch allows no dot in the name of a module
        model.add_adapter("v1.0", adapter_config())
    model.set_adapter("default")
    torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, rows_of(alone, names), **CLOSE)


def test_a_trained_module_called_with_flattened_tokens_is_refused():
    plain = base("mixtral")
    router = next(n for n, _ in plain.named_modules() if n.endswith("layers.1.mlp.gate"))
    model = several(plain, {"default": {}, "routed": {"modules_to_save": [router]}})
    with pytest.raises(UnsupportedModelError, match="one batch per adapter"):
        model(input_ids=tokens(3, 5), adapter_names=["default", "routed", BASE])


def test_streams_of_residuals():
    """A decoder that carries several residual streams: their axis is kept, the rows are divided."""
    from shadowpeft.hf.forward.inputs import streams_axis

    for streams_first, shape, axis in ((True, (4, 3, 5, 8), 0), (False, (3, 5, 4, 8), 2)):
        assert streams_axis(torch.zeros(shape), (3, 5, 8), streams_first) == axis
