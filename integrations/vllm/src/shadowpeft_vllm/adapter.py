"""An adapter's files: everything that can be said about them before a weight of the base is read."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shadowpeft_vllm.values import KNOWN, NOT_OF_A_BACKBONE, problem_in

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT_VERSION = 1
_log = logging.getLogger("vllm.shadowpeft")


class AdapterError(ValueError):
    """An adapter that vLLM cannot serve: damaged, of another base, or of a kind that this plugin does not know."""


@dataclass(frozen=True)
class Mathematics:
    """What sets the variants of the method apart, as in ``shadowpeft.settings.Variant``."""

    first_refined_layer: int = 1
    update_activation: str = "silu"
    update_bias: bool = False
    update_norm: bool = True
    normalised: bool = False
    gate_start: float = 0.0


VARIANTS = {
    "paper": Mathematics(),
    "authors": Mathematics(),
    "peft": Mathematics(first_refined_layer=0, update_activation="gelu", update_bias=True, update_norm=False),
    "scaled": Mathematics(normalised=True, gate_start=-4.0),
}
SHADOWS = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "qwen3_moe")
"""``model_type`` of the shadow backbones that there are layers for."""

@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter from its configuration and the header of its weights.

    Raises:
        AdapterError: from :func:`read_adapter`, which makes it.
    """

    folder: Path
    alpha: float
    r: int
    m: int
    layers: range
    """The base layers that are corrected."""
    use_update: bool
    mathematics: Mathematics
    record: Mapping[str, Any]
    """The shadow backbone's own configuration: what of it shapes a backbone."""
    own_embedding: bool
    """Whether the shadow has a token table of its own; otherwise it reads the base's."""
    d: int
    """Width of the base."""
    fingerprint: Mapping[str, Any]

    @property
    def d_s(self) -> int:
        """Width of the shadow."""
        return int(self.record["hidden_size"])

    @property
    def has_norm(self) -> bool:
        """Whether the updates share a norm."""
        return self.use_update and self.mathematics.update_norm and len(self.layers) > 1

    def has_update(self, layer: int) -> bool:
        """Whether the shadow's state moves on before ``layer``; before the first refined layer it does not."""
        return self.use_update and layer != self.layers.start

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two adapters must have in common for one to take the place of the other while vLLM runs."""
        record = {
            k: v
            for k, v in self.record.items()
            if k not in ("_name_or_path", "eos_token_id", "bos_token_id", "pad_token_id")
        }
        settings = (self.r, self.m, self.layers, self.use_update, self.mathematics, self.own_embedding)
        return (*settings, json.dumps(record, sort_keys=True))

    def check_replaces(self, old: Adapter) -> None:
        """Raise unless this adapter may take the place of ``old`` while vLLM runs.

        Raises:
            AdapterError: if it has another shape, or was trained on a base with other weights.
        """
        if self.shape != old.shape:
            raise AdapterError(
                "the new adapter differs from the running one in rank, widths, layers or variant, which decide what vLLM has "
                "compiled and cached; start another server for it"
            )
        for key, samples in self.fingerprint["values"].items():
            theirs = torch.tensor(samples, dtype=torch.float64)
            ours = torch.tensor(old.fingerprint["values"].get(key, []), dtype=torch.float64)
            if theirs.shape != ours.shape or not bool((theirs - ours).norm() <= 0.35 * ours.norm().clamp(min=1e-12)):
                raise AdapterError(
                    f"the new adapter was trained on a base with other weights ({key}); start another server for it"
                )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name in vLLM's model -> shape of every tensor that does not belong to the layers of the shadow backbone."""
        shapes: dict[str, tuple[int, ...]] = {"norm.weight": (self.d_s,)}
        for layer in self.layers:
            shapes |= {f"links.{layer}.w_down": (self.r, self.d), f"links.{layer}.w_up": (self.d, self.r)}
            if self.has_update(layer):
                shapes |= {f"links.{layer}.w_in": (2 * self.m, self.d), f"links.{layer}.w_out": (2, self.d, self.m)}
                if self.mathematics.update_bias:
                    shapes |= {f"links.{layer}.b_in": (2 * self.m,), f"links.{layer}.b_out": (2, self.d)}
        if self.has_norm:
            shapes |= {"link_norm.weight": (self.d,), "link_norm.bias": (self.d,)}
        if self.d_s != self.d:
            shapes["projection.weight"] = (self.d, self.d_s)
        if self.own_embedding:
            shapes["embed_tokens.weight"] = (int(self.record["vocab_size"]), self.d_s)
        return shapes

    def link_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name in a link of vLLM's model -> shape, of what the step before ``layer`` needs."""
        shapes = {"w_down": (self.d, self.r), "w_up": (self.r, self.d)}
        if self.has_update(layer):
            shapes |= {"w_in": (self.d, 2 * self.m), "w_t": (self.m, self.d), "w_g": (self.m, self.d)}
            if self.mathematics.update_bias:
                shapes |= {"b_in": (2 * self.m,), "b_t": (self.d,), "b_g": (self.d,)}
        return shapes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that serving needs, by its name in vLLM's model. A link's matrices are right factors
        (:mod:`shadowpeft_vllm.step`), the two output matrices of an update two tensors, and ``w_up`` has alpha in it, so that a
        step has no constant."""
        with safe_open(str(self.folder / WEIGHTS), "pt") as file:
            for name in sorted(file.keys()):
                mine = rename(name)
                if mine is None:
                    continue
                value = file.get_tensor(name)
                if not mine.startswith("links."):
                    yield mine, value
                    continue
                link, _, kind = mine.rpartition(".")
                value = value * self.alpha if kind == "w_up" else value
                parts = zip(("t", "g"), value, strict=True) if kind.endswith("_out") else [(kind[2:], value)]
                for part, own in parts:
                    yield f"{link}.{kind[:2]}{part}", own.mT.contiguous() if kind.startswith("w_") else own

    def check_value(self, name: str, value: Tensor) -> bool:
        """Compare a tensor of the base, as its file calls it, with the sample that the adapter took of it in training.

        Returns:
            whether the adapter has a sample of this tensor.

        Raises:
            AdapterError: if the weights are another model's.
        """
        last = self.fingerprint["shapes"]["num_hidden_layers"] - 1
        for key, samples in self.fingerprint["values"].items():
            place, _, inner = key.partition(".")
            ends = (
                "embed_tokens.weight" if place == "embedding" else f"layers.{0 if place == 'first' else last}.{inner}"
            )
            if not (name == ends or name.endswith(f".{ends}")) or not value.is_floating_point() or "shadow" in name:
                continue
            flat, theirs = value.reshape(-1), torch.tensor(samples, dtype=torch.float64)
            ours = flat[torch.linspace(0, flat.numel() - 1, len(samples), dtype=torch.float64).long()].double()
            distance = float((theirs - ours).norm() / theirs.norm().clamp(min=1e-12))
            if not distance <= 0.35:  # as shadowpeft: rounding gives 0.004, a quantiser more, another model 1.4
                raise AdapterError(
                    f"the adapter was trained on a base with other weights (relative difference {distance:.2g} in {key}); "
                    "serve the base that the adapter names, at the revision it was trained on"
                )
            if distance > 0.02:
                _log.warning(
                    "the base's weights differ from those the adapter was trained on by %.2g (%s)", distance, key
                )
            return True
        return False


LINK = ("w_down", "w_up", "w_in", "w_t", "w_g", "b_in", "b_t", "b_g")
"""What a link of vLLM's model may hold."""
_LINK = re.compile(r"layers\.(\d+)\.shadow_link\.shadowpeft_(?:injection|update)\.(w_down|w_up|w_in|w_out|b_in|b_out)")
_HUB = {
    "shadowpeft_backbone.shadow_embedding.weight": "embed_tokens.weight",
    "shadowpeft_embedding.weight": "embed_tokens.weight",
    "shadowpeft_projection.weight": "projection.weight",
    "shadowpeft_norm.weight": "link_norm.weight",
    "shadowpeft_norm.bias": "link_norm.bias",
}


def rename(name: str) -> str | None:
    """What a tensor of an adapter's file is called below ``model.shadow`` in vLLM; None if serving does not need it.

    Raises:
        AdapterError: if it is none of an adapter's tensors.
    """
    short = name.removeprefix("base_model.model.model.")
    link = _LINK.fullmatch(short)
    if link is not None:
        return f"links.{link[1]}.{link[2]}"
    inside = short.removeprefix("shadow_hub.")
    if inside != short:
        if inside in _HUB:
            return _HUB[inside]
        if inside.startswith(("shadowpeft_backbone.layers.", "shadowpeft_backbone.norm.")):
            return inside.removeprefix("shadowpeft_backbone.")
        if inside.startswith("shadowpeft_head."):  # what the detached model reads; the attached path does not
            return None
    raise AdapterError(
        f"the adapter holds the tensor {name[:120]}, which shadowpeft-vllm has no place for; use shadowpeft serve"
    )


def read_adapter(folder: str | Path, base: Mapping[str, Any]) -> Adapter:
    """Read and judge an adapter for a base whose configuration has ``model_type``, ``hidden_size``, ``num_hidden_layers`` and
    ``vocab_size`` as in ``base``. Of the weights only the adapter's own are read, for their digest.

    Raises:
        AdapterError: naming what is damaged, does not belong to this base, or is not supported.
    """
    folder = Path(folder)
    config = _read_json(folder)
    _refuse(config)
    record, fingerprint = config["shadow_backbone_config"], config["base_fingerprint"]
    _check_base(fingerprint, base)
    mathematics = VARIANTS[config["variant"]]
    ends = config.get("refined_layers") or [mathematics.first_refined_layer, base["num_hidden_layers"] - 1]
    if not 0 <= ends[0] <= ends[1] < base["num_hidden_layers"]:
        raise AdapterError(f"refined_layers is {ends} but the base has layers 0 to {base['num_hidden_layers'] - 1}")
    mirror = config["shadow_model"] == "mirror"
    shares = config.get("share_embeddings")
    shares = mirror if shares is None else shares
    adapter = Adapter(
        folder=folder,
        alpha=float(config["shadow_alpha"]),
        r=config["r"],
        m=config.get("update_hidden_size") or config["r"],
        layers=range(ends[0], ends[1] + 1),
        use_update=config["use_update"],
        mathematics=mathematics,
        record={k: v for k, v in record.items() if k not in NOT_OF_A_BACKBONE and not k.startswith(("_", "auto_"))},
        own_embedding=not shares,
        d=base["hidden_size"],
        fingerprint=fingerprint,
    )
    if not adapter.own_embedding and adapter.d_s != adapter.d:
        raise AdapterError(
            f"the shadow shares the base's embeddings but is {adapter.d_s} wide and the base {adapter.d}"
        )
    _check_tensors(adapter, config.get("weights_sha256"))
    return adapter


def _read_json(folder: Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"the adapter '{folder}' has no {name}; give the folder that save_pretrained wrote")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{folder / CONFIG} is damaged ({error}); copy the whole folder again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "SHADOWPEFT":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{folder / CONFIG} is a {kind} adapter but this plugin serves SHADOWPEFT adapters")
    return config


def _refuse(config: dict[str, Any]) -> None:
    """Raise for every setting that this plugin does not know or cannot serve."""
    needed = {"r", "shadow_alpha", "use_update", "variant", "shadow_model", "format_version", "task_type"}
    missing = sorted(needed - set(config))
    if missing:
        raise AdapterError(
            f"the adapter's configuration lacks {missing[0]}; take the file from the run that made the adapter"
        )
    unknown = sorted(set(config) - KNOWN)
    if unknown:
        raise AdapterError(
            f"the adapter has the setting {unknown[0]}, which this shadowpeft-vllm does not know; upgrade it"
        )
    record, fingerprint = config.get("shadow_backbone_config"), config.get("base_fingerprint")
    if record is None or fingerprint is None:
        raise AdapterError(
            "the adapter lacks shadow_backbone_config or base_fingerprint; save it again with shadowpeft"
        )
    problem = problem_in(config)
    if problem is not None:
        raise AdapterError(problem)
    if config["format_version"] != FORMAT_VERSION:
        raise AdapterError(
            f"the adapter has format version {config['format_version']}, this shadowpeft-vllm reads {FORMAT_VERSION}; "
            "upgrade it"
        )
    if config["task_type"] != "CAUSAL_LM":
        raise AdapterError(
            f"the adapter's task_type is {config['task_type']} but only CAUSAL_LM is served; use shadowpeft serve"
        )
    if config["variant"] not in VARIANTS:
        raise AdapterError(f"the adapter's variant is {config['variant']} but must be one of {', '.join(VARIANTS)}")
    if config.get("modules_to_save"):
        raise AdapterError(
            f"the adapter replaces modules of the base (modules_to_save: {config['modules_to_save']}), which is not supported; "
            "use shadowpeft serve"
        )
    if config.get("shadow_reads_tokens"):
        raise AdapterError(
            "the layers of the adapter's shadow read tokens (shadow_reads_tokens), which is not supported"
        )
    if record.get("model_type") not in SHADOWS:
        raise AdapterError(
            f"the adapter's shadow is a {record.get('model_type')} model but must be one of {', '.join(SHADOWS)}"
        )
    kinds = set(record.get("layer_types") or ())
    window = record.get("sliding_window")
    if "sliding_attention" in kinds and record["model_type"] in ("qwen2", "qwen3", "qwen3_moe"):
        raise AdapterError(
            f"the shadow's {record['model_type']} layers have a sliding window ({window}), which vLLM lacks there"
        )


def _check_base(fingerprint: dict[str, Any], base: Mapping[str, Any]) -> None:
    shapes, values = fingerprint.get("shapes"), fingerprint.get("values")
    whole = isinstance(shapes, dict) and isinstance(values, dict) and "num_hidden_layers" in shapes
    if not whole or not all(_is_sample(sample) for sample in values.values()):
        raise AdapterError("the adapter's base_fingerprint is damaged; copy the whole folder again")
    if fingerprint.get("architecture") != base["model_type"]:
        raise AdapterError(
            f"the adapter was trained on a {fingerprint.get('architecture')} model but this base is {base['model_type']}; "
            "serve its own base"
        )
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if shapes.get(key) != base[key]:
            raise AdapterError(
                f"the adapter's base has {key} = {shapes.get(key)} but this base has {base[key]}; serve the adapter's own base"
            )


def _is_sample(sample: Any) -> bool:
    """Whether these are values of a tensor; JSON has whole numbers of any size, and NaN."""
    return isinstance(sample, list) and bool(sample) and all(type(v) in (int, float) and abs(v) < 1e300 for v in sample)


def _check_tensors(adapter: Adapter, digest: str | None) -> None:
    path = adapter.folder / WEIGHTS
    whole, found = hashlib.sha256(), {}
    try:
        with safe_open(str(path), "pt") as file:
            for name in sorted(file.keys()):
                value = file.get_tensor(name)
                mine = rename(name)
                if mine is not None:
                    found[mine] = tuple(value.shape)
                whole.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
                whole.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged ({error}); copy the whole folder again") from error
    expected = adapter.expected()
    for name in sorted(set(expected) | {n for n in found if not n.startswith("layers.")}):
        if found.get(name) != expected.get(name):
            raise AdapterError(
                f"the adapter's {name} has shape {found.get(name, 'none')} but its configuration asks for "
                f"{expected.get(name, 'none')}; configuration and weights do not belong together"
            )
    layers = {int(n.split(".")[1]) for n in found if n.startswith("layers.")}
    if layers != set(range(adapter.record["num_hidden_layers"])):
        raise AdapterError(
            f"the adapter's shadow has layers {sorted(layers)} but its configuration says {adapter.record['num_hidden_layers']}"
        )
    if digest is not None and whole.hexdigest() != digest:
        raise AdapterError(
            f"{path} does not hold the weights that {CONFIG} was saved with; copy the whole folder again"
        )
