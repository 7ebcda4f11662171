"""A vocabulary that has grown: PEFT writes the base's tables into the adapter's file, and every loader reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shadowpeft
from shadowpeft.errors import AdapterFileError, BaseMismatchError, ConfigError, UnsupportedModelError
from shadowpeft.hf.base.tables import new_rows
from tiny import V, adapt, base, tokens

WEIGHTS = "adapter_model.safetensors"
TRAINED = [None, ["embed_tokens", "lm_head"]]


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bases as files: PEFT writes tables by itself where it can see that the vocabulary has grown since."""
    for name in ("llama", "llama_tied"):
        FOLDERS[name] = tmp_path_factory.mktemp(name)
        base(name).save_pretrained(FOLDERS[name])


FOLDERS: dict[str, Path] = {}


def grown(name: str = "llama", seed: int = 4) -> Any:
    """A base whose vocabulary has four tokens more, whose rows depend on ``seed``."""
    model = AutoModelForCausalLM.from_pretrained(FOLDERS[name])
    torch.manual_seed(seed)
    model.resize_token_embeddings(V + 4, mean_resizing=False)
    return model.eval()


@pytest.fixture(params=TRAINED, ids=["frozen", "trained"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    model = adapt(grown(), modules_to_save=request.param).eval()
    model.save_pretrained(tmp_path)
    assert any(name.endswith("embed_tokens.weight") for name in load_file(tmp_path / WEIGHTS))
    with torch.no_grad():
        return tmp_path, model(input_ids=_with_new_tokens()).logits


def _with_new_tokens() -> torch.Tensor:
    ids = tokens()
    ids[:, 2] = V + 3
    return ids


def test_what_was_saved_is_loaded(saved: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = saved
    for model in (PeftModel.from_pretrained(grown(), folder).eval(), shadowpeft.load(folder, grown())):
        torch.testing.assert_close(model(input_ids=_with_new_tokens()).logits, wanted)


def test_rows_of_new_tokens_come_from_the_file(tmp_path: Path) -> None:
    """Whoever resizes draws new rows, so a base that was resized again differs from the one that was trained with."""
    model = adapt(grown(seed=4)).eval()
    model.save_pretrained(tmp_path)
    other = grown(seed=5)
    assert not torch.equal(other.lm_head.weight, model.get_base_model().lm_head.weight)
    with pytest.warns(UserWarning, match="differ from those"):
        loaded = shadowpeft.load(tmp_path, other)
    torch.testing.assert_close(loaded(input_ids=_with_new_tokens()).logits, model(input_ids=_with_new_tokens()).logits)


def test_new_rows_that_are_drawn_alike_come_from_the_file_too(tmp_path: Path) -> None:
    """transformers draws new rows near the mean of the old ones by default, so two drawings are the same within a percent."""

    def with_means() -> Any:
        model = AutoModelForCausalLM.from_pretrained(FOLDERS["llama"])
        model.resize_token_embeddings(V + 4)
        return model.eval()

    model = adapt(with_means()).eval()
    model.save_pretrained(tmp_path)
    for loaded in (PeftModel.from_pretrained(with_means(), tmp_path).eval(), shadowpeft.load(tmp_path, with_means())):
        assert torch.equal(loaded.get_base_model().lm_head.weight, model.get_base_model().lm_head.weight)
        assert torch.equal(loaded(input_ids=_with_new_tokens()).logits, model(input_ids=_with_new_tokens()).logits)


@pytest.mark.parametrize("file", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_new_rows_are_found_whatever_the_types(file: torch.dtype, own: torch.dtype) -> None:
    """A head may have a bias too, which is a table of one number a token."""
    table = torch.nn.Linear(8, 100)
    stored = {f"head.{key}": value.detach().clone() for key, value in table.named_parameters()}
    for value in stored.values():
        value[96:] *= 1.01  # within the tolerance
    tables = {name: table.to(own) for name in stored}
    found = new_rows(tables, {name: value.to(file) for name, value in stored.items()})
    assert [(first, len(value)) for _, first, value in found] == [(96, 100)] * 2


def test_a_vocabulary_may_grow_by_a_third(tmp_path: Path) -> None:
    """Much of what identifies a base is then drawn anew with each resize."""

    def larger(seed: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(FOLDERS["llama"])
        torch.manual_seed(seed)
        model.resize_token_embeddings(V + 20, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[V:].mul_(20)
        return model.eval()

    model = adapt(larger(4)).eval()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="differ from those"):
        loaded = shadowpeft.load(tmp_path, larger(5))
    assert torch.equal(loaded(input_ids=_with_new_tokens()).logits, model(input_ids=_with_new_tokens()).logits)
    other = base(seed=9)
    other.resize_token_embeddings(V + 20)
    with pytest.raises(BaseMismatchError, match="other weights"):
        shadowpeft.load(tmp_path, other)


def test_tables_that_were_asked_for_load_on_the_same_base_alone(tmp_path: Path) -> None:
    model = adapt(base("llama_tied")).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.testing.assert_close(
        shadowpeft.load(tmp_path, base("llama_tied"))(input_ids=tokens()).logits, model(input_ids=tokens()).logits
    )
    with pytest.raises(BaseMismatchError, match="vocab_size"):
        shadowpeft.load(tmp_path, grown("llama_tied"))


def test_a_table_of_another_base_changes_nothing(tmp_path: Path) -> None:
    adapt(grown()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name in ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"):
        changed = {**tensors, name: tensors[name] + torch.eye(*tensors[name].shape)}
        save_file(changed, tmp_path / WEIGHTS)
        model = grown(seed=5)
        before = [model.lm_head.weight.clone(), model.model.embed_tokens.weight.clone()]
        with pytest.raises(AdapterFileError, match="row 0 of"), pytest.warns(UserWarning, match="differ from those"):
            shadowpeft.load(tmp_path, model)
        assert torch.equal(model.lm_head.weight, before[0])
        assert torch.equal(model.model.embed_tokens.weight, before[1])


def test_new_rows_are_not_changed_under_another_adapter(tmp_path: Path) -> None:
    adapt(grown(seed=4)).save_pretrained(tmp_path)
    model = adapt(grown(seed=5))
    with (
        pytest.raises(ConfigError, match=r"which other adapters .*default"),
        pytest.warns(UserWarning, match="differ from those"),
    ):
        model.load_adapter(tmp_path, "second")
    shadowpeft.load(tmp_path, grown(seed=4))  # while equal rows disturb nobody
    same = adapt(grown(seed=4))
    same.load_adapter(tmp_path, "second")
    assert sorted(same.peft_config) == ["default", "second"]
    shadowpeft.swap(same, tmp_path, adapter_name="second")


def test_pickle_becomes_safetensors_with_a_warning(tmp_path: Path) -> None:
    model = adapt(base()).eval()
    with pytest.warns(UserWarning, match="no loader of an adapter reads"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(path.name for path in tmp_path.glob("adapter*")) == ["adapter_config.json", WEIGHTS]
    torch.testing.assert_close(
        shadowpeft.load(tmp_path, base())(input_ids=tokens()).logits, model(input_ids=tokens()).logits
    )


def test_continuous_batching_of_transformers_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="generate_batch"):
        adapt(base()).generate_batch(inputs=[[1, 2]])


@pytest.mark.parametrize(
    "name", ["robot-v1.2", "keys", "type", "pop", "a/b", "", " a", "a\nb", "x" * 300, "__base__", "\udcff"]
)
def test_a_name_that_no_adapter_can_have_is_refused_first(name: Any, tmp_path: Path) -> None:
    model = adapt(base())
    with pytest.raises(ConfigError, match=r"the adapter name .* cannot be used.*use another, such as '[A-Za-z0-9_-]+'"):
        model.add_adapter(name, model.peft_config["default"])
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ConfigError, match="cannot be used"):
        shadowpeft.load(tmp_path, base(), adapter_name=name)


@pytest.mark.parametrize("name", ["robot-v1_2", "weiß", "机器狗", "with space", "default"])
def test_other_names_work(name: str, tmp_path: Path) -> None:
    model = adapt(base()).eval()
    model.save_pretrained(tmp_path)
    loaded = shadowpeft.load(tmp_path, base(), adapter_name=name)
    torch.testing.assert_close(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.filterwarnings("ignore:the base's weights differ")
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_tokens_that_were_added_after_the_adapter_are_saved_with_it(name: str, tmp_path: Path) -> None:
    model = adapt(AutoModelForCausalLM.from_pretrained(FOLDERS[name])).eval()
    model.resize_token_embeddings(V + 4, mean_resizing=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(grown(name, seed=5), tmp_path).eval()
    ids = _with_new_tokens()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:the base's weights differ")
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_base_that_is_loaded_along_gets_room_for_the_tokens(name: str, tmp_path: Path) -> None:
    model = adapt(grown(name)).eval()
    model.save_pretrained(tmp_path)
    loaded = shadowpeft.load(tmp_path, FOLDERS[name]).eval()
    ids = _with_new_tokens()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_shadows_own_table_does_not_grow_with_the_bases() -> None:
    model = adapt(base(), share_embeddings=False).eval()
    before = model(input_ids=tokens()).logits
    model.resize_token_embeddings(V + 4, mean_resizing=False)
    torch.testing.assert_close(model(input_ids=tokens()).logits[..., :V], before)  # rows that no token uses do no harm
    with pytest.raises(ConfigError, match=rf"token {V + 3} but the shadow's own embedding table has {V} rows"):
        model(input_ids=_with_new_tokens())
