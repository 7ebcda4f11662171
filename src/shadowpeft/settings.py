"""The settings of an adapter, declared once; the PEFT config, run files and presets derive from this.

Nothing here imports torch, so a wrong run file is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import ErrorDetails

from shadowpeft.messages import quote

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""How pydantic checks settings: unknown keys, lax types and numbers that are not finite are errors."""

WIDTHS: dict[str, tuple[str, ...]] = {
    "shadow_intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "shadow_num_attention_heads": ("num_attention_heads",),
    "shadow_num_key_value_heads": ("num_key_value_heads",),
    "shadow_head_dim": ("head_dim",),
    "shadow_hidden_size": ("hidden_size",),
}
"""Settings that change a width of a mirrored shadow, and the names of that width in transformers' configurations."""
MIRROR_ONLY = ("shadow_num_hidden_layers", *WIDTHS)
"""Settings that shape a mirrored shadow."""

Count = Annotated[int, Field(ge=1)]
Names = Annotated[list[str], BeforeValidator(lambda value: list(value) if isinstance(value, tuple | set) else value)]


@dataclass(frozen=True)
class Variant:
    """The mathematical differences between the implementations (docs/defects.md); the defaults are the paper's."""

    first_refined_layer: int = 1
    update_activation: str = "silu"
    update_bias: bool = False
    update_norm: bool = True
    """Whether all update steps share a norm."""
    dropout_before_down: bool = False
    """Dropout of the injection: before ``W_down``, or after."""
    dropout_in_update: bool = True
    paper_init: bool = True
    normalised: bool = False
    """Whether base and shadow state are compared at a root mean square of 1, and the correction is scaled back."""
    gate_start: float = 0.0
    """Added to the argument of the update's gate: 0 starts the gate at one half, and the shadow state is soon forgotten."""


VARIANTS = {
    "paper": Variant(),
    "authors": Variant(),  # what the paper says: their last update exists but nothing reads it, so it is not built here
    "peft": Variant(
        first_refined_layer=0,
        update_activation="gelu",
        update_bias=True,
        update_norm=False,
        dropout_before_down=True,
        dropout_in_update=False,
        paper_init=False,
    ),
    "scaled": Variant(normalised=True, gate_start=-4.0),  # ours (docs/scaled.md): the shadow's state keeps its weight
}


@dataclass
class ShadowSettings:
    """What ``ShadowPeftConfig`` and the section ``shadow`` of a run file have in common."""

    r: Count = 16
    """Rank of the injection, ``W_down: d x r`` and ``W_up: r x d`` (Eq. 3)."""
    shadow_alpha: Annotated[float, Field(gt=-1e6, lt=1e6)] = 0.1
    """Strength of the injected correction (Eq. 4); not 0."""
    shadow_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout probability in the correction (Eq. 3) and in the transform net (Eq. 13)."""
    update_hidden_size: Count | None = None
    """Hidden width ``m`` of the update nets (Eqs. 13-14); None: ``r``."""
    use_update: bool = True
    """False: the shadow state stays ``s^(0)`` in every layer (the paper's ablation, 4.3)."""
    shadow_model: Any = "mirror"
    """"mirror": a small network of the base's own class. Otherwise a Hub id, a folder or, in Python, a module to start from."""
    shadow_num_hidden_layers: Count | None = None
    """Layers of a mirrored shadow; None: 1."""
    shadow_intermediate_size: Count | None = None
    """MLP width of a mirrored shadow; None: the base's."""
    shadow_num_attention_heads: Count | None = None
    """Attention heads of a mirrored shadow; None: the base's."""
    shadow_num_key_value_heads: Count | None = None
    """Key-value heads of a mirrored shadow; None: the base's, at most the attention heads."""
    shadow_head_dim: Count | None = None
    """Width of an attention head of a mirrored shadow; None: the base's."""
    shadow_hidden_size: Count | None = None
    """Hidden width ``d_s`` of a mirrored shadow; None: the base's. Another width needs ``share_embeddings=False``."""
    shadow_init: Literal["random", "base_layers", "base_layers_spread"] = "random"
    """"random"; or a mirrored shadow of the same widths starts as a copy of layers of the base: "base_layers" its first ones,
    "base_layers_spread" layers from its first to its last at equal distances."""
    projection_init: Literal["random", "pseudo_inverse"] = "random"
    """Start of ``W_p`` (Eq. 10) of an explicit shadow: "random", or "pseudo_inverse" (Eq. 12; needs the shadow's head)."""
    share_embeddings: bool | None = None
    """Feed the shadow with the base's frozen embeddings. None: yes for "mirror", no for an explicit shadow."""
    auxiliary_loss_weight: Annotated[float, Field(ge=0, lt=1e9)] = 0.05
    """lambda of the joint loss (Eqs. 8-9)."""
    shadow_loss: Literal["ce", "kl", "both", "lk"] = "ce"
    """The shadow path's training loss (second term of Eq. 8). "ce": cross-entropy of its targets. "kl": divergence from the
    attached path's own logits of the same forward pass, held fixed. "both": their sum. "lk": minus the logarithm of the share
    of the shadow's drawn drafts that the attached path would accept. A position whose ``shadow_labels`` differ from its
    ``labels`` has no teacher and always takes the cross-entropy, which evaluation mode reports throughout."""
    variant: Literal["paper", "authors", "peft", "scaled"] = "paper"
    """Whose mathematics; see :class:`Variant`."""

    @property
    def is_mirror(self) -> bool:
        """Whether the shadow is built from the base's own configuration."""
        return isinstance(self.shadow_model, str) and self.shadow_model == "mirror"

    def conflict(self, section: str = "") -> str | None:
        """Why these settings exclude one another, each named with ``section`` before it; None if they do not."""
        shapes = [name for name in MIRROR_ONLY if getattr(self, name) is not None]
        widths = [name for name in shapes if name in WIDTHS]
        if self.shadow_alpha == 0:
            return f"{section}shadow_alpha is {self.shadow_alpha}, which switches the correction off; give another number"
        if not self.is_mirror and (shapes or self.shadow_init != "random"):
            setting = f"{shapes[0]} shapes" if shapes else f"shadow_init: {self.shadow_init} fills"
            source = self.shadow_model if isinstance(self.shadow_model, str) else type(self.shadow_model).__name__
            return (
                f"{section}{setting} a mirrored shadow but {section}shadow_model is {quote(source)}, which brings its own "
                "shape and weights; remove one of them"
            )
        if self.is_mirror and self.projection_init != "random":
            return (
                f"{section}projection_init: {self.projection_init} needs an explicit {section}shadow_model with an LM head; "
                "set one or remove it"
            )
        if widths and self.shadow_init != "random":
            return (
                f"{section}shadow_init: {self.shadow_init} copies the base's own widths but {section}{widths[0]} is set; "
                "remove one of them"
            )
        return None


def explain(problem: ErrorDetails, name: str, value: Any) -> str:
    """One of pydantic's errors: what ``name`` is, and what it must be."""
    expected = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
    _, should, rest = expected.partition(" should ")
    return f"{name} is {quote(value)} but {f'must {rest}' if should else expected}"
