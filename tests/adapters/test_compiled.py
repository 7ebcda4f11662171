"""Names of rows and compiled code: never a wrong row; what cannot be one graph runs as it is or raises."""

import pytest
import torch

import shadowpeft
from several import BASE, several
from tiny import adapt, base, randomise, tokens

NAMES = ["default", BASE, "late"]


@pytest.fixture
def model():
    torch._dynamo.reset()
    yield several(base("llama"), {"default": {}, "late": {"refined_layers": [2, 3]}})
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["whole", "inside"])
@torch.no_grad()
def test_a_compiled_model_gives_each_row_its_adapter(model, what):
    ids = tokens()
    mixed, single = model(input_ids=ids, adapter_names=NAMES).logits, model(input_ids=ids).logits
    if what == "whole":
        compiled = torch.compile(model, backend="eager")
    else:
        model.get_base_model().compile(backend="eager")
        compiled = model
    for _ in range(2):
        torch.testing.assert_close(compiled(input_ids=ids).logits, single)
        torch.testing.assert_close(compiled(input_ids=ids, adapter_names=NAMES).logits, mixed)


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_is_refused(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(input_ids=tokens())
    with pytest.raises(Exception, match=r"(?i)exception|compiled"):  # dynamo's own error, which holds ours
        compiled(input_ids=tokens(), adapter_names=NAMES)


@pytest.mark.slow
@torch.no_grad()
def test_a_swap_needs_no_new_graph(model, tmp_path):
    model = adapt(base("llama"))
    model.save_pretrained(tmp_path / "old")
    other = adapt(base("llama"))
    randomise(other, seed=9)
    other.save_pretrained(tmp_path / "new")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    ids = tokens()
    for name in ("old", "new", "old"):
        shadowpeft.swap(model, tmp_path / name)
        expected = (other if name == "new" else adapt(base("llama")))(input_ids=ids).logits
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
        assert counter.frame_count == 1


@pytest.mark.slow
def test_a_symbolic_lambda_compiles():
    """With ``dynamic=True`` the compiler knows lambda as a symbol."""
    model, ids = adapt(base(), auxiliary_loss_weight=0.3).train(), tokens()
    torch._dynamo.reset()
    out = torch.compile(model, backend="eager", dynamic=True)(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss, model(input_ids=ids, labels=ids).loss)
    out.shadow_loss.backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if "shadowpeft_backbone" in n)


@pytest.mark.slow
def test_a_swap_to_another_lambda_compiles(tmp_path):
    model, other = (adapt(base(), auxiliary_loss_weight=weight).train() for weight in (0.05, 0.5))
    other.save_pretrained(tmp_path)
    compiled, ids = torch.compile(model, backend="eager"), tokens()
    compiled(input_ids=ids, labels=ids)
    shadowpeft.swap(model, tmp_path)
    torch.testing.assert_close(compiled(input_ids=ids, labels=ids).loss, other(input_ids=ids, labels=ids).loss)
