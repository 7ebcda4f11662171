"""Make PEFT know the method, at the moment PEFT is imported.

PEFT takes a second or two to import (it brings torch and transformers), and ``shadowpeft --help`` must answer in less
than half a second; still, ``import shadowpeft`` alone must be enough for ``PeftModel.from_pretrained`` to load an adapter.
So the registration waits for PEFT's own import, whoever causes it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

NAME = "shadowpeft"
PREFIX = "shadowpeft_"


def _register() -> None:
    from shadowpeft import versions

    versions.check()  # before anything of this package is imported that an old release may not have the parts for
    from peft.utils import peft_types

    if NAME.upper() in peft_types.PeftType.__members__:
        _refresh()
        return
    # PeftType is a str enum without an extension point, and transformers' adapter loading reads `.value` from the
    # member, so a plain string will not do: add a real member.
    enum = peft_types.PeftType
    member = str.__new__(enum, NAME.upper())
    member._name_ = member._value_ = NAME.upper()
    enum._member_names_.append(NAME.upper())
    enum._member_map_[NAME.upper()] = member
    enum._value2member_map_[NAME.upper()] = member
    type.__setattr__(enum, NAME.upper(), member)

    from shadowpeft.hf.config import ShadowPeftConfig
    from shadowpeft.hf.model import ShadowModel

    peft_types.register_peft_method(name=NAME, config_cls=ShadowPeftConfig, model_cls=ShadowModel, prefix=PREFIX)


def _refresh() -> None:
    """Point PEFT at this copy of the classes: a notebook may drop the package from ``sys.modules`` and import it again."""
    from peft import mapping

    from shadowpeft.hf.config import ShadowPeftConfig
    from shadowpeft.hf.model import ShadowModel

    member: Any = NAME.upper()
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] = ShadowPeftConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] = ShadowModel


class _Loader(importlib.abc.Loader):
    """PEFT's own loader, with the registration after it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()
        _remove_finders()  # last: if PEFT cannot be imported, the next attempt must register too

    def __getattr__(self, name: str) -> Any:  # get_data, get_source, ...: importlib.resources and inspect ask for them
        return getattr(self.inner, name)


def _is_ours(finder: Any) -> bool:
    # by name: after this module was reloaded, an earlier finder is of another class
    return type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__


def _remove_finders() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]


class _Finder(importlib.abc.MetaPathFinder):
    """Stands before the ordinary finders until PEFT is imported (being asked where PEFT is does not end that)."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        for finder in sys.meta_path:
            spec = None if _is_ours(finder) else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def register_when_peft_loads() -> None:
    """Register now if PEFT is already imported, else right after it is."""
    if "peft" in sys.modules:
        _register()
    else:
        _remove_finders()
        sys.meta_path.insert(0, _Finder())
