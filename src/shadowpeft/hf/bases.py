"""The name under which earlier releases of the README imported this; the built-in bases are in ``hf/base/aliases``."""

from shadowpeft.hf.base.aliases import is_alias, materialise

__all__ = ["is_alias", "materialise"]
