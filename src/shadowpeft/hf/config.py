"""The adapter's configuration: :class:`ShadowPeftConfig`, a PEFT config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from peft import PeftConfig
from peft.utils import PeftType, TaskType
from pydantic import AfterValidator, ValidationError, create_model
from safetensors.torch import save_file
from torch import nn

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.files.digests import KEY, tensors_sha256
from shadowpeft.hf.files.locate import CONFIG, WEIGHTS
from shadowpeft.hf.files.reading import read_json
from shadowpeft.messages import did_you_mean, quote, shorten
from shadowpeft.presets import preset
from shadowpeft.settings import STRICT, VARIANTS, Names, ShadowSettings, Variant, explain

FORMAT_VERSION = 1


def _check_ends(layers: list[int]) -> list[int]:
    if len(layers) != 2 or not 0 <= layers[0] <= layers[1]:
        raise ValueError("must be [first, last] with 0 <= first <= last")
    return layers


@dataclass
class ShadowPeftConfig(ShadowSettings, PeftConfig):
    """Configuration of a shadow adapter. Impossible combinations raise :class:`~shadowpeft.errors.ConfigError` here.

    The settings of the method are those of :class:`~shadowpeft.settings.ShadowSettings`, each documented there. The fields
    below are what a run file does not set: rarer choices, and records that saving fills in.
    """

    refined_layers: Annotated[list[int], AfterValidator(_check_ends)] | None = None
    """First and last base layer that is corrected; None: from the variant's first (1, or 0 for "peft") to the last."""
    own_shadow_head: bool = False
    """Language models: the shadow path has a trained LM head of its own, which starts as a copy of the base's; by default it
    reads the base's. Classifiers always have their own (Eq. 9)."""
    modules_to_save: Names | None = None
    """Further modules of the base to train and save in full, as in every PEFT method."""
    shadow_backbone_config: dict[str, Any] | None = field(default=None, repr=False)
    """Record: the shadow backbone's own configuration, so that an adapter can be rebuilt without its source."""
    shadow_reads_tokens: bool = False
    """Record: the layers of the shadow backbone read the tokens, so it is run from them and not from embeddings."""
    shadow_frozen: Names | None = None
    """Record: tensors of the shadow backbone that no gradient can reach (such as an indexer's); they are not trained."""
    base_fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    """Record: identity of the base the adapter belongs to; compared at loading."""
    base_alias: str | None = None
    """Record: the built-in alias the base was loaded by (such as ``smollm2-135m``), for other machines."""
    trained_ends: list[int] | None = None
    """Record: the tokens that ended an answer in training; a detached model stops at them."""
    draft_tokens: list[int] | None = field(default=None, repr=False)
    """Record: the most frequent tokens of the answers in training; those that speculative decoding drafts."""
    system_message: str | None = field(default=None, repr=False)
    """Record: the system message of the rows in training that brought none."""
    shadow_answers: Literal["action"] | None = None
    """Record: ``action`` where the shadow learnt to answer with an action alone."""
    call_form: Literal["template"] | None = None
    """Record: ``template`` where calls of tools were learnt as the base's chat template writes them."""
    actions: Names | None = field(default=None, repr=False)
    """Record: the names of the actions or tools that a run named; None: it named none."""
    labels: Names | None = field(default=None, repr=False)
    """Record: the labels of a classifier, in the order of its classes."""
    pad_token_id: int | None = None
    """Record: the token that padded a classifier's texts; a base that has none gets it, and a detached model too."""
    weights_sha256: str | None = field(default=None, repr=False, compare=False)
    """Record in a saved adapter: digest of the weights beside it (:mod:`shadowpeft.hf.files.digests`)."""
    format_version: int = FORMAT_VERSION
    """Version of the adapter's file format."""

    def __new__(cls, *args: Any, **kwargs: Any) -> ShadowPeftConfig:
        # PEFT drops unknown keys of a file with a warning and fills missing ones with defaults; a misspelt alpha would
        # silently become 0.1 (docs/defects.md, 17 and 22). It only catches TypeError, so the check is made before __init__.
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"unknown key {quote(name)} for ShadowPeftConfig{did_you_mean(name[:99], known)}")
        if "peft_type" in kwargs and not _IN_FILES_ALONE.isdisjoint(kwargs):  # PEFT's factories name the type too
            check_complete(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        task: Any = self.task_type  # type: ignore[has-type]
        if task not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_CLS):  # strings compare equal to their member
            raise ConfigError(f"task_type is {task!r}; a shadow supports CAUSAL_LM and SEQ_CLS")
        super().__post_init__()
        if isinstance(self.peft_type, PeftType):  # type: ignore[has-type]
            # made of another configuration (dataclasses.replace, to_dict), for an adapter that is yet to be built; a file
            # names its type by a string
            self.base_fingerprint = self.shadow_backbone_config = self.shadow_frozen = None
            self.shadow_reads_tokens = False
        self.peft_type = PeftType.SHADOWPEFT  # type: ignore[attr-defined]
        # Found by the tuner for each base; an attribute, not a field, since it says nothing that a file should hold.
        self.target_modules: str | None = None
        self._loaded = self.base_fingerprint is not None
        # What the caller gave, and what a base put in its place, by field: the next base starts from what was given.
        self._noted: dict[str, tuple[Any, Any]] = {}
        # The weights file beside the configuration file this was read from: compared with it before anything is built.
        self.weights_file: Path | None = None
        if isinstance(self.refined_layers, tuple):
            self.refined_layers = list(self.refined_layers)
        try:
            _Checked.model_validate({name: getattr(self, name) for name in _Checked.model_fields})
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0])
            raise ConfigError(explain(problem, name, getattr(self, name))) from None
        for name in _STRINGS:
            if "\0" in (getattr(self, name) or ""):
                raise ConfigError(f"{name} is {quote(getattr(self, name))} but must not hold a NUL character")
        self.task_type = None if task is None else TaskType(task)
        if self.own_shadow_head and self.task_type == TaskType.SEQ_CLS:
            raise ConfigError(
                "own_shadow_head is True but a classifier's shadow always has a head of its own; leave it out"
            )
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
        if self.shadow_model == "":
            raise ConfigError("shadow_model is empty; name a folder or Hub id, or leave it out for a copy of the base's kind")
        conflict = self.conflict()
        if conflict is not None:
            raise ConfigError(conflict)

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
            template = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
            if folder.is_dir() and getattr(template, "_loaded", False):  # it names its base, so a run has made weights
                raise AdapterFileError(f"'{folder}' has no {WEIGHTS}; give the folder that save_pretrained wrote")
            return template
        if not (folder / WEIGHTS).is_file():
            raise AdapterFileError(
                f"'{folder}' has no {WEIGHTS}; weights are read from safetensors files only, never pickle"
            )
        config = config_from_file(folder / CONFIG)
        config.weights_file = folder / WEIGHTS
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, with a digest of the weights that PEFT has just written beside it.

        Weights that PEFT has pickled (``safe_serialization=False``) become safetensors, with a warning: no loader of this
        package reads pickle.
        """
        folder, saved_by_peft = Path(save_directory), "auto_mapping_dict" in kwargs
        pickled, weights = folder / "adapter_model.bin", folder / WEIGHTS
        if saved_by_peft and pickled.is_file() and _changed(pickled) > _changed(weights):
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
            save_file({name: value.contiguous().clone() for name, value in tensors.items()}, weights)
            pickled.unlink()
            warnings.warn(
                f"safe_serialization=False asks for pickle, which no loader of an adapter reads; {weights} was written instead",
                stacklevel=2,
            )
        # transformers writes the configuration before the weights, and a user writes it alone: then the file beside it, if
        # any, is of an earlier save
        self.weights_sha256 = tensors_sha256(weights) if saved_by_peft and weights.is_file() else None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.weights_sha256 = None

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

    @property
    def mathematics(self) -> Variant:
        """The variant's named differences: refined layers, activation, biases, norms, gate, places of dropout, start."""
        variant = VARIANTS[self.variant]
        return variant if self.refined_layers is None else replace(variant, first_refined_layer=self.refined_layers[0])

    def refined(self, num_layers: int) -> range:
        """The indices of the refined layers of a base with ``num_layers`` layers.

        Raises:
            ConfigError: if the base has no such layers.
        """
        first = self.mathematics.first_refined_layer
        last = num_layers - 1 if self.refined_layers is None else self.refined_layers[1]
        if last >= num_layers:
            raise ConfigError(f"refined_layers is {self.refined_layers} but the base has layers 0 to {num_layers - 1}")
        return range(first, last + 1)

    def note_classes(self, base: Any) -> None:
        """Record the labels and the pad token of a classifier's configuration; it gets the recorded one if it has none."""
        self.note("labels", self.labels or [base.id2label[i] for i in range(len(base.id2label))])
        if getattr(base, "pad_token_id", None) is None:
            base.pad_token_id = self.pad_token_id
        elif self.pad_token_id is None:
            self.note("pad_token_id", base.pad_token_id)

    def note(self, name: str, value: Any) -> None:
        """Put what is found in a base, or in its training, into a field."""
        given, (before, noted) = getattr(self, name), self._noted.get(name, (None, None))
        setattr(self, name, value)
        self._noted[name] = (before if name in self._noted and given == noted else given, value)

    def as_given(self) -> None:
        """Forget what was noted of an earlier base; what the caller has changed since stays."""
        for name, (given, noted) in self._noted.items():
            if getattr(self, name) == noted:
                setattr(self, name, given)
        self._noted = {}

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


_STRINGS = ("base_model_name_or_path", "revision", "base_alias", "peft_version")
"""Fields that PEFT or a loader hands on to others."""
_TYPES: dict[str, Any] = {
    name: (hint, ...)
    for name, hint in get_type_hints(ShadowPeftConfig, include_extras=True).items()
    if name in {f.name for f in fields(ShadowPeftConfig)} - {"task_type", "peft_type"}
}
_Checked: Any = create_model("_Checked", __config__=STRICT, **_TYPES)
"""Types and bounds of all fields, for pydantic."""


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
        config = ShadowPeftConfig(**content)  # a misspelt key says more than a missing one
        check_complete(content)
    except ConfigError as error:
        raise type(error)(f"{path}: {shorten(error, 600)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} has a value of the wrong type ({shorten(error)})") from error
    return config


_IN_FILES_ALONE = frozenset(("peft_version", "auto_mapping", "format_version", "base_fingerprint"))
"""Keys that every saved file has and nobody types."""


def check_complete(content: Mapping[str, Any]) -> None:
    """Refuse a configuration file that lacks a setting, which would be filled with a default.

    Raises:
        ConfigError: naming the keys.
    """
    missing = sorted(_required_in_files() - set(content))
    if missing:
        raise ConfigError(
            f"the adapter's configuration lacks the keys {missing}; every setting of the method must be in the file, take it "
            "from the run that made the adapter"
        )


def _required_in_files() -> set[str]:
    own = {f.name for f in fields(ShadowPeftConfig)} - {f.name for f in fields(PeftConfig)}
    return (own | {"task_type"}) - {
        "actions",
        "base_alias",
        "call_form",
        "draft_tokens",
        "labels",
        "own_shadow_head",
        "pad_token_id",
        "refined_layers",
        "shadow_answers",
        "shadow_frozen",
        "shadow_loss",
        "shadow_reads_tokens",
        "system_message",
        "trained_ends",
        KEY,
    }


def _changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0
