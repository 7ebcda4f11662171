"""What is said of each layer's correction is what happens there, and leaving all of them out leaves the base."""

import pytest
import torch
from experiments.injection import Sizes, layers, without
from rich.console import Console

from chatbase import chat_model, chat_tokenizer
from shadowpeft.core.modules import Injection
from shadowpeft.data import chat
from shadowpeft.evaluate import answer_loss
from tiny import adapt, randomise


@pytest.fixture(scope="module")
def setting():
    tokenizer, model = chat_tokenizer(), chat_model()
    adapted = adapt(model, auxiliary_loss_weight=0.5)
    randomise(adapted)
    rows = [chat.check_row({"prompt": "x" * n, "response": "a reply" * n}, str(n)) for n in (1, 2, 4)]
    return adapted, chat.ChatDataset(chat.encode(rows, tokenizer, max_length=256)), tokenizer.pad_token_id


def test_layers_say_what_each_correction_is_worth(setting):
    model, data, pad = setting
    found = layers(model, data, pad, Console(quiet=True), batch_size=2)
    injections = [m for m in model.modules() if isinstance(m, Injection)]
    assert [each["layer"] for each in found["layers"]] == list(range(1, len(injections) + 1))
    assert found["loss"] == pytest.approx(answer_loss(model, data.sequences, pad)["loss"], rel=1e-5)
    with model.disable_adapter():
        assert found["loss_without_corrections"] == pytest.approx(
            answer_loss(model, data.sequences, pad)["loss"], rel=1e-5
        )
    assert found["loss_with_state_zero"] != pytest.approx(found["loss"], rel=1e-5)
    with torch.no_grad():
        kept = injections[0].w_up.clone()
        injections[0].w_up.zero_()
        alone = answer_loss(model, data.sequences, pad)["loss"] - found["loss"]
        injections[0].w_up.copy_(kept)
    assert found["layers"][0]["loss_without"] == pytest.approx(alone, rel=1e-3, abs=1e-6)
    assert found["layers"][0]["step"] is None  # the first refined layer follows no update
    assert found["layers"][-1]["step"] > 0
    assert found["rows"] == 3


def test_sizes_are_means_over_the_tokens_of_the_mask():
    torch.manual_seed(0)
    injection, sizes = Injection(6, 2), Sizes()
    torch.nn.init.normal_(injection.w_up)
    h, s = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    sizes.mask = torch.tensor([[True, False, True]])
    with sizes.watching([injection]):
        injection(h, s, 0.5)
    c = 0.5 * (h - s) @ injection.w_down.T @ injection.w_up.T
    for name, part in (("correction", c), ("discrepancy", h - s), ("state", s)):
        wanted = sum(float(part[0, t].detach().norm() / h[0, t].norm()) for t in (0, 2)) / 2
        assert sizes.mean(injection, name) == pytest.approx(wanted, rel=1e-5)
    assert sizes.mean(injection, "step") is None
    with without([injection]):
        assert torch.equal(injection(h, s, 0.5), h)
    assert not torch.equal(injection(h, s, 0.5), h)
