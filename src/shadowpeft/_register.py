"""Make PEFT know the method, at the moment PEFT is imported.

PEFT takes seconds to import (it brings torch and transformers), and ``shadowpeft --help``, a wrong run file and the router must
do without it; still, ``import shadowpeft`` alone must be enough for ``PeftModel.from_pretrained`` to load an adapter. So the
registration waits for PEFT's own import, whoever causes it.
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
    from peft import mapping
    from peft.utils import peft_types

    enum: Any = peft_types.PeftType
    known = NAME.upper() in enum.__members__
    if not known:
        # PeftType is a str enum without an extension point, and transformers' adapter loading reads `.value` from the
        # member, so a plain string will not do: add a real member.
        member = str.__new__(enum, NAME.upper())
        member._name_ = member._value_ = NAME.upper()
        enum._member_names_.append(NAME.upper())
        enum._member_map_[NAME.upper()] = member
        enum._value2member_map_[NAME.upper()] = member
        type.__setattr__(enum, NAME.upper(), member)

    from shadowpeft.hf.config import ShadowPeftConfig
    from shadowpeft.hf.model import ShadowModel

    if known:  # a notebook dropped the package from sys.modules and imports it again: point PEFT at these classes
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[enum.SHADOWPEFT] = ShadowPeftConfig
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[enum.SHADOWPEFT] = ShadowModel
    else:
        peft_types.register_peft_method(name=NAME, config_cls=ShadowPeftConfig, model_cls=ShadowModel, prefix=PREFIX)


class _Finder(importlib.abc.MetaPathFinder):
    """Stands before the ordinary finders until PEFT is imported (being asked where PEFT is does not end that)."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in _others())
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            stock = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                stock(module)
                _register()
                sys.meta_path[:] = _others()  # last: if PEFT cannot be imported, the next attempt must register too

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _others() -> list[Any]:
    # by name: after this module was reloaded, an earlier finder is of another class
    return [f for f in sys.meta_path if (type(f).__module__, type(f).__name__) != (__name__, "_Finder")]


def register_when_peft_loads() -> None:
    """Register now if PEFT is already imported, else right after it is."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path[:] = [_Finder(), *_others()]
