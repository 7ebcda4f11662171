"""Errors that a user of this package meets: one sentence each - what was got, what was expected, how to fix it."""


class ShadowPeftError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(ShadowPeftError, ValueError):
    """A configuration is impossible, contradictory or misspelt."""


class UnsupportedModelError(ShadowPeftError, ValueError):
    """The base or the shadow model has a form that the method cannot be attached to."""


class BaseMismatchError(ShadowPeftError, ValueError):
    """The adapter was trained on another base model."""


class AdapterFileError(ShadowPeftError, ValueError):
    """An adapter file is missing, truncated, corrupt or does not fit its own configuration."""


class CacheMismatchError(ShadowPeftError, ValueError):
    """A key-value cache does not hold what the active adapter needs."""


class UnsupervisedShadowError(ShadowPeftError, RuntimeError):
    """A training step would leave the shadow path without its loss."""


class DataError(ShadowPeftError, ValueError):
    """A data file or row is malformed; the message names file and line."""


class VersionError(ShadowPeftError, ImportError):
    """An installed release of torch, transformers, PEFT or TRL is older than the oldest that works."""


class NonFiniteLossError(ShadowPeftError, ArithmeticError):
    """Loss or gradient became NaN or infinite; the message says at which step and text."""
