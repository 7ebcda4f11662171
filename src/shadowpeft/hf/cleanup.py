"""Taking all adapters out of a model again: when they are unloaded, and when a first one cannot be attached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils import ModulesToSaveWrapper
from torch import nn

from shadowpeft.hf.layer import HANDLES


@contextmanager
def clean_on_failure(model: nn.Module) -> Iterator[None]:
    """If a first adapter cannot be attached or loaded, take what exists of it out of ``model`` again."""
    first = not hasattr(model, "peft_config")
    try:
        yield
    except BaseException:
        if first:
            remove(model)
        raise


def remove(model: nn.Module) -> None:
    """Take hub, links, hooks and ``modules_to_save`` of every adapter out of ``model``; its own modules never changed."""
    for handle in getattr(model, HANDLES, []):
        handle.remove()
    for name in (HANDLES, "peft_config"):
        if hasattr(model, name):
            delattr(model, name)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)
        for part in ("shadow_hub", "shadow_link"):
            if part in getattr(module, "_modules", {}):
                del module._modules[part]
