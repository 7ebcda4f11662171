"""The sections of a run file: what each says, and what cannot stand together within it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from shadowpeft.data.sources import COLUMNS, Source
from shadowpeft.errors import ConfigError
from shadowpeft.messages import did_you_mean
from shadowpeft.presets import PRESETS, preset
from shadowpeft.settings import STRICT, VARIANTS, Count, ShadowSettings

PACKAGED = ("robot", "robot_large", "robot_oos", "robot_tools", "robot_tools_large")
"""Sets of rows that come with this package."""


class StrictSection(BaseModel):
    """A part of a run file."""

    model_config = STRICT


class SourceSection(StrictSection):
    """Rows that are more than the name of a file."""

    hub: str | None = None
    """A data set on the Hub."""
    path: str | None = None
    """A file, or a folder in a layout of the ``datasets`` library."""
    config: str | None = None
    """One of the data set's configurations."""
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    columns_of_ours: ClassVar[tuple[str, ...]] = COLUMNS
    columns: dict[str, str] = Field(default_factory=dict)
    """Our names of columns and theirs, such as ``{prompt: question, response: answer}``; then no other column is read."""

    @model_validator(mode="after")
    def _one(self) -> SourceSection:
        if (self.hub is None) == (self.path is None):
            raise ValueError(f"hub and path are {'both' if self.hub else 'not'} set; give one of them")
        if self.hub is None and (self.revision is not None or self.config is not None):
            raise ValueError("revision and config are of a data set on the Hub but hub is not set; leave them out")
        known = self.columns_of_ours
        for ours in self.columns:
            if ours not in known:
                raise ValueError(
                    f"columns has the key '{ours}'{did_you_mean(ours, list(known))}, which no row has; give their column to "
                    f"one of {', '.join(known)}"
                )
        return self

    @property
    def source(self) -> Source:
        """What reads it."""
        return Source(**self.model_dump())


Rows = Annotated[
    Union[Annotated[str, Tag("name")], Annotated[SourceSection, Tag("source")]],
    Discriminator(lambda value: "name" if isinstance(value, str) else "source"),
]
"""A file by its name, or a :class:`SourceSection`."""


class DataConfig(StrictSection):
    """Which rows to train and to evaluate on."""

    train: Rows
    """A file, a packaged set, or a :class:`SourceSection`. Packaged are ``robot``, intents, ``robot_large``, the same with
    three times the phrasings, and ``robot_oos``, with requests out of scope; ``robot_tools``, actions with arguments, and
    ``robot_tools_large``, the same with more rows."""
    validation: Rows | None = None
    """The same; None: no evaluation during training (a packaged set brings its own)."""
    tools: str | None = None
    """File of the tools that rows call (docs/tools.md); None: rows bring their own, for a chat template that writes them."""
    call_form: Literal["template", "compact"] | None = None
    """How calls of ``tools`` are written: as the chat template writes them, or in the compact form, which a device needs
    (docs/tools.md). null: "compact" where the shadow path learns actions alone or the template writes no calls, else
    "template"."""
    max_length: int = Field(default=512, ge=8)
    """Longest sequence in tokens."""
    too_long: Literal["error", "skip", "cut"] = "error"
    """What happens to longer rows; "cut" is for texts that are classified."""
    chat_template: str | None = None
    """In the place of the base's: a file with one, or "plain", for bases that have none."""
    system: str | None = None
    """System message for rows that bring none."""
    assistant_only_loss: bool = False
    """Learn every answer of a conversation; by default only the last one."""
    packing: bool = False
    """Put several rows into one of ``max_length`` tokens; attention stays inside each."""
    streaming: bool = False
    """Read training rows while training, for what does not fit into memory."""
    shuffle_buffer: Count = 1000
    """With ``streaming``: sequences to draw the next one from."""
    shadow_answers: Literal["whole", "action"] | None = None
    """What the shadow path learns of an answer: "whole", or "action": the action it starts with, ``[REMOTE]`` where it starts
    with none. null: "action" for a packaged set, else "whole"."""
    shadow_repeats: int = Field(default=0, ge=0)
    """How many more times an epoch shows the shadow path its rows, without the base: epochs that cost almost nothing."""

    @property
    def learns_actions(self) -> bool:
        """Whether the shadow path learns actions alone."""
        return learns_actions({"train": self.train, "shadow_answers": self.shadow_answers})

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        if self.assistant_only_loss and self.learns_actions:
            raise ValueError(
                "data.assistant_only_loss learns every answer but data.shadow_answers is 'action', which is of the last one; "
                "keep one"
            )
        if self.call_form == "template" and self.learns_actions:
            raise ValueError(
                "data.call_form is 'template' but the shadow path learns actions alone, which are of the compact form; set "
                "data.shadow_answers to 'whole', or leave call_form out"
            )
        if self.streaming and self.train in PACKAGED:
            raise ValueError(f"data.streaming is set but '{self.train}' is packaged and in memory; leave it out")
        if self.streaming and self.shadow_repeats:
            raise ValueError("data.shadow_repeats needs all rows at hand but data.streaming reads them as they come; keep one")
        return self


def source_of(given: str | SourceSection) -> Source:
    """What reads the rows of ``data.train`` or ``data.validation``."""
    return Source(path=given) if isinstance(given, str) else given.source


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
            ConfigError: if it has fewer layers to correct than ``last_layers``, or to copy than the shadow takes.
        """
        first = VARIANTS[self.variant].first_refined_layer
        if self.last_layers is not None and self.last_layers > num_layers - first:
            raise ConfigError(
                f"shadow.last_layers is {self.last_layers} but the base has {num_layers} layers, of which the variant "
                f"'{self.variant}' corrects {num_layers - first}; give at most {num_layers - first}"
            )
        depth = self.shadow_num_hidden_layers
        if depth is not None and self.shadow_init.startswith("base_layers") and depth > num_layers:
            setting = "shadow.shadow_num_hidden_layers"
            said = f"{setting} is {depth}"
            if depth == PRESETS[self.preset]["shadow_num_hidden_layers"]:  # nobody need have asked for it
                said = f"the preset '{self.preset}', where runs that teach actions start, sets {setting} to {depth}"
            raise ConfigError(
                f"{said}, as many layers of the base as the shadow copies, but the base has {num_layers}; set {setting} to "
                f"{num_layers} or less"
            )
        if self.last_layers is None:
            return self.fields
        return {**self.fields, "refined_layers": [num_layers - self.last_layers, num_layers - 1]}

    @model_validator(mode="after")
    def _possible(self) -> ShadowSection:
        conflict = self.conflict("shadow.")
        if conflict is not None:
            raise ValueError(conflict)
        return self


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What torch and numpy take both."""


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
    seed: Seed = 0
    threads: Count | None = None
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)


class TrainingSection(OptimisationSection):
    """Optimisation, evaluation and saving of a fine-tuning run."""

    epochs: float | None = Field(default=None, gt=0)
    shadow_epochs: int = Field(default=0, ge=0)
    """Epochs of the shadow path alone, without the base, before both paths train. ``max_steps`` counts their steps too."""
    target_minutes: float | None = Field(default=None, gt=0)
    """How long training may take, in place of ``epochs`` and ``max_steps``: the speed is measured before the first step, and
    the schedule is made for the steps that fit. Loading and evaluations come on top."""
    batch_size: Count = 16
    eval_batch_size: Count = 16
    optimizer: Literal["adamw", "adamw_bnb_8bit", "adamw_torch_8bit", "adafactor", "muon"] = "adamw"
    """See :mod:`shadowpeft.train.optimisers`."""
    backbone_lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the shadow backbone, as a multiple of ``learning_rate``."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: float = Field(default=1.0, ge=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the frozen base; trainable weights are float32 always, and 16-bit runs use autocast."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    neftune: float | None = Field(default=None, gt=0)
    """Noise on the embeddings in training (NEFTune): its alpha."""
    compile: bool = False
    """``torch.compile`` the model."""
    patience: Count | None = None
    """Stop after so many evaluations in a row that did not improve the loss of the path ``best_by``."""
    load_best: bool = False
    """The adapter is that of the evaluation with the lowest loss of the path ``best_by``, not that of the last step."""
    best_by: Literal["attached", "detached"] = "attached"
    data_seed: Seed | None = None
    """Seed of the order of the rows; None: ``seed``, which is also that of new weights and dropout."""
    group_by_length: bool = True
    cache_activations: bool | str = False
    """Store what the base computes below ``shadow.last_layers`` once: in the run's folder, or in the folder named here."""
    freeze_shadow: bool = False
    """Train the injections and updates only; with ``cache_activations`` the shadow's states are stored too. With
    ``shadow_epochs`` the shadow trains in these first, and is frozen then."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        given = [key for key in ("epochs", "max_steps", "target_minutes") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are {'both' if len(given) == 2 else 'all'} set; keep one")
        if not given:
            self.epochs = 1.0
        if self.shadow_epochs and not self.group_by_length:
            raise ValueError(
                "shadow_epochs is set and group_by_length is off, but its sampler keeps the order; leave it on"
            )
        return self

    @model_validator(mode="after")
    def _evaluations(self) -> TrainingSection:
        for key in ("patience", "load_best"):
            if getattr(self, key) and self.eval_every is None:
                raise ValueError(f"training.{key} is set but training.eval_every is not, so nothing is compared; set both")
        if self.load_best and self.save_every not in (None, self.eval_every):
            raise ValueError(
                f"training.load_best needs a checkpoint of each evaluation, but save_every is {self.save_every} and eval_every "
                f"{self.eval_every}; leave save_every out"
            )
        if self.load_best:
            self.save_every = self.eval_every
        if self.neftune is not None and self.cache_activations:
            raise ValueError(
                "training.neftune and training.cache_activations are both set, but stored activations have no noise; keep one"
            )
        return self
