"""Nothing here warns: not attaching, training, generating, saving or loading, and nothing of ours calls what is deprecated."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

import shadowpeft
from tiny import adapter_config, base, tokens


@pytest.fixture
def strict():
    """Every warning is an error, also those that blame transformers or PEFT: the user sees them all the same."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_a_life_without_a_warning(name, tmp_path):
    model = get_peft_model(base(name), adapter_config()).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainable]
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    torch.optim.AdamW(trainable).step()
    assert any(not torch.equal(p, b) for p, b in zip(trainable, before, strict=True))
    model.eval()
    text = model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path)
    for loaded in (PeftModel.from_pretrained(base(name), tmp_path), shadowpeft.load(tmp_path, base(name))):
        again = loaded.eval().generate(input_ids=tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(again, text)


def test_what_our_modules_deprecate_or_call_deprecated_is_an_error_in_every_test():
    """The filters of pyproject.toml: an error where the warning blames a module of this package, silence elsewhere."""
    for category in (DeprecationWarning, FutureWarning):
        with pytest.raises(category, match="old"):
            warnings.warn_explicit("old", category, "x.py", 1, module="shadowpeft.hf.model")
        warnings.warn_explicit("old", category, "x.py", 1, module="transformers.modeling_utils")
