"""The only place that touches internals of transformers and PEFT."""

import peft as _peft  # noqa: F401  (first: importing PEFT registers the method, which imports the modules below)

from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.model import ShadowModel

__all__ = ["ShadowModel", "ShadowPeftConfig"]
