"""What a spec file may say, checked before anything runs, and the cells it stands for."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shadowpeft.errors import ConfigError
from shadowpeft.train.config import RunLoader, ShadowSection, TrainingSection

ROOT = Path(__file__).parents[1]
NEWEST = (
    "target_minutes",
    "optimizer",
    "neftune",
    "compile",
    "patience",
    "load_best",
    "best_by",
    "data_seed",
)
_LATER = ("shadow_epochs", "cache_activations", "freeze_shadow", *NEWEST)
"""Settings of training that came after the first records: at their defaults they change no cell."""
SPECS = ROOT / "experiments" / "specs"
RECORDS = ROOT / "experiments" / "records"
KINDS = ("table1", "ablation", "ood", "scaling", "latency", "system")


MODES = {"shadow": ("attached", "detached"), "lora": ("lora",), "dora": ("dora",), "base": ("base",)}
"""How the result of each method can be run."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Rates(_Strict):
    """How the learning rate of a cell is chosen: by the same grid for every method, or by another spec's record."""

    grid: list[float] | None = None
    budget_share: float = Field(default=0.25, gt=0, le=1)
    """Share of the cell's own budget that a trial trains for."""
    seed: int = 0
    split: str = "validation"
    rows: int | None = Field(default=None, ge=1)
    """Rows of the split that a trial is judged on; None: all."""
    by: Literal["score", "loss"] | None = None
    """What is compared: the task's score, or the cross-entropy per answer token; None: score for "classify", else loss."""
    source: str | None = Field(default=None, alias="from")
    """A spec whose rate records are used."""
    method: str | None = None
    """With ``from``: the method whose rate is taken; None: the one of the same name."""

    @model_validator(mode="after")
    def _one(self) -> Rates:
        if (self.grid is None) == (self.source is None):
            raise ValueError("rates needs either a grid or the spec it comes 'from'")
        return self


class Evaluation(_Strict):
    """One evaluation of a trained cell."""

    task: str | None = None
    """None: the task it was trained on."""
    how: Literal["generate", "likelihood", "classify"] | None = None
    """None: as the task's kind says."""
    split: str = "test"
    shots: int = Field(default=0, ge=0)
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)


class Method(_Strict):
    """An adapter, or the bare base."""

    method: Literal["shadow", "lora", "dora", "base"] = "shadow"
    like: str | None = None
    """Another method of this spec: everything that is not said here is as there, on every task."""
    fields: dict[str, Any] = Field(default_factory=dict)
    match: str | None = None
    """The method of this spec whose trainable parameters are matched."""
    tasks: list[str] | None = None
    """None: all."""
    train: dict[str, Any] = Field(default_factory=dict)
    rates: dict[str, Any] | None = None
    """Over the spec's; ``{fixed: true}``: none, ``train.learning_rate`` is given."""
    label: str | None = None
    """Name in tables; None: its key."""


class TaskPart(_Strict):
    """One task of a spec, with what differs from the spec's defaults."""

    train: dict[str, Any] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    rates: dict[str, Any] | None = None
    seeds: list[int] | None = None
    evaluate: list[Evaluation] = Field(default_factory=lambda: [Evaluation()])


class Latency(_Strict):
    """How decoding is timed: alternating with the bare base in one process."""

    new_tokens: int = Field(default=8, ge=1)
    repeats: int = Field(default=20, ge=1)
    warmup: int = Field(default=3, ge=0)


class Spec(_Strict):
    """One table or figure at one scale."""

    name: str = Field(pattern=r"^[a-z0-9.-]+$")
    title: str
    kind: Literal["table1", "ablation", "ood", "scaling", "latency", "system"]
    base: str
    note: str = ""
    """What a reader must know: what is reduced, what stands in for what."""
    paper: str | None = None
    """The model of the paper's rows (``paper.yaml``) that stand beside ours."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    train: dict[str, Any] = Field(default_factory=dict)
    rates: dict[str, Any] | None = None
    methods: dict[str, Method]
    tasks: dict[str, TaskPart]
    latency: Latency = Field(default_factory=Latency)


_EITHER = (("tokens", "epochs", "max_steps"), ("grid", "from"))
"""Keys of which one replaces the others."""
_UNCOUNTED = ("shadow_alpha", "shadow_dropout", "shadow_init", "projection_init", "auxiliary_loss_weight")
"""Fields of a shadow that change no number of parameters: a budget that is matched to it does not depend on them."""


@dataclass(frozen=True)
class Cell:
    """One number's worth of work, completely described: nothing else decides what it computes."""

    spec: str
    kind: str
    base: str
    precision: str
    task: str
    name: str
    """The method's key in the spec."""
    method: str
    fields: dict[str, Any]
    match: dict[str, Any] | None
    """Fields of the shadow whose parameters are matched."""
    seed: int
    tokens: int | None
    """Budget in training tokens; None: ``train`` holds epochs or steps."""
    max_length: int
    shots: int
    shadow_row_repeats: int
    """How often an epoch shows rows that only the shadow path learns."""
    train: dict[str, Any]
    rates: dict[str, Any] | None
    evaluate: list[dict[str, Any]]
    latency: dict[str, Any] | None

    @property
    def id(self) -> str:
        """Name of the cell's record."""
        return f"{self.task}-{self.name}-s{self.seed}"

    @property
    def rate_id(self) -> str:
        """Name of the record of its learning rate."""
        return f"{self.task}-{self.name}-rate"

    def settings(self) -> dict[str, Any]:
        """Everything above, for the record."""
        return asdict(self)

    def digest(self) -> str:
        """sha256 of the settings: a record of other settings is not this cell's."""
        return digest(self.settings())


def digest(content: Any) -> str:
    """sha256 of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def names(folder: Path = SPECS) -> list[str]:
    """The specs there are."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_spec(name: str, folder: Path = SPECS) -> Spec:
    """A checked spec.

    Raises:
        ConfigError: if there is none of that name, or it says something impossible.
    """
    content = _read(name, folder, ())
    try:
        spec = Spec.model_validate(content)
    except ValidationError as error:
        parts = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'the spec'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"spec '{name}' is not valid: {parts}") from error
    if spec.name != name:
        raise ConfigError(f"spec file '{name}.yaml' names itself '{spec.name}'; give both the same name")
    cells(spec)
    return spec


def _read(name: str, folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"there is no spec '{name}'; there are {', '.join(names(folder)) or 'none'}")
    if name in seen:
        raise ConfigError(f"spec '{name}' extends itself ({' -> '.join([*seen, name])}); remove one 'extends'")
    try:
        content = yaml.load(
            file.read_text(encoding="utf-8"), Loader=RunLoader
        )  # a SafeLoader that reads 1e-3 as a number
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML ({getattr(error, 'problem', error)}); correct it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__} but must be a mapping")
    parent = content.pop("extends", None)
    return content if parent is None else merge(_read(str(parent), folder, (*seen, name)), content)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, key by key; null takes a key away; of some keys one replaces another."""
    merged = copy.deepcopy(below)
    for group in _EITHER:
        if any(above.get(key) is not None for key in group):
            for key in group:
                merged.pop(key, None)
    for key, value in above.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def cells(spec: Spec) -> list[Cell]:
    """Every cell of a spec, in the order in which it is run: task by task, seed by seed, method by method.

    Raises:
        ConfigError: if a cell has no budget, no learning rate or two of either, or matches a method that is not there.
    """
    all_cells = []
    for task, part in spec.tasks.items():
        unknown = set(part.methods) - set(spec.methods)
        if unknown:
            raise ConfigError(
                f"{spec.name}: task '{task}' changes the method '{min(unknown)}', which is not in 'methods'"
            )
        seeds = part.seeds or spec.seeds
        for seed in seeds:
            for name, method in spec.methods.items():
                if method.method == "base" and seed != seeds[0]:
                    continue  # nothing about the bare base is drawn
                if method.tasks is None or task in method.tasks:
                    all_cells.append(_cell(spec, task, part, name, method, seed))
    return all_cells


def _layers(spec: Spec, part: TaskPart, name: str, key: str) -> list[dict[str, Any]]:
    """What a spec says of a method's ``fields``, ``train`` or ``rates`` on a task, the general before the special."""
    method = spec.methods[name]
    below = _layers(spec, part, method.like, key) if method.like is not None else []
    layers = [*below, getattr(method, key), part.methods.get(name, {}).get(key)]
    return [layer for layer in layers if layer is not None]


def _merged(layers: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    return merged


def _cell(spec: Spec, task: str, part: TaskPart, name: str, method: Method, seed: int) -> Cell:
    if method.like is not None and (method.like not in spec.methods or spec.methods[method.like].like is not None):
        raise ConfigError(
            f"{spec.name}: '{name}' is like '{method.like}', which must be a method of this spec and like no other"
        )
    where = f"{spec.name}, cell {task}-{name}-s{seed}"
    own = part.methods.get(name, {})
    unknown = set(own) - {"fields", "train", "rates"}
    if unknown:
        raise ConfigError(f"{where}: a task may change fields, train and rates of a method, not '{min(unknown)}'")
    train = _merged([spec.train, part.train, *_layers(spec, part, name, "train")])
    rates: dict[str, Any] | None = None
    for layer in [x for x in (spec.rates, part.rates, *_layers(spec, part, name, "rates")) if x is not None]:
        rates = None if layer.get("fixed") is True else merge(rates or {}, layer)
    untrained = method.method == "base" or spec.kind == "latency"
    fields = _merged(_layers(spec, part, name, "fields"))
    match = None
    try:
        if method.method == "shadow":
            ShadowSection.model_validate(fields)
        if method.match is not None:
            other = spec.methods.get(method.match)
            if other is None or other.method != "shadow" or method.method not in ("lora", "dora"):
                raise ConfigError(
                    f"{where}: match names '{method.match}', but LoRA and DoRA match a shadow of the same spec"
                )
            match = _merged(_layers(spec, part, method.match, "fields"))
            match = {key: value for key, value in match.items() if key not in _UNCOUNTED}
        tokens, max_length, shots = train.pop("tokens", None), train.pop("max_length", 512), train.pop("shots", 0)
        repeats = train.pop("shadow_row_repeats", 1)
        if untrained:
            train, rates, tokens = {}, None, None
        else:
            if sum(unit is not None for unit in (tokens, train.get("epochs"), train.get("max_steps"))) != 1:
                raise ConfigError(f"{where} needs exactly one budget: train.tokens, train.epochs or train.max_steps")
            if (rates is None) == ("learning_rate" not in train):
                raise ConfigError(f"{where} needs either rates or a train.learning_rate")
            rates = None if rates is None else Rates.model_validate(rates).model_dump(by_alias=True)
            train = TrainingSection.model_validate({**train, "seed": seed, "precision": spec.precision}).model_dump()
            usual = TrainingSection().model_dump()
            train = {k: v for k, v in train.items() if k not in _LATER or v != usual[k]}
            if tokens is not None:
                train["epochs"] = None
            if rates is not None:
                train["learning_rate"] = None
    except ValidationError as error:
        parts = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{where}: {parts}") from error
    return Cell(
        spec=spec.name,
        kind=spec.kind,
        base=spec.base,
        precision=spec.precision,
        task=task,
        name=name,
        method=method.method,
        fields=fields,
        match=match,
        seed=seed,
        tokens=tokens,
        max_length=max_length,
        shots=shots,
        shadow_row_repeats=repeats,
        train=train,
        rates=rates,
        evaluate=[{**e.model_dump(), "task": e.task or task} for e in part.evaluate],
        latency=spec.latency.model_dump() if spec.kind == "latency" else None,
    )


def evaluation_name(options: dict[str, Any], mode: str) -> str:
    """Key of an evaluation in a record: task, mode, and what is not the usual."""
    extra = [] if options.get("how") is None else [options["how"]]
    extra += [f"{options['shots']}shot"] if options.get("shots") else []
    return "-".join([options["task"], mode, *extra])
