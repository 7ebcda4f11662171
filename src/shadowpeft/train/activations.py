"""A folder of what the base computes below the first refined layer, so that it is computed once and not in every pass.

The distinct rows are sorted by length and divided into shards, ``activations-00000.safetensors`` and so on, each of about
``SHARD`` bytes: ``base_state`` ``(tokens, d)`` and, for a frozen shadow, ``shadow_state`` ``(tokens, d)``, row after row
without padding. A shard is written whole, so a run that was killed goes on after the last one. ``activations.json`` says of
which rows, base and settings they are, and whatever differs is refused; two rows are computed again and compared.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shadowpeft.data.padding import pad_inputs
from shadowpeft.errors import ConfigError, DataError, ShadowPeftError, UnsupportedModelError
from shadowpeft.hf.base.signature import trial_mode
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.base.weights import gather
from shadowpeft.hf.forward.below import TOLERANCE, check_base, record
from shadowpeft.hf.layer import ShadowHub, adapted_base, find_hub
from shadowpeft.json_text import parse_json
from shadowpeft.runtime import DTYPES, package_versions
from shadowpeft.storage import exclusive, write_json, written_whole

SHARD = 64 * 2**20
RECORD = "activations.json"
FORMAT_VERSION = 1
Row = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Rows that lie in one file."""

    file: Path
    rows: list[Row]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


class Activations:
    """Reads the states of rows from a folder that :func:`prepare` has filled."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._files: list[Any] = []
        self._places: dict[Row, tuple[int, int]] = {}
        for shard in shards:
            self._files.append(_opened(shard))
            start = 0
            for row in shard.rows:
                self._places[row] = len(self._files) - 1, start
                start += len(row)

    def batch(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """``base_state`` and, where stored, ``shadow_state`` ``(B, T, d)`` of a batch padded on either side; 0 in padding.

        Args:
            input_ids, attention_mask: ``(B, T)``.

        Raises:
            DataError: if one of the rows is not stored.
        """
        states: dict[str, Tensor] = {}
        for index, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            left = mask.index(1)
            row = tuple(ids[left : left + sum(mask)])
            for name, state in self.row(row).items():
                if name not in states:
                    states[name] = state.new_zeros(*input_ids.shape, state.shape[-1])
                states[name][index, left : left + len(row)] = state
        return {name: state.to(input_ids.device) for name, state in states.items()}

    def row(self, row: Row) -> dict[str, Tensor]:
        """The states of one row, ``(T, d)`` each."""
        if row not in self._places:
            raise DataError(
                f"a row of {len(row)} tokens has no stored activations; start a new run with the rows you have now"
            )
        number, start = self._places[row]
        file = self._files[number]
        return {name: file.get_slice(name)[start : start + len(row)] for name in file.keys()}  # noqa: SIM118


def prepare(
    model: Any,
    rows: Iterable[Sequence[int]],
    folder: Path,
    *,
    precision: str = "float32",
    batch_size: int = 16,
    shadow: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Activations:
    """Compute what is not yet in ``folder``, and open it.

    Args:
        model: with its adapter. rows: token ids; equal ones are stored once.
        precision: of the run; in 16 bits the base runs under autocast, as in training. batch_size: rows computed at a time.
        shadow: whether ``s^(0)`` is stored too; the shadow must be frozen.
        tell: called with what is going to be written, before it is.

    Raises:
        UnsupportedModelError: if the base cannot start from a stored activation.
        ConfigError: if the folder holds activations of other rows, another base or other settings, or something else.
        ShadowPeftError: if the disk has no room.
    """
    base, hub = adapted_base(model), find_hub(model)
    check_base(base, hub)
    distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
    key = _identity(base, hub, distinct, precision, shadow)
    d = find_decoder(base).hidden_size
    token_bytes = d * DTYPES[precision].itemsize + (4 * d if shadow else 0)  # a shadow is float32, and so are its states
    shards = _divided(distinct, folder, token_bytes)

    def compute(batch: Sequence[Row]) -> list[dict[str, Tensor]]:
        device = base.get_input_embeddings().weight.device
        inputs = pad_inputs(batch, pad_token_id=0, device=device)
        with trial_mode(base), torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32"):
            states = record(base, hub, **inputs, shadow=shadow)
        return [{name: s[i, : len(row)].cpu() for name, s in states.items()} for i, row in enumerate(batch)]

    with exclusive(folder):
        _check_folder(folder, key)
        missing = [shard for shard in shards if not shard.file.is_file()]
        if missing:
            _check_room(folder, missing, token_bytes, tell)
        for shard in missing:
            batches = (shard.rows[i : i + batch_size] for i in range(0, len(shard.rows), batch_size))
            states = [each for batch in batches for each in compute(batch)]
            joined = {name: torch.cat([each[name] for each in states]) for name in states[0]}
            with written_whole(shard.file, "the activations", "free some space and resume", folder=False) as beside:
                save_file(joined, beside)
    stored = Activations(shards)
    for row in (distinct[0], distinct[-1]):
        for name, state in compute([row])[0].items():
            _compare(state, stored.row(row)[name], folder)
    return stored


def _divided(rows: list[Row], folder: Path, token_bytes: int) -> list[Shard]:
    shards: list[Shard] = []
    room = 0
    for row in rows:
        if not shards or room < len(row):
            shards.append(Shard(folder / f"activations-{len(shards):05}.safetensors", []))
            room = max(SHARD // token_bytes, 1)
        shards[-1].rows.append(row)
        room -= len(row)
    return shards


def _opened(shard: Shard) -> Any:
    try:
        file = safe_open(shard.file, framework="pt")
        lengths = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"'{shard.file}' cannot be read ({error}); remove it and resume, it is computed anew"
        ) from error
    if lengths != {shard.tokens}:
        raise ConfigError(f"'{shard.file}' holds {lengths} tokens instead of {shard.tokens}; remove it and resume")
    return file


def _identity(base: Any, hub: ShadowHub, rows: list[Row], precision: str, shadow: bool) -> dict[str, Any]:
    """What the stored states depend on, by name."""
    adapter = hub.active_name()
    assert adapter is not None
    parts = find_decoder(base)
    first = hub.configs[adapter].mathematics.first_refined_layer
    inside = f"{parts.layers_name.removeprefix(parts.backbone_name).lstrip('.')}."
    above = tuple(f"{inside}{layer}." for layer in range(first, parts.num_layers))
    below = {
        name: value
        for name, value in parts.backbone.state_dict().items()
        if not name.startswith(above) and "shadow_hub." not in name
    }
    config = {k: v for k, v in parts.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    config = {**config, "shadow": hub.shadowpeft_backbone[adapter].config.to_dict() if shadow else None}
    return {
        "format_version": FORMAT_VERSION,
        "rows": _digest(f"{len(row)}:{','.join(map(str, row))};".encode() for row in rows),
        "base": _weights_digest(below),
        "configuration": _digest([json.dumps(config, sort_keys=True, default=str).encode()]),
        "attention": str(getattr(base.config, "_attn_implementation", None)),
        "first_layer": first,
        "precision": precision,
        "shadow": _weights_digest(hub.shadow_weights(adapter)) if shadow else None,
        "versions": package_versions(("torch", "transformers")),
    }


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _weights_digest(weights: dict[str, Tensor]) -> str:
    """Over every byte; the fingerprint of an adapter samples a few values, which two fine-tuned bases may share."""

    def parts() -> Iterable[Any]:
        for name in sorted(weights):
            value = gather(weights[name].detach())
            if type(value) is not Tensor or value.is_meta:
                raise UnsupportedModelError(
                    f"{name} is quantised or offloaded ({type(value).__name__}), so stored activations cannot be told from "
                    "those of other weights; load the base plainly, or set training.cache_activations: false"
                )
            yield f"{name}{tuple(value.shape)}{value.dtype}".encode()
            yield value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    return _digest(parts())


def _check_folder(folder: Path, key: dict[str, Any]) -> None:
    file = folder / RECORD
    if not file.is_file():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".shadowpeft-"))
        if others:
            raise ConfigError(
                f"'{folder}' has no {RECORD} but holds {others[0]}; name an empty folder in training.cache_activations"
            )
        write_json(file, key)
        return
    try:
        stored = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{file}' cannot be read ({error}); remove the folder, it is computed anew") from error
    differing = [name for name, value in key.items() if not isinstance(stored, dict) or stored.get(name) != value]
    if differing:
        raise ConfigError(
            f"the activations in '{folder}' were stored with other {' and other '.join(differing)}; remove the folder, or name "
            "another one in training.cache_activations"
        )


def _check_room(folder: Path, missing: list[Shard], token_bytes: int, tell: Callable[[str], None]) -> None:
    tokens, rows = sum(shard.tokens for shard in missing), sum(len(shard.rows) for shard in missing)
    needed, free = tokens * token_bytes, shutil.disk_usage(folder).free
    size = f"{tokens:,} tokens of {rows:,} rows take {needed / 1e6:,.0f} MB in '{folder}'"
    if needed > 0.95 * free:
        raise ShadowPeftError(
            f"the activations of {size}, where {free / 1e6:,.0f} MB are free; name a folder with more room in "
            "training.cache_activations, refine more layers, or set it to false"
        )
    tell(f"activations: {size} ({free / 1e9:,.0f} GB free)")


def _compare(now: Tensor, stored: Tensor, folder: Path) -> None:
    if float((now - stored).float().norm()) > TOLERANCE.get(now.dtype, 0.1) * float(stored.float().norm()):
        raise ConfigError(f"the activations in '{folder}' are not what the base computes now; remove the folder")
