"""Starts for a small model: pieces of a base from its files; Eq. 12 with other padding rows."""

import pytest
import torch
from safetensors.torch import save_file

import shadowpeft
from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.base.vocabulary import align_rows, shared_tokens
from shadowpeft.hf.pretraining.base_ends import open_base, pruned_backbone
from shadowpeft.hf.shadow.source import projection_start
from tiny import V, adapt, base, small_llama, tokenizer, tokens


def test_pieces_that_cannot_be_had_are_refused(tmp_path):
    model = base()
    with pytest.raises(ConfigError, match="could not be opened"):
        open_base(str(tmp_path / "nowhere"))
    state = model.state_dict()
    for name, value, message in (
        ("model.layers.0.mlp.up_proj.weight", None, "has no tensor '{}'"),
        ("model.norm.weight", torch.full((32,), torch.nan), "'{}' .* is not floating point and finite"),
    ):
        changed = {k: v for k, v in {**state, name: value}.items() if v is not None}
        model.save_pretrained(tmp_path / name)
        save_file(changed, tmp_path / name / "model.safetensors")
        with pytest.raises(AdapterFileError, match=message.format(name)):
            pruned_backbone(open_base(str(tmp_path / name)), [0], copy=True)
    whole = (tmp_path / name / "model.safetensors").read_bytes()
    (tmp_path / name / "model.safetensors").write_bytes(whole[:-40])
    with pytest.raises(AdapterFileError):
        open_base(str(tmp_path / name))


# ---------------------------------------------------------------------------------------------------------- vocabularies


def saved(folder, model, words=None):
    """``model`` in a folder with the tokenizer of the tests, whose tokens are ``V`` unless more ``words`` are added."""
    model.save_pretrained(folder)
    made = tokenizer()
    made.add_tokens(words or [])
    made.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("rows", [(V + 7, V + 3), (V, V + 5), (V + 6, V)])
def test_tables_with_other_padding_rows_are_aligned(tmp_path, rows):
    model = saved(tmp_path / "base", base(vocab_size=rows[0]))
    small = saved(tmp_path / "small", small_llama(vocab_size=rows[1]))
    large_head, small_head = (m.lm_head.weight.detach().double()[:V] for m in (model, small))
    expected = torch.linalg.pinv(large_head) @ small_head
    found = projection_start(model, small, dtype=torch.float64)
    torch.testing.assert_close(found.weight, expected, rtol=1e-4, atol=1e-5)  # products in float32
    assert found.residual == pytest.approx(
        float((large_head @ expected - small_head).norm() / small_head.norm()), rel=1e-6
    )

    for source in (small, str(tmp_path / "small")):
        adapted = adapt(model, trained=False, shadow_model=source, projection_init="pseudo_inverse")
        hub = adapted.base_model.model.model.shadow_hub
        table = hub.shadowpeft_embedding["default"].weight
        assert table.shape == (rows[0], 24)
        assert torch.equal(table[:V], small.model.embed_tokens.weight[:V])
        assert not bool(table[rows[1] :].any())
        assert hub.shadowpeft_backbone["default"].config.vocab_size == rows[0]
        with torch.no_grad():
            out = adapted(tokens(), return_shadow=True)
            state = small.model(tokens()).last_hidden_state @ found.weight.float().T
            torch.testing.assert_close(out.shadow_state, state, rtol=1e-4, atol=1e-5)
            edge = shadowpeft.detach(adapted)
            torch.testing.assert_close(edge(tokens()).logits, out.shadow_logits, rtol=1e-4, atol=1e-4)
    assert small.config.vocab_size == rows[1]  # what was given stays as it was
    assert len(small.model.embed_tokens.weight) == rows[1]
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = shadowpeft.load(tmp_path / "adapter", model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(), return_shadow=True).shadow_logits, out.shadow_logits)


def test_a_head_that_is_not_finite_is_refused():
    model, small = base(), small_llama()
    with torch.no_grad():
        small.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(ConfigError, match="not finite"):
        projection_start(model, small)


def test_other_tokens_are_refused_by_name(tmp_path):
    model = saved(tmp_path / "base", base(vocab_size=V + 8), ["hello"])
    small = saved(tmp_path / "small", small_llama(vocab_size=V + 4), ["world"])
    with pytest.raises(ConfigError, match=rf"token 'hello' with id {V} is only in the base's"):
        projection_start(model, small)
    with pytest.raises(ConfigError, match="token 'hello'"):
        adapt(model, shadow_model=small)
    small = saved(tmp_path / "as many", small_llama(vocab_size=V + 8), ["world"])
    with pytest.raises(ConfigError, match="token 'hello'"):
        adapt(model, shadow_model=small)
    made, other = tokenizer(), tokenizer()
    made.add_tokens(["a", "b"])
    other.add_tokens(["b", "a"])
    with pytest.raises(ConfigError, match=rf"token 'a' has id {V} in the base's and {V + 1} in the shadow's"):
        shared_tokens(made, other)
    assert shared_tokens(made, made) == V + 2


def test_tables_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="the base has no tokenizer to compare"):
        adapt(base(vocab_size=V + 8), shadow_model=small_llama())
    model = saved(tmp_path / "base", base())
    with pytest.raises(ConfigError, match="the shadow has no tokenizer to compare"):
        projection_start(model, small_llama(vocab_size=V + 1))
    tight = saved(tmp_path / "tight", small_llama(vocab_size=V - 3))
    with pytest.raises(ConfigError, match=f"{V} ids but the base's table has {V} rows and the shadow's {V - 3}"):
        projection_start(model, tight)


def test_aligned_rows():
    table = torch.randn(5, 2)
    assert torch.equal(align_rows(table, 3), table[:3])
    assert torch.equal(align_rows(table, 7), torch.cat([table, torch.zeros(2, 2)]))
