"""The adapter's configuration: :class:`ShadowPeftConfig`, a PEFT config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType, TaskType
from torch import nn

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.files.reading import read_json
from shadowpeft.messages import did_you_mean, quote, shorten
from shadowpeft.presets import preset

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FORMAT_VERSION = 1
VARIANTS = ("paper", "authors", "peft")
SHADOW_INITS = ("random", "base_layers", "base_layers_spread")
PROJECTION_INITS = ("random", "pseudo_inverse")
SHADOW_LOSSES = ("ce", "kl", "both")

# The mathematical differences between the implementations (docs/defects.md), as named fields of the configuration.
# `authors` computes what the paper says: its last update exists but nothing reads it, so it is not built here.
_VARIANT_FIELDS: dict[str, dict[str, Any]] = {
    "paper": {
        "first_refined_layer": 1,
        "update_activation": "silu",
        "update_bias": False,
        "update_norm": True,
        "dropout_before_down": False,
        "dropout_in_update": True,
        "paper_init": True,
    },
    "peft": {
        "first_refined_layer": 0,
        "update_activation": "gelu",
        "update_bias": True,
        "update_norm": False,
        "dropout_before_down": True,
        "dropout_in_update": False,
        "paper_init": False,
    },
}
_VARIANT_FIELDS["authors"] = _VARIANT_FIELDS["paper"]

_MIRROR_ONLY = (
    "shadow_num_hidden_layers",
    "shadow_intermediate_size",
    "shadow_num_attention_heads",
    "shadow_num_key_value_heads",
    "shadow_head_dim",
    "shadow_hidden_size",
)


@dataclass
class ShadowPeftConfig(PeftConfig):
    """Configuration of a shadow adapter. Impossible combinations raise :class:`~shadowpeft.errors.ConfigError` here."""

    r: int = 16
    """Rank of the injection, ``W_down: d x r`` and ``W_up: r x d`` (Eq. 3)."""
    shadow_alpha: float = 0.1
    """Strength of the injected correction (Eq. 4)."""
    shadow_dropout: float = 0.2
    """Dropout probability in the correction (Eq. 3) and in the transform net (Eq. 13)."""
    update_hidden_size: int | None = None
    """Hidden width ``m`` of the update nets (Eqs. 13-14); None: ``r``."""
    use_update: bool = True
    """False: the shadow state stays ``s^(0)`` in every layer (the paper's ablation, 4.3)."""
    shadow_model: Any = "mirror"
    """"mirror": a small network of the base's own class. Otherwise a Hub id, a folder or a module to start from."""
    shadow_num_hidden_layers: int | None = None
    """Layers of a mirrored shadow; None: 1."""
    shadow_intermediate_size: int | None = None
    """MLP width of a mirrored shadow; None: the base's."""
    shadow_num_attention_heads: int | None = None
    """Attention heads of a mirrored shadow; None: the base's."""
    shadow_num_key_value_heads: int | None = None
    """Key-value heads of a mirrored shadow; None: the base's, at most the attention heads."""
    shadow_head_dim: int | None = None
    """Width of an attention head of a mirrored shadow; None: the base's."""
    shadow_hidden_size: int | None = None
    """Hidden width ``d_s`` of a mirrored shadow; None: the base's. Another width needs ``share_embeddings=False``."""
    shadow_init: str = "random"
    """"random"; or a mirrored shadow of the same widths starts as a copy of layers of the base: "base_layers" its first ones,
    "base_layers_spread" layers from its first to its last at equal distances."""
    projection_init: str = "random"
    """Start of ``W_p`` (Eq. 10) of an explicit shadow: "random", or "pseudo_inverse" (Eq. 12; needs the shadow's head)."""
    share_embeddings: bool | None = None
    """Feed the shadow with the base's frozen embeddings. None: yes for "mirror", no for an explicit shadow."""
    auxiliary_loss_weight: float = 0.05
    """lambda of the joint loss (Eqs. 8-9)."""
    shadow_loss: str = "ce"
    """The shadow path's training loss (second term of Eq. 8). "ce": cross-entropy of its targets. "kl": divergence from the
    attached path's own logits of the same forward pass, held fixed. "both": their sum. A position whose ``shadow_labels``
    differ from its ``labels`` has no teacher and always takes the cross-entropy, which evaluation mode reports throughout."""
    variant: str = "paper"
    """"paper", "authors" or "peft": whose mathematics; see :meth:`mathematics`."""
    refined_layers: list[int] | None = None
    """First and last base layer that is corrected; None: from the variant's first (1, or 0 for "peft") to the last."""
    own_shadow_head: bool = False
    """Language models: the shadow path has a trained LM head of its own, which starts as a copy of the base's; by default it
    reads the base's. Classifiers always have their own (Eq. 9)."""
    modules_to_save: list[str] | None = None
    """Further modules of the base to train and save in full, as in every PEFT method."""
    shadow_backbone_config: dict[str, Any] | None = field(default=None, repr=False)
    """Record: the shadow backbone's own configuration, so that an adapter can be rebuilt without its source."""
    shadow_reads_tokens: bool = False
    """Record: the layers of the shadow backbone read the tokens, so it is run from them and not from embeddings."""
    shadow_frozen: list[str] | None = None
    """Record: tensors of the shadow backbone that no gradient can reach (such as an indexer's); they are not trained."""
    base_fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    """Record: identity of the base the adapter belongs to; compared at loading."""
    base_alias: str | None = None
    """Record: the built-in alias the base was loaded by (such as ``smollm2-135m``), for other machines."""
    format_version: int = FORMAT_VERSION
    """Version of the adapter's file format."""

    def __new__(cls, *args: Any, **kwargs: Any) -> ShadowPeftConfig:
        # PEFT drops unknown keys of a file with a warning and fills missing ones with defaults; a misspelt alpha would
        # silently become 0.1 (docs/defects.md, 17 and 22). It only catches TypeError, so the check is made before __init__.
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"unknown key {quote(name)} for ShadowPeftConfig{did_you_mean(name[:99], known)}")
        if "peft_type" in kwargs:  # only a configuration file names its own type
            missing = sorted(_required_in_files() - set(kwargs))
            if missing:
                raise ConfigError(
                    f"the adapter's configuration lacks the keys {missing}; every setting of the method must be in "
                    "the file, take it from the run that made the adapter"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        task: Any = self.task_type  # type: ignore[has-type]
        if task not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_CLS):  # strings compare equal to their member
            raise ConfigError(f"task_type is {task!r}; a shadow supports CAUSAL_LM and SEQ_CLS")
        super().__post_init__()
        self.peft_type = PeftType.SHADOWPEFT  # type: ignore[attr-defined]
        # Found by the tuner for each base; an attribute, not a field, since it says nothing that a file should hold.
        self.target_modules: str | None = None
        self._loaded = self.base_fingerprint is not None
        # The weights file beside the configuration file this was read from: compared with it before anything is built.
        self.weights_file: Path | None = None
        for name, kinds in _FILE_FIELDS.items():
            value = getattr(self, name)
            if (value is not None and type(value) not in kinds) or (isinstance(value, str) and "\0" in value):
                raise ConfigError(f"{name} is {quote(value)} but must be {kinds[0].__name__} or None")
        self.task_type = None if task is None else TaskType(task)
        for name in ("r", "update_hidden_size", *_MIRROR_ONLY):
            value = getattr(self, name)
            optional = name != "r"
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} is {value!r} but must be a whole number of at least 1")
        if type(self.use_update) is not bool:
            raise ConfigError(f"use_update is {self.use_update!r} but must be True or False")
        if type(self.shadow_reads_tokens) is not bool:
            raise ConfigError(f"shadow_reads_tokens is {self.shadow_reads_tokens!r} but must be True or False")
        frozen = self.shadow_frozen
        if frozen is not None and (isinstance(frozen, str) or not _all_strings(frozen)):
            raise ConfigError(f"shadow_frozen is {frozen!r} but must be a list of parameter names")
        if type(self.own_shadow_head) is not bool or (self.own_shadow_head and self.task_type == TaskType.SEQ_CLS):
            raise ConfigError(
                f"own_shadow_head is {self.own_shadow_head!r} but must be True or False, and False for SEQ_CLS, where the "
                "shadow always has a head of its own"
            )
        layers = self.refined_layers
        if layers is not None:
            whole = isinstance(layers, (list, tuple)) and len(layers) == 2 and all(type(i) is int for i in layers)
            if not whole or not 0 <= layers[0] <= layers[1]:
                raise ConfigError(
                    f"refined_layers is {layers!r} but must be [first, last] with 0 <= first <= last, or None"
                )
            self.refined_layers = list(layers)
        if self.share_embeddings is not None and type(self.share_embeddings) is not bool:
            raise ConfigError(f"share_embeddings is {self.share_embeddings!r} but must be True, False or None")
        saved = self.modules_to_save
        if saved is not None and (isinstance(saved, str) or not _all_strings(saved)):
            raise ConfigError(f"modules_to_save is {saved!r} but must be a list of module names")
        if not isinstance(self.shadow_dropout, (int, float)) or not 0 <= self.shadow_dropout < 1:
            raise ConfigError(f"shadow_dropout is {self.shadow_dropout!r} but must be in [0, 1)")
        if not isinstance(self.shadow_alpha, (int, float)) or not 0 < abs(self.shadow_alpha) < 1e6:
            raise ConfigError(f"shadow_alpha is {self.shadow_alpha!r} but must be a finite number other than 0")
        if not isinstance(self.auxiliary_loss_weight, (int, float)) or not 0 <= self.auxiliary_loss_weight < 1e9:
            raise ConfigError(f"auxiliary_loss_weight is {self.auxiliary_loss_weight!r} but must be finite and >= 0")
        for name, allowed in (
            ("variant", VARIANTS),
            ("shadow_init", SHADOW_INITS),
            ("projection_init", PROJECTION_INITS),
            ("shadow_loss", SHADOW_LOSSES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r} but must be one of {', '.join(allowed)}")
        if self.shadow_loss != "ce" and self.task_type == TaskType.SEQ_CLS:
            raise ConfigError(
                f"shadow_loss is {self.shadow_loss!r} but a classifier's shadow has classes to learn and no teacher; use 'ce'"
            )
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"the adapter has format version {self.format_version}, this shadowpeft reads {FORMAT_VERSION}; "
                "upgrade shadowpeft or convert the adapter"
            )
        if not isinstance(self.shadow_model, (str, nn.Module)):
            raise ConfigError(f"shadow_model is {type(self.shadow_model).__name__} but must be a string or a module")
        if not self.is_mirror:
            given = [name for name in (*_MIRROR_ONLY,) if getattr(self, name) is not None]
            if given:
                raise ConfigError(
                    f"{', '.join(given)} shape a mirrored shadow, but shadow_model is given and brings its own shape; "
                    "remove one of the two"
                )
            if self.shadow_init != "random":
                raise ConfigError(
                    f"shadow_init='{self.shadow_init}' fills a mirrored shadow, but shadow_model is given; remove one of them"
                )
        elif self.projection_init != "random":
            raise ConfigError("projection_init='pseudo_inverse' needs an explicit shadow_model with an LM head")
        if self.copies_layers:
            given = [n for n in _MIRROR_ONLY[1:] if getattr(self, n) is not None]
            if given:
                raise ConfigError(
                    f"shadow_init='{self.shadow_init}' copies layers of the base's own widths, but {', '.join(given)} is set; "
                    "remove one of them"
                )

    @classmethod
    def preset(cls, name: str, **given: Any) -> ShadowPeftConfig:
        """A configuration with the settings of a preset, "paper" or "tuned", and ``given`` laid over them.

        Raises:
            ConfigError: if there is no such preset, or ``given`` is impossible.
        """
        return cls(**preset(name, **given))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The configuration in a folder or on the Hub.

        A folder that holds weights is an adapter, and all of it is judged as :func:`shadowpeft.load` does; one that holds a
        configuration alone is a template.

        Raises:
            AdapterFileError: if the file is damaged, or the weights are not safetensors.
            ConfigError: if a key is unknown, missing or impossible.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        weights = any(folder.glob("adapter_model*")) if folder.is_dir() else False
        if not weights or not (folder / CONFIG).is_file():
            found = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
            if folder.is_dir() and getattr(found, "_loaded", False):  # it names its base, so a run has made weights
                raise AdapterFileError(f"'{folder}' has no {WEIGHTS}; give the folder that save_pretrained wrote")
            return found
        if not (folder / WEIGHTS).is_file():
            raise AdapterFileError(
                f"'{folder}' has no {WEIGHTS}; weights are read from safetensors files only, never pickle"
            )
        config = config_from_file(folder / CONFIG)
        config.weights_file = folder / WEIGHTS
        return config

    @property
    def is_mirror(self) -> bool:
        """Whether the shadow is built from the base's own configuration."""
        return isinstance(self.shadow_model, str) and self.shadow_model == "mirror"

    @property
    def is_recorded(self) -> bool:
        """Whether the configuration comes from an adapter's file, which records the shadow backbone's own configuration."""
        return self._loaded and self.shadow_backbone_config is not None

    @property
    def copies_layers(self) -> bool:
        """Whether the shadow starts as a copy of layers of the base."""
        return self.shadow_init != "random"

    @property
    def shares_embeddings(self) -> bool:
        """Whether the base's frozen embeddings feed the shadow."""
        return self.is_mirror if self.share_embeddings is None else self.share_embeddings

    @property
    def update_width(self) -> int:
        """``m``."""
        return self.r if self.update_hidden_size is None else self.update_hidden_size

    def mathematics(self) -> dict[str, Any]:
        """The variant's named differences: refined layers, activation, biases, norm, places of dropout, start."""
        named = dict(_VARIANT_FIELDS[self.variant])
        if self.refined_layers is not None:
            named["first_refined_layer"] = self.refined_layers[0]
        return named

    def refined(self, num_layers: int) -> range:
        """The indices of the refined layers of a base with ``num_layers`` layers.

        Raises:
            ConfigError: if the base has no such layers.
        """
        first = self.mathematics()["first_refined_layer"]
        last = num_layers - 1 if self.refined_layers is None else self.refined_layers[1]
        if last >= num_layers:
            raise ConfigError(f"refined_layers is {self.refined_layers} but the base has layers 0 to {num_layers - 1}")
        return range(first, last + 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; a module given as ``shadow_model`` becomes its name, since the adapter holds its weights."""
        module = self.shadow_model if isinstance(self.shadow_model, nn.Module) else None
        if module is None:
            return asdict(self)
        self.shadow_model = getattr(module, "name_or_path", "") or "custom"
        try:
            return asdict(self)
        finally:
            self.shadow_model = module


_FILE_FIELDS: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "base_alias": (str,),
    "peft_version": (str,),
    "inference_mode": (bool,),
    "auto_mapping": (dict,),
}
"""Fields that PEFT or a loader hands on to others, and what they may be."""


def config_from_file(path: Path) -> ShadowPeftConfig:
    """The configuration in the file of a saved adapter, every key checked.

    Raises:
        AdapterFileError: if the file is damaged or another method's.
        ConfigError: if a key is unknown, missing or impossible.
    """
    content = read_json(path)
    kind = content.get("peft_type")
    if kind != "SHADOWPEFT":
        raise AdapterFileError(f"{path} is a {quote(kind)} adapter; this package reads SHADOWPEFT adapters")
    for record in ("shadow_backbone_config", "base_fingerprint"):
        if record in content and not isinstance(content[record], dict):
            raise AdapterFileError(
                f"{path} has {record} = {quote(content[record])} but every saved adapter has an object there"
            )
    try:
        return ShadowPeftConfig(**content)
    except ConfigError as error:
        raise type(error)(f"{path}: {shorten(error, 600)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} has a value of the wrong type ({shorten(error)})") from error


def _all_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)


def _required_in_files() -> set[str]:
    own = {f.name for f in fields(ShadowPeftConfig)} - {f.name for f in fields(PeftConfig)}
    return (own | {"task_type"}) - {
        "base_alias",
        "own_shadow_head",
        "refined_layers",
        "shadow_frozen",
        "shadow_loss",
        "shadow_reads_tokens",
    }
