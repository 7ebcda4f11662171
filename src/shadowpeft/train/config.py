"""A run as one YAML file, checked before anything loads: unknown keys, wrong types and impossible combinations."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from shadowpeft.errors import ConfigError
from shadowpeft.messages import did_you_mean, quote
from shadowpeft.presets import PRESETS, TRAINING, preset
from shadowpeft.settings import STRICT, VARIANTS, Count, ShadowSettings, explain

Run = TypeVar("Run", bound=BaseModel)
PACKAGED = ("robot", "robot_tools")
"""Sets of rows that come with this package."""


class StrictSection(BaseModel):
    """A part of a run file."""

    model_config = STRICT


class DataConfig(StrictSection):
    """Which rows to train and to evaluate on."""

    train: str
    """A JSONL file, or a packaged set: ``robot`` (intents), ``robot_tools`` (actions with arguments)."""
    validation: str | None = None
    """A JSONL file; None: no evaluation during training (a packaged set brings its own)."""
    tools: str | None = None
    """File of the tools that rows call (docs/tools.md); None: rows bring their own, for a chat template that writes them."""
    max_length: int = Field(default=512, ge=8)
    """Longest sequence in tokens."""
    too_long: Literal["error", "skip"] = "error"
    """What happens to longer rows."""
    system: str | None = None
    """System message for rows that bring none."""
    shadow_answers: Literal["whole", "action"] | None = None
    """What the shadow path learns of an answer: "whole", or "action": the action it starts with, ``[REMOTE]`` where it starts
    with none. null: "action" for a packaged set, else "whole"."""
    shadow_repeats: int = Field(default=0, ge=0)
    """How many more times an epoch shows the shadow path its rows, without the base: epochs that cost almost nothing."""

    @property
    def learns_actions(self) -> bool:
        """Whether the shadow path learns actions alone."""
        return learns_actions({"train": self.train, "shadow_answers": self.shadow_answers})


def learns_actions(data: dict[str, Any]) -> bool:
    """Whether the shadow path of a run with this section ``data`` learns actions alone."""
    answers = data.get("shadow_answers")
    return bool(data.get("train") in PACKAGED if answers is None else answers == "action")


class ShadowSection(StrictSection, ShadowSettings):
    """The fields of ``ShadowPeftConfig`` that a run may set. What is not set comes from ``preset``."""

    preset: Literal["tuned", "paper", "device"] = "tuned"
    shadow_model: str = "mirror"
    last_layers: Count | None = None
    """How many of the base's last layers are corrected; None: all that the variant corrects."""

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            return content
        name = content.get("preset", "tuned")
        # another name is refused by its type
        return preset(name, **content) if isinstance(name, str) and name in PRESETS else content

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of ``ShadowPeftConfig`` that do not depend on the base."""
        return self.model_dump(exclude={"preset", "last_layers"})

    def fields_for(self, num_layers: int) -> dict[str, Any]:
        """The fields of ``ShadowPeftConfig`` for a base with ``num_layers`` layers.

        Raises:
            ConfigError: if it has fewer layers to correct than ``last_layers``.
        """
        if self.last_layers is None:
            return self.fields
        first = VARIANTS[self.variant].first_refined_layer
        if self.last_layers > num_layers - first:
            raise ConfigError(
                f"shadow.last_layers is {self.last_layers} but the base has {num_layers} layers, of which the variant "
                f"'{self.variant}' corrects {num_layers - first}; give at most {num_layers - first}"
            )
        return {**self.fields, "refined_layers": [num_layers - self.last_layers, num_layers - 1]}

    @model_validator(mode="after")
    def _possible(self) -> ShadowSection:
        conflict = self.conflict("shadow.")
        if conflict is not None:
            raise ValueError(conflict)
        return self


class OptimisationSection(StrictSection):
    """What every kind of run says of its optimisation, evaluation and saving."""

    max_steps: Count | None = None
    gradient_accumulation: Count = 1
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.01, ge=0)
    """Share of the steps (below 1) or their number."""
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_checkpointing: bool = False
    eval_every: Count | None = None
    save_every: Count | None = None
    keep_checkpoints: Count = 2
    log_every: Count = 10
    seed: int = 0
    threads: Count | None = None
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)


class TrainingSection(OptimisationSection):
    """Optimisation, evaluation and saving of a fine-tuning run."""

    epochs: float | None = Field(default=None, gt=0)
    shadow_epochs: int = Field(default=0, ge=0)
    """Epochs of the shadow path alone, without the base, before both paths train. ``max_steps`` counts their steps too."""
    batch_size: Count = 16
    eval_batch_size: Count = 16
    backbone_lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the shadow backbone, as a multiple of ``learning_rate``."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: float = Field(default=1.0, ge=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the frozen base; trainable weights are float32 always, and 16-bit runs use autocast."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    group_by_length: bool = True
    cache_activations: bool | str = False
    """Store what the base computes below ``shadow.last_layers`` once: in the run's folder, or in the folder named here."""
    freeze_shadow: bool = False
    """Train the injections and updates only; with ``cache_activations`` the shadow's states are stored too."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both set; keep one")
        if self.epochs is None and self.max_steps is None:
            self.epochs = 1.0
        if self.shadow_epochs and not self.group_by_length:
            raise ValueError(
                "shadow_epochs is set and group_by_length is off, but its sampler keeps the order; leave it on"
            )
        return self


class RunConfig(StrictSection):
    """One fine-tuning run."""

    base: str
    """Alias (``smollm2-135m``), folder or Hub id."""
    data: DataConfig
    shadow: ShadowSection = Field(default_factory=lambda: ShadowSection.model_validate({}))
    training: TrainingSection = Field(default_factory=TrainingSection)
    output: str = "runs/run"
    """Folder of the run."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id (owner/name) the adapter is uploaded to when the run has ended, with its model card; private if it is new."""

    @model_validator(mode="before")
    @classmethod
    def _of_its_preset(cls, content: Any) -> Any:
        """A run that teaches the device actions starts from the preset "device", and any run takes its preset's training."""
        if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
            return content
        shadow, training = content.get("shadow", {}), content.get("training", {})
        if not isinstance(shadow, dict) or not isinstance(training, dict):
            return content
        if "preset" not in shadow and learns_actions(content["data"]):
            shadow = {"preset": "device", **shadow}
        usual = TRAINING.get(name, {}) if isinstance(name := shadow.get("preset", "tuned"), str) else {}
        if training.get("freeze_shadow"):  # it has no epochs of its own
            usual = {key: value for key, value in usual.items() if key != "shadow_epochs"}
        return {**content, "shadow": shadow, "training": {**usual, **training}}

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.training.eval_every is not None and self.data.validation is None and self.data.train not in PACKAGED:
            raise ValueError("training.eval_every is set but data.validation is not; set both or neither")
        if self.training.cache_activations and self.shadow.last_layers is None:
            raise ValueError(
                "training.cache_activations is set but shadow.last_layers is not, so the base's layers are corrected from the "
                "first on; set both or neither"
            )
        if self.training.freeze_shadow and self.data.shadow_repeats:
            raise ValueError(
                "training.freeze_shadow and data.shadow_repeats are both set, but a frozen shadow learns nothing; keep one"
            )
        if self.training.freeze_shadow and self.training.shadow_epochs:
            raise ValueError(
                "training.freeze_shadow and training.shadow_epochs are both set, but a frozen shadow learns nothing; keep one"
            )
        if self.shadow.shadow_loss != "ce" and self.training.label_smoothing:
            raise ValueError(
                f"shadow.shadow_loss is {self.shadow.shadow_loss} and training.label_smoothing is set; set one of them, since "
                "a smoothed loss takes the labels away that tell which positions have a teacher"
            )
        return self


def parse_run(content: Any, where: str) -> RunConfig:
    """Check the content of a run file.

    Raises:
        ConfigError: naming the key, what it was, what it must be, and the nearest known key.
    """
    return parse(content, where, RunConfig, _SECTIONS, "'base' and 'data'")


def parse(content: Any, where: str, kind: type[Run], sections: dict[str, type[BaseModel]], needed: str) -> Run:
    """Check the content of a file of runs of a ``kind``; ``needed`` names what such a file must at least hold.

    Raises:
        ConfigError: naming the key, what it was, what it must be, and the nearest known key.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds a {type(content).__name__} but must be a mapping with {needed}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {problems_in(error, kind, sections)}") from error


def read_run(path: str | Path, settings: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file (YAML, safe subset), with some settings laid over it (:func:`overridden`).

    Raises:
        ConfigError: if it is missing, not YAML, or describes no possible run.
    """
    return parse_run(overridden(read_yaml(path), settings), " ".join([str(path), *settings]))


def overridden(content: Any, settings: Sequence[str]) -> Any:
    """The content of a run file with settings such as ``training.learning_rate=1e-3`` in the place of its own.

    Raises:
        ConfigError: if one is not ``KEY=VALUE``, or leads through something that has no keys.
    """
    content = copy.deepcopy(content)
    for setting in settings:
        name, equals, value = setting.partition("=")
        *sections, key = name.split(".")
        if not (equals and key and all(sections)):
            raise ConfigError(f"{quote(setting)} is no setting; write KEY=VALUE, such as training.epochs=2")
        place = content
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigError(f"{quote(name)} leads through something that has no keys; see the run file")
        try:
            place[key] = yaml.load(value, Loader=RunLoader)
        except yaml.YAMLError:
            raise ConfigError(f"{quote(value)} is no value for '{name}'; quote it as YAML does") from None
    return content


def read_yaml(path: str | Path) -> Any:
    """The content of a run file of any kind.

    Raises:
        ConfigError: if it is missing or not YAML.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"run file '{file}' does not exist; check the path")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=RunLoader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f", line {line + 1}" if line is not None else ""
        raise ConfigError(
            f"{file}{place} is not valid YAML ({getattr(error, 'problem', error)}); correct it"
        ) from error


class RunLoader(yaml.SafeLoader):
    """The safe subset of YAML with two corrections: ``1e-3`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants a point in a float; people write 1e-3
RunLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


_SECTIONS: dict[str, type[BaseModel]] = {"data": DataConfig, "shadow": ShadowSection, "training": TrainingSection}


def problems_in(error: ValidationError, whole: type[BaseModel], sections: dict[str, type[BaseModel]]) -> str:
    """What is wrong with a run file, in words; unknown keys get the nearest known one of ``whole`` or its ``sections``."""
    parts = []
    for problem in error.errors():
        place, key = ".".join(map(str, problem["loc"])) or "the run", problem["loc"][-1] if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            section = next((sections[str(p)] for p in reversed(problem["loc"][:-1]) if str(p) in sections), whole)
            known = list(section.model_fields)
            elsewhere = [
                f" (did you mean '{name}.{key}'?)" for name, kind in sections.items() if key in kind.model_fields
            ]
            hint = elsewhere[0] if elsewhere else did_you_mean(str(key), known)
            parts.append(f"unknown key '{place}'" + (hint or f"; known keys: {', '.join(known)}"))
        elif problem["type"] == "missing":
            parts.append(f"key '{place}' is missing")
        elif problem["type"] == "value_error":
            parts.append(str(problem["ctx"]["error"]))
        else:
            parts.append(explain(problem, f"'{place}'", problem["input"]))
    return "; ".join(parts)
