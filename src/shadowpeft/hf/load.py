"""Loading an adapter by its folder or Hub id: the configuration is checked, the base is found, the weights are validated."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf import formats
from shadowpeft.hf.base.aliases import is_alias
from shadowpeft.hf.base.load import load_base, of_labels
from shadowpeft.hf.base.weights import is_offloaded
from shadowpeft.hf.config import ShadowPeftConfig, config_from_file
from shadowpeft.hf.files.locate import CONFIG, WEIGHTS, at_revision, find_file
from shadowpeft.hf.files.reading import check_dtypes, read_header
from shadowpeft.hf.layer import check_adapter_name, clean_on_failure
from shadowpeft.messages import quote


def read_config(adapter: str | Path) -> ShadowPeftConfig:
    """The configuration of an adapter, every key checked.

    Raises:
        AdapterFileError: if the file is missing or damaged, or is another method's.
        ConfigError: if a key is unknown, missing or impossible.
    """
    return config_from_file(find_file(adapter, CONFIG))


def check_weights(adapter: str | Path) -> Path:
    """Open the weights file without reading tensors; its header must be whole.

    Raises:
        AdapterFileError: if it is missing, truncated, or not safetensors (pickle files are never read).
    """
    path = find_file(adapter, WEIGHTS)
    check_dtypes(path, read_header(path))
    return path


def named_base(config: ShadowPeftConfig) -> tuple[str, dict[str, str]]:
    """The base that an adapter names, by folder, alias or Hub id, and the revision of the last, for ``load_base``.

    Raises:
        ConfigError: if it names none.
    """
    named, options = config.base_model_name_or_path, {"revision": config.revision} if config.revision else {}
    if config.base_alias is not None and not (named and os.path.isdir(named)):  # False where it may not be looked into
        named, options = config.base_alias, {}
    if not named:
        raise ConfigError("the adapter does not name its base; pass base=")
    return named, options


@contextmanager
def _where_it_is(base: nn.Module) -> Iterator[None]:
    """PEFT spreads an offloaded model over the devices anew, which on a machine without accelerator fails for weights on
    disk; the base stays where its owner put it, and the adapter goes beside its layers."""
    placed = getattr(base, "hf_device_map", None) if is_offloaded(base) else None
    if placed is not None:
        del base.hf_device_map
    try:
        yield
    finally:
        if placed is not None:
            base.hf_device_map = placed


def _classes(config: ShadowPeftConfig, weights: Path) -> dict[str, Any]:
    """What the base of a classifier is loaded with: the labels that the adapter records, or as many as its head has."""
    if config.labels is not None or config.task_type != "SEQ_CLS":
        return of_labels(config.labels)
    heads = [entry for name, entry in read_header(weights).items() if name.endswith("shadowpeft_head.weight")]
    return {"num_labels": heads[0].shape[0]} if heads and heads[0].shape else {}


def _padded(base: Any, config: ShadowPeftConfig) -> nn.Module:
    """A base of ours pads a classifier's texts as in training, whatever its own configuration says."""
    if config.task_type == "SEQ_CLS" and config.pad_token_id is not None:
        base.config.pad_token_id = config.pad_token_id
    return base  # type: ignore[no-any-return]


def _grown(base: Any, config: ShadowPeftConfig, weights: Path) -> nn.Module:
    """A base of ours with room for the tokens that the adapter was trained with, if its file brings them."""
    shapes = (config.base_fingerprint or {}).get("shapes")
    wanted = shapes.get("vocab_size") if isinstance(shapes, dict) else None
    if type(wanted) is not int or wanted <= base.config.get_text_config().vocab_size:
        return base  # type: ignore[no-any-return]
    table = base.get_input_embeddings()
    own = next(name for name, module in base.named_modules() if module is table)
    if any(name.endswith(f".{own}.weight") and entry.shape[0] == wanted for name, entry in read_header(weights).items()):
        base.resize_token_embeddings(wanted, mean_resizing=False)
    return base  # type: ignore[no-any-return]


def load(
    adapter: str | Path,
    base: nn.Module | str | Path | None = None,
    *,
    shadow_model: nn.Module | str | Path | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Load a shadow adapter onto its base.

    Args:
        adapter: folder or Hub id, in this package's format, the authors' or that of PEFT's ``SHADOW``.
        base: a model, a path, an alias or a Hub id; None: the one the adapter names, at
            the revision it names.
        shadow_model: for adapters whose shadow backbone is of a class transformers does not know, a module of that class;
            for an explicit shadow in the authors' or PEFT's format, the model (module, folder or Hub id) it started from.
        revision: of an adapter on the Hub: branch, tag or commit; None: its main branch.
        adapter_name: name for the adapter in the model. is_trainable: keep it trainable; otherwise it is frozen, in eval mode.

    Returns:
        a ``PeftModel``.

    Raises:
        AdapterFileError: a file is missing, truncated, corrupt, or its tensors do not fit.
        ConfigError: a configuration key is unknown, missing or impossible, or the base cannot be loaded.
        BaseMismatchError: the adapter belongs to another base.
    """
    check_adapter_name(adapter_name)
    if revision is not None:
        adapter = at_revision(adapter, revision)
    kind = formats.detect(adapter)
    if kind != formats.OURS:
        model, _ = formats.load(
            adapter, kind, base, shadow_model=shadow_model, adapter_name=adapter_name, is_trainable=is_trainable
        )
        return model
    if isinstance(shadow_model, (str, Path)):
        raise ConfigError(
            f"shadow_model is '{shadow_model}', but this adapter holds its shadow's configuration and weights; leave it out"
        )
    config = read_config(adapter)
    config.weights_file = check_weights(adapter)
    if config.base_alias is not None and not is_alias(config.base_alias):
        raise ConfigError(f"base_alias is {quote(config.base_alias)}, which is no built-in base; pass base=")
    task = str(getattr(config.task_type, "value", config.task_type))
    classes, given = _classes(config, config.weights_file), isinstance(base, nn.Module)
    if base is None:
        named, options = named_base(config)
        try:
            base = _padded(load_base(named, task, **options, **classes), config)
        except ConfigError as error:
            raise ConfigError(f"{error}; the adapter names this base, so pass base= (--base) if it is elsewhere") from error
    elif not isinstance(base, nn.Module):
        base = _padded(load_base(base, task, **classes), config)
    if not given:
        base = _grown(base, config, config.weights_file)
    if shadow_model is not None:
        config.shadow_model = shadow_model
    folder = adapter if not Path(adapter).is_dir() else Path(adapter)
    assert isinstance(base, nn.Module)
    with clean_on_failure(base), _where_it_is(base), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(
                base, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config
            )
        except KeyError as error:  # PEFT looks up the trained modules of the base without asking
            raise AdapterFileError(
                f"the adapter's weights lack {error}; the file is truncated or of another adapter"
            ) from error
        except UserWarning as warning:
            raise AdapterFileError(f"the adapter's weights are incomplete: {warning}") from warning
