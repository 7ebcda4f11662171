"""ShadowPEFT: adapt a frozen language model with a small shadow network beside it.

Importing this package makes PEFT know the method. Nothing heavy is imported before it is used: PEFT, transformers and
torch load with the first attribute that needs them, and if something else imports PEFT first, the method is registered
at that moment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shadowpeft._register import register_when_peft_loads

if TYPE_CHECKING:
    from shadowpeft.errors import ShadowPeftError
    from shadowpeft.hf.config import ShadowPeftConfig
    from shadowpeft.hf.detach import detach
    from shadowpeft.hf.forward.speculation import Speculation
    from shadowpeft.hf.load import load
    from shadowpeft.hf.model import ShadowModel
    from shadowpeft.hf.swap import swap
    from shadowpeft.train.trainer import ShadowLossMixin, ShadowTrainer

__version__ = "0.1.0"

_LAZY = {
    "ShadowLossMixin": "shadowpeft.train.trainer",
    "ShadowModel": "shadowpeft.hf.model",
    "ShadowPeftConfig": "shadowpeft.hf.config",
    "ShadowPeftError": "shadowpeft.errors",
    "ShadowTrainer": "shadowpeft.train.trainer",
    "Speculation": "shadowpeft.hf.forward.speculation",
    "detach": "shadowpeft.hf.detach",
    "load": "shadowpeft.hf.load",
    "swap": "shadowpeft.hf.swap",
}

__all__ = [
    "ShadowLossMixin",
    "ShadowModel",
    "ShadowPeftConfig",
    "ShadowPeftError",
    "ShadowTrainer",
    "Speculation",
    "__version__",
    "detach",
    "load",
    "swap",
]

register_when_peft_loads()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'shadowpeft' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
