"""A run as one YAML file, checked before anything loads: unknown keys, wrong types and impossible combinations."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from shadowpeft.errors import ConfigError
from shadowpeft.messages import did_you_mean, quote
from shadowpeft.presets import TRAINING
from shadowpeft.settings import explain
from shadowpeft.train.further import filled
from shadowpeft.train.sections import (
    PACKAGED,
    DataConfig,
    ShadowSection,
    SourceSection,
    StrictSection,
    TrainingSection,
    learns_actions,
)

Run = TypeVar("Run", bound=BaseModel)


class RunConfig(StrictSection):
    """One fine-tuning run."""

    base: str
    """Alias (``smollm2-135m``), folder or Hub id; with ``adapter`` the one that it names, unless given."""
    adapter: str | None = None
    """Folder of a trained adapter to go on from. Base, task and shadow are its own; ``shadow`` may set the losses alone."""
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
    """``SEQ_CLS``: texts with a label, for a classifier."""
    data: DataConfig
    shadow: ShadowSection = Field(default_factory=lambda: ShadowSection.model_validate({}))
    training: TrainingSection = Field(default_factory=TrainingSection)
    output: str = "runs/run"
    """Folder of the run."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id (owner/name) the adapter is uploaded to when the run has ended, with its model card; private if it is new."""

    @property
    def words(self) -> str:
        """Whose tokenizer, with its chat template, the run reads and writes with."""
        saved = self.adapter is not None and (Path(self.adapter) / "tokenizer_config.json").is_file()
        return str(self.adapter) if saved else self.base

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
        if training.get("freeze_shadow"):  # it has no epochs of its own, unless the file says so
            usual = {key: value for key, value in usual.items() if key != "shadow_epochs"}
        return {**content, "shadow": shadow, "training": {**usual, **training}}

    @model_validator(mode="after")
    def _of_its_task(self) -> RunConfig:
        data, t = self.data, self.training
        if self.task_type == "SEQ_CLS":
            for key in ("system", "chat_template", "tools", "call_form", "assistant_only_loss", "packing", "shadow_answers"):
                if getattr(data, key):
                    raise ValueError(f"task_type is SEQ_CLS but data.{key} is of conversations; leave it out")
            if data.train in PACKAGED:
                raise ValueError(f"task_type is SEQ_CLS but data.train is '{data.train}', which has conversations; name a file")
            if data.streaming:
                raise ValueError("task_type is SEQ_CLS but data.streaming hides which labels there are; leave it out")
            if self.shadow.shadow_loss != "ce":
                raise ValueError(
                    f"task_type is SEQ_CLS but shadow.shadow_loss is '{self.shadow.shadow_loss}', which has no teacher there; "
                    "use 'ce'"
                )
        elif data.too_long == "cut":
            raise ValueError("data.too_long is 'cut', which takes an answer's end away; use 'skip', or task_type: SEQ_CLS")
        for key, value in (("packing", data.packing), ("streaming", data.streaming)):
            if value and t.cache_activations:
                raise ValueError(f"training.cache_activations stores plain rows that are at hand; leave it or data.{key} out")
        if data.streaming:
            if t.max_steps is None and t.target_minutes is None:
                raise ValueError(
                    "data.streaming is set, so the number of rows is not known; set training.max_steps or target_minutes"
                )
            for key in ("shadow_epochs", "freeze_shadow"):
                if getattr(t, key):
                    raise ValueError(f"data.streaming is set but training.{key} needs all rows at hand; keep one")
        return self

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.training.eval_every is not None and self.data.validation is None and self.data.train not in PACKAGED:
            raise ValueError("training.eval_every is set but data.validation is not; set both or neither")
        if self.training.cache_activations and self.shadow.last_layers is None:
            raise ValueError(
                "training.cache_activations is set but shadow.last_layers is not, so the base's layers are corrected from the "
                "first on; set both or neither"
            )
        if self.training.freeze_shadow and self.data.shadow_repeats and not self.training.shadow_epochs:
            raise ValueError(
                "training.freeze_shadow and data.shadow_repeats are both set, but a frozen shadow learns nothing; keep one, or "
                "set training.shadow_epochs, after which it is frozen"
            )
        self._trains_the_shadow()
        if self.shadow.shadow_loss != "ce" and self.training.label_smoothing:
            raise ValueError(
                f"shadow.shadow_loss is {self.shadow.shadow_loss} and training.label_smoothing is set; set one of them, since "
                "a smoothed loss takes the labels away that tell which positions have a teacher"
            )
        return self

    def _trains_the_shadow(self) -> None:
        """What is of the shadow path alone needs something that trains it."""
        t, untrained = self.training, self.shadow.auxiliary_loss_weight == 0
        alone = {"training.shadow_epochs": t.shadow_epochs, "data.shadow_repeats": self.data.shadow_repeats}
        for key, value in alone.items():
            if value and untrained:
                raise ValueError(
                    f"{key} is {value} but shadow.auxiliary_loss_weight is 0, so these rows of the shadow alone would train "
                    f"nothing; set {key} to 0, or the weight above 0"
                )
        why = "shadow.auxiliary_loss_weight is 0" if untrained else "training.freeze_shadow is set"
        compares = t.best_by == "detached" and (t.load_best or t.patience)
        if compares and (untrained or (t.freeze_shadow and not t.shadow_epochs)):
            key = "load_best" if t.load_best else "patience"
            raise ValueError(
                f"training.{key} compares the detached path (training.best_by) but {why}, so nothing trains it; set best_by: "
                "attached"
            )


def parse_run(content: Any, where: str) -> RunConfig:
    """Check the content of a run file.

    Raises:
        ConfigError: naming the key, what it was, what it must be, and the nearest known key.
    """
    content = filled(content, where) if isinstance(content, dict) else content
    return parse(content, where, RunConfig, _SECTIONS, "'base' and 'data'")


def parse(content: Any, where: str, kind: type[Run], sections: dict[str, type[BaseModel]], needed: str) -> Run:
    """Check the content of a file of runs of a ``kind``; ``needed`` names what such a file must at least hold.

    Raises:
        ConfigError: naming the key, what it was, what it must be, and the nearest known key; or the command that takes it.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds a {type(content).__name__} but must be a mapping with {needed}")
    for key, command in _COMMANDS.items():
        own = next(name for name in _COMMANDS if name in kind.model_fields)
        if key in content and key != own and own not in content:
            raise ConfigError(f"{where} has '{key}' and no '{own}', so it is a run file of another kind; give it to {command}")
    # a section of which all is commented out is None; it is as good as not there
    content = {k: v for k, v in content.items() if v is not None or k not in sections or k not in kind.model_fields}
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
            if isinstance(place, dict) and place.get(section) is None:  # not there, or all of it is commented out
                place[section] = {}
            place = place[section] if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigError(f"{quote(name)} leads through something that has no keys; see the run file")
        try:
            place[key] = yaml.load(value, Loader=RunLoader)
        except yaml.YAMLError:
            raise ConfigError(f"{quote(value)} is no value for '{name}'; quote it as YAML does") from None
    return _at_home(content)


def _at_home(content: Any) -> Any:
    """``~/`` at the beginning of a path as the user's home, at any depth; texts such as a system message stay."""
    if isinstance(content, dict):
        return {key: value if key == "system" else _at_home(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_at_home(each) for each in content]
    return os.path.expanduser(content) if isinstance(content, str) and re.match(r"~[\w.-]*/", content) else content


def read_yaml(path: str | Path) -> Any:
    """The content of a run file of any kind.

    Raises:
        ConfigError: if it is missing or not YAML.
    """
    file = Path(path)
    if file.is_dir() and (file / "config.yaml").is_file():
        raise ConfigError(f"'{file}' is the folder of a run; give its run file, or '{file / 'config.yaml'}'")
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
    """The safe subset of YAML with corrections: ``1e-3`` is a number, ``010`` is 10, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # YAML 1.1 reads 010 as 8; people mean 10, as YAML 1.2 does
        text = str(node.value).replace("_", "")
        if re.fullmatch(r"[-+]?0[0-9]+", text):
            return int(text)
        return super().construct_yaml_int(node)  # type: ignore[no-any-return, no-untyped-call]


RunLoader.add_constructor("tag:yaml.org,2002:int", RunLoader.construct_yaml_int)
# YAML 1.1, which PyYAML reads, wants a point in a float; people write 1e-3
RunLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "shadow": ShadowSection,
    "training": TrainingSection,
    "source": SourceSection,
}
_COMMANDS = {"data": "shadowpeft train, plan or data check", "backbone": "shadowpeft pretrain"}
"""The section that tells the kinds of run files apart -> what takes such a file."""
_TAGS = ("name", "source")
"""What pydantic calls the two forms of ``data.train``."""


_FORMS = {
    "SourceSection": "the name of a file, of a folder that holds several, or a mapping such as {path: rows.csv, split: train}",
    "Corpus": "a mapping such as {path: FILE}",
}
"""What a section is that is more than keys and values, by the name of its class."""


def problems_in(error: ValidationError, whole: type[BaseModel], sections: dict[str, type[BaseModel]]) -> str:
    """What is wrong with a run file, in words; unknown keys get the nearest known one of ``whole`` or its ``sections``."""
    parts = []
    for problem in error.errors():
        keys = [str(part) for i, part in enumerate(problem["loc"]) if i < 2 or part not in _TAGS]
        place, key = ".".join(keys) or "the run", problem["loc"][-1] if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            section = next((sections[str(p)] for p in reversed(problem["loc"][:-1]) if str(p) in sections), whole)
            known = list(section.model_fields)
            elsewhere = [
                f" (did you mean '{'data.train' if name == 'source' else name}.{key}'?)"
                for name, kind in sections.items()
                if key in kind.model_fields
            ]
            hint = elsewhere[0] if elsewhere else did_you_mean(str(key), known)
            parts.append(f"unknown key '{place}'" + (hint or f"; known keys: {', '.join(known)}"))
        elif problem["type"] == "missing":
            parts.append(f"key '{place}' is missing")
        elif problem["type"] == "value_error":
            parts.append(str(problem["ctx"]["error"]))
        elif problem["type"] == "model_type":
            form = _FORMS.get(problem["ctx"]["class_name"], "a section of keys and values")
            parts.append(f"'{place}' is {quote(problem['input'])} but must be {form}")
        else:
            parts.append(explain(problem, f"'{place}'", problem["input"]))
    return "; ".join(parts)
