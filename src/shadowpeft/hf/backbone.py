"""Where things are inside a transformers model, and how a shadow backbone is made for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.reading import BUILD_ERRORS
from shadowpeft.hf.files.records import config_from_record
from shadowpeft.hf.pretrained import load_whole
from shadowpeft.hf.signature import CACHE_NAMES
from shadowpeft.hf.vocabulary import align_embedding, common_rows
from shadowpeft.hf.weights import device_of
from shadowpeft.messages import quote, shorten

_WIDTH_FIELDS = {
    "shadow_intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "shadow_num_attention_heads": ("num_attention_heads",),
    "shadow_num_key_value_heads": ("num_key_value_heads",),
    "shadow_head_dim": ("head_dim",),
    "shadow_hidden_size": ("hidden_size",),
}
_ORDINARY_TYPES = ("full_attention", "sliding_attention")
_LINEAR_TYPES = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only model that the method needs."""

    backbone: nn.Module
    """The module that owns the decoder layers, such as ``LlamaModel``."""
    backbone_name: str
    """Its name inside the whole model; empty if it is the whole model."""
    layers: nn.ModuleList
    layers_name: str
    """Name of the list of layers inside the whole model."""
    config: PreTrainedConfig
    """The text configuration."""

    @property
    def hidden_size(self) -> int:
        """``d``."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """``L``."""
        return len(self.layers)


def anatomy(model: nn.Module) -> Anatomy:
    """Find backbone and decoder layers of ``model``.

    Raises:
        UnsupportedModelError: for encoder-decoder models, models without decoder layers, and models with one layer.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise UnsupportedModelError(
            f"the base is a {type(model).__name__} without a transformers configuration; pass a transformers model"
        )
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; a shadow needs a decoder-only model"
        )
    length = _depth(text)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == length and _is_layer_list(name):
            parent = name.rpartition(".")[0]
            if length < 2:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has one decoder layer; a shadow corrects layers 1 to L-1 and needs two"
                )
            backbone = model.get_submodule(parent)
            if not isinstance(backbone, PreTrainedModel):
                raise UnsupportedModelError(
                    f"the decoder layers of {type(model).__name__} belong to a {type(backbone).__name__}, which is no model "
                    "by itself; a shadow needs a decoder-only transformers model"
                )
            return Anatomy(backbone, parent, module, name, text)
    raise UnsupportedModelError(
        f"no list of {length} decoder layers, each of which runs once, was found in {type(model).__name__}; only decoder-only "
        "transformers models are supported"
    )


def _is_layer_list(name: str) -> bool:
    return name.rpartition(".")[2] in ("layers", "h", "blocks", "layer", "block") and "shadow_hub" not in name


def _depth(config: PreTrainedConfig) -> int:
    """Number of decoder layers; the decoders of encoder-decoder families count them apart from the encoder's."""
    return int(getattr(config, "decoder_layers", None) or config.num_hidden_layers)


@dataclass(frozen=True)
class LayerChoice:
    """Which layers of the base the layers of a mirrored shadow are modelled on."""

    indices: list[int]
    """For each layer of the shadow the layer of the base whose entries in per-layer lists it takes."""
    kind: str | None = None
    """An attention type that the base's own layers do not have, or None for that of ``indices``."""


def layer_choices(base: PreTrainedConfig, config: ShadowPeftConfig) -> list[LayerChoice]:
    """What a mirrored shadow may be modelled on, best first.

    The first full-attention layer, else one with a sliding window, else the first that is not recurrent, else the first.
    Some architectures refuse or cannot run some type alone: then each other type in turn, and at last, if no depth is
    asked for, one layer of each type. A shadow that copies layers of the base: those only.
    """
    depth = config.shadow_num_hidden_layers or 1
    if config.copies_layers:
        return [LayerChoice(copied_layers(base, depth, config.shadow_init))]
    types = list(getattr(base, "layer_types", None) or [])
    ordinary = [kind for kind in _ORDINARY_TYPES if kind in types]
    order = [types.index(kind) for kind in ordinary]
    order += [i for i, kind in enumerate(types) if kind not in _LINEAR_TYPES]
    order += list(range(_depth(base)))
    lists = [value for value in _per_layer(base).values() if len(value) == _depth(base)]
    kinds: dict[str, int] = {}
    for index in order:
        kinds.setdefault(repr([value[index] for value in lists]), index)
    choices = [LayerChoice([index] * depth) for index in kinds.values()]
    if "layer_types" in vars(base) and not ordinary:
        # every layer is of a special type (compressed, indexed); an ordinary one does for a shadow, where it is allowed
        choices = [LayerChoice([index] * depth, kind) for kind in _ORDINARY_TYPES for index in kinds.values()] + choices
    if config.shadow_num_hidden_layers is None and len(kinds) > 1:
        choices.append(LayerChoice(sorted(kinds.values())))
    return choices


def _per_layer(base: PreTrainedConfig) -> dict[str, Any]:
    """The stored fields of a configuration that say something of each layer, or name a cycle of layer types."""
    length = _depth(base)
    found = {}
    for key, value in vars(base).items():
        if isinstance(value, (list, tuple)) and value and not key.startswith("_"):
            cycle = key.endswith("_types") and all(isinstance(kind, str) for kind in value) and len(value) < length
            if len(value) == length or cycle:
                found[key] = value
    return found


def mirror_config(
    base: PreTrainedConfig, config: ShadowPeftConfig, choice: LayerChoice | None = None
) -> PreTrainedConfig:
    """The base's configuration with fewer and, where asked, narrower layers.

    Args:
        choice: the layers whose entries in per-layer lists it takes; None: the first of :func:`layer_choices`.

    Raises:
        ConfigError: if a width is asked for that the architecture does not have or that does not divide.
    """
    choice = layer_choices(base, config)[0] if choice is None else choice
    varied = getattr(base, "is_heterogeneous", False)  # widths of its own in each layer: take those of the chosen one
    new = copy.deepcopy(base.per_layer_config[choice.indices[0]] if varied else base)
    depth = len(choice.indices)
    for key, value in _per_layer(base).items():
        setattr(new, key, [value[i % len(value)] for i in choice.indices])
    if choice.kind is not None:
        new.layer_types = [choice.kind] * depth
    new.num_hidden_layers = depth
    for name in ("decoder_layers", "encoder_layers"):
        if hasattr(new, name):
            setattr(new, name, depth)
    for counter, most in (("max_window_layers", depth), ("num_kv_shared_layers", 0)):
        if getattr(new, counter, None) is not None:
            setattr(new, counter, min(getattr(new, counter), most))
    for ours, theirs in _WIDTH_FIELDS.items():
        wanted = getattr(config, ours)
        if wanted is None:
            continue
        field = next((n for n in theirs if hasattr(new, n)), None)
        if field is None:
            raise ConfigError(f"{ours}={wanted} was given but {base.model_type} has no such width; remove it")
        setattr(new, field, wanted)
    heads, kv_heads = getattr(new, "num_attention_heads", None), getattr(new, "num_key_value_heads", None)
    if heads is not None and kv_heads is not None:
        if config.shadow_num_key_value_heads is None and kv_heads > heads:
            new.num_key_value_heads = kv_heads = heads
        if heads % kv_heads:
            raise ConfigError(
                f"the shadow has {heads} attention heads and {kv_heads} key-value heads, which does not divide; set "
                "shadow_num_key_value_heads"
            )
    if heads is not None and getattr(new, "head_dim", None) is None and new.hidden_size % heads:
        raise ConfigError(f"{heads} attention heads do not divide the shadow's width {new.hidden_size}")
    new.tie_word_embeddings = bool(getattr(base, "tie_word_embeddings", False))
    return new


def copied_layers(base: PreTrainedConfig, depth: int, init: str = "base_layers") -> list[int]:
    """Indices of ``depth`` of the base's ``n`` attention layers: its first ones for "base_layers"; from the first to the last
    at equal distances, ``round(i (n - 1) / (depth - 1))``, for "base_layers_spread" (the first, if it is one only).

    Layers of a recurrent kind are passed over: a base reads its own recurrent state through the shared cache.

    Raises:
        ConfigError: if the base has fewer.
    """
    types = getattr(base, "layer_types", None) or ["full_attention"] * int(base.num_hidden_layers)
    found = [i for i, kind in enumerate(types) if kind not in _LINEAR_TYPES]
    if len(found) < depth:
        raise ConfigError(
            f"a shadow of {depth} layers of the base was asked for but the base has {len(found)} attention layers to copy; "
            "ask for fewer"
        )
    if init == "base_layers" or depth == 1:
        return found[:depth]
    return [found[round(i * (len(found) - 1) / (depth - 1))] for i in range(depth)]


class BorrowedEmbedding(nn.Module):
    """Stands in a shadow backbone that reads the tokens themselves (per-layer embeddings, hash routing) and looks them up
    in the base's embedding. It has no parameters; the base's backbone is referred to, not owned."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, so that the base does not become a child

    def forward(self, input_ids: Tensor) -> Tensor:
        """``(B, T)`` tokens to float32 embeddings ``(B, T, d)``."""
        embeds: Tensor = self._base[0].get_input_embeddings()(input_ids)  # type: ignore[operator]
        return embeds.float()


def replace_embeddings(backbone: PreTrainedModel, replacement: nn.Module | None) -> nn.Module:
    """Put ``replacement`` in place of a backbone's token embedding and return that; with None the backbone is fed with
    ``inputs_embeds``."""
    embedding = backbone.get_input_embeddings()
    for name, module in backbone.named_modules():
        if module is embedding:
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, replacement)
            return embedding
    raise UnsupportedModelError(f"the token embedding of {type(backbone).__name__} is not part of its backbone")


@dataclass
class ShadowParts:
    """What :func:`build_shadow` makes."""

    backbone: PreTrainedModel
    """Float32, without token embedding."""
    embedding: nn.Module | None
    """The shadow's own token embedding, or None if the base's is shared."""
    projection: Tensor | None
    """A start for ``W_p`` ``(d, d_s)``, or None for the default."""


def build_shadow(parts: Anatomy, config: ShadowPeftConfig, model: nn.Module) -> ShadowParts:
    """Make the shadow backbone that ``config`` describes for the base ``model``.

    Sets ``config.shadow_backbone_config``. A configuration that was read from a file is rebuilt from that record, so an
    adapter needs neither the shadow's source nor the rules by which it was derived.

    Raises:
        ConfigError: if vocabulary or widths do not fit the base.
        UnsupportedModelError: if the given module is not a decoder.
    """
    loaded = config._loaded and config.shadow_backbone_config is not None
    embedding: nn.Module | None
    source: PreTrainedModel | None = None
    aligned: PreTrainedModel | None = None
    reads_tokens, left = False, None
    shadow_class: Any
    projected = None
    if config.is_mirror:
        shadow_class = type(parts.backbone)
        if loaded:
            shadow_config = config_from_record(config.shadow_backbone_config, type(parts.config))
            _check_fits(parts.config, shadow_config, config)
            built = _make(parts, config, shadow_class, shadow_config, whole=config.shadow_reads_tokens)
        else:
            shadow_config, built, reads_tokens, left = _first_that_runs(parts, config, shadow_class)
    else:
        if loaded:
            shadow_config = config_from_record(config.shadow_backbone_config, None)
            with torch.device("meta"):  # only its class is wanted
                shadow_class = type(AutoModel.from_config(_tiny(shadow_config)))
        else:
            from shadowpeft.hf.shadow.source import given_projected, start_projection  # it imports this module

            projected = given_projected(config.shadow_model)
            source = _explicit_source(config) if projected is None else projected.backbone
            shadow_config = source.config.get_text_config(decoder=True)
            shadow_class = type(source)
            if projected is None and not config.shares_embeddings:
                rows = (int(parts.config.vocab_size), int(shadow_config.vocab_size))
                common_rows(model, source, rows)  # refuses other tokens
                if rows[0] != rows[1]:
                    aligned = _plain_copy(source)
                    align_embedding(aligned, rows[0])
                    shadow_config = aligned.config.get_text_config(decoder=True)
        _check_fits(parts.config, shadow_config, config)
        if aligned is not None:
            built = aligned
        else:
            built = _plain_copy(source) if source is not None else _make(parts, config, shadow_class, shadow_config)
    backbone: Any = built
    if config.copies_layers and not loaded:
        depth = len(anatomy_of_backbone(backbone))
        _copy_base_layers(parts, backbone, copied_layers(parts.config, depth, config.shadow_init))
    if not loaded:
        config.shadow_reads_tokens = config.shares_embeddings and reads_tokens
        config.shadow_frozen = _unreached(backbone, reads_tokens) if left is None else left
    strange = sorted(set(config.shadow_frozen or ()) - {name for name, _ in backbone.named_parameters()})
    if strange:
        raise ConfigError(f"shadow_frozen names {quote(strange[0])}, which the shadow backbone does not have")
    own = replace_embeddings(backbone, BorrowedEmbedding(parts.backbone) if config.shadow_reads_tokens else None)
    embedding = None if config.shares_embeddings else own
    backbone.to(dtype=torch.float32)
    if "meta" not in (device_of(parts.backbone).type, device_of(backbone).type):  # PEFT may load with low_cpu_mem_usage
        backbone.to(device_of(parts.backbone))
    projection = None
    if projected is not None:
        if config.projection_init != "random":
            raise ConfigError(
                f"projection_init='{config.projection_init}' was given but the projected checkpoint brings its own "
                "projection; remove projection_init"
            )
        projection = start_projection(projected, model, parts.hidden_size)
    elif config.projection_init == "pseudo_inverse" and not loaded and shadow_config.hidden_size != parts.hidden_size:
        projection = _projection_start(config, model)
    backbone.train(parts.backbone.training)
    config.shadow_backbone_config = json.loads(shadow_config.to_json_string(use_diff=False))
    return ShadowParts(backbone, embedding, projection)


def _make(
    parts: Anatomy, config: ShadowPeftConfig, kind: Any, shadow: PreTrainedConfig, *, whole: bool = False
) -> PreTrainedModel:
    """A random backbone of class ``kind`` in float32 beside the base; ``whole``: with its full token embedding."""
    attention = getattr(parts.config, "_attn_implementation", None) or "eager"
    attention = "sdpa" if "flash" in attention else attention  # the shadow's weights are float32
    built = copy.deepcopy(shadow)
    if config.shares_embeddings and not whole:
        # the table is taken out again; do not allocate vocabulary x width for it (two rows: the padding's and another)
        built.vocab_size, built.pad_token_id = 2, 0
    with torch.device(device_of(parts.backbone)):
        backbone: PreTrainedModel = kind._from_config(built, attn_implementation=attention, dtype=torch.float32)
    backbone.config.vocab_size = shadow.vocab_size
    backbone.config.pad_token_id = shadow.pad_token_id
    return backbone


def _new_backbone(
    parts: Anatomy, config: ShadowPeftConfig, kind: Any, shadow: PreTrainedConfig
) -> tuple[PreTrainedModel, bool]:
    """A random backbone and whether it must be run from tokens, since its layers read them."""
    state = torch.get_rng_state()
    backbone = _make(parts, config, kind, shadow)
    if device_of(backbone).type == "meta" or not config.shares_embeddings or _runs_from_embeddings(backbone):
        return backbone, False
    torch.set_rng_state(state)
    return _make(parts, config, kind, shadow, whole=True), True


def _probe(backbone: PreTrainedModel, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = int(backbone.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.randint(0, rows, (1, tokens), generator=generator)
    ids[0, 0] = rows - 1  # something else than padding
    return ids.to(device_of(backbone))


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(training)


def _runs_from_embeddings(backbone: PreTrainedModel) -> bool:
    """Whether tokens and their embeddings give the same result (a backbone may read its tokens a second time)."""
    ids = _probe(backbone, 4)
    closed = [
        p for p in backbone.parameters() if not bool(p.any())
    ]  # a gate that starts closed hides what it lets in later
    with torch.no_grad(), _evaluating(backbone):
        for parameter in closed:
            parameter.fill_(0.1)
        try:
            embeds = backbone.get_input_embeddings()(ids)  # type: ignore[operator]
            fed = backbone(inputs_embeds=embeds).last_hidden_state
            read = backbone(input_ids=ids).last_hidden_state
            backbone(inputs_embeds=embeds + 1.0)  # Gemma 4 looks up whose embedding it was given
        except BUILD_ERRORS:
            return False
        finally:
            for parameter in closed:
                parameter.zero_()
    return bool(torch.allclose(fed, read, rtol=0, atol=0, equal_nan=True))


def _unreached(backbone: PreTrainedModel, reads_tokens: bool) -> list[str]:
    """Names of the tensors whose gradient never arrives: an indexer's choice, attention to an encoder that is not there.

    Tried with a few tokens and, if that leaves any, with many, so that each expert and each compressed block takes part.
    """
    if device_of(backbone).type == "meta":  # nothing to try
        return []
    table = backbone.get_input_embeddings()
    own = {id(p) for p in table.parameters()}  # type: ignore[operator]
    fixed = [n for n, p in backbone.named_parameters() if not p.requires_grad]  # sinusoidal positions
    names = [n for n, p in backbone.named_parameters() if id(p) not in own and p.requires_grad]
    left = names
    for tokens in (8, 512):
        most = [getattr(backbone.config, name, None) for name in ("max_position_embeddings", "max_target_positions")]
        ids = _probe(backbone, min([tokens, *(int(n) for n in most if n)]))
        given: dict[str, Any] = {"input_ids": ids}
        if not reads_tokens:
            width = int(backbone.config.hidden_size)
            noise = torch.randn(1, ids.shape[1], width, generator=torch.Generator().manual_seed(0))
            given = {"inputs_embeds": noise.to(device_of(backbone)).requires_grad_(True) * 1.0}  # CTRL scales in place
        with torch.enable_grad(), _evaluating(backbone):
            out = backbone(**given, use_cache=False).last_hidden_state
            values = dict(backbone.named_parameters())
            gradients = torch.autograd.grad(out.sum(), [values[n] for n in names], allow_unused=True)
        left = [n for n, gradient in zip(names, gradients, strict=True) if gradient is None]
        if not left:
            break
    return fixed + left


def _caches(backbone: PreTrainedModel) -> bool:
    """Whether a token that follows a cached prompt gives what the whole gives; so too if the class has no cache."""
    ids = _probe(backbone, 4)
    if ids.device.type == "meta":
        return True
    with torch.no_grad(), _evaluating(backbone):
        out = backbone(input_ids=ids[:, :3], use_cache=True)
        cache = {name: out[name] for name in CACHE_NAMES if out.get(name) is not None}
        if not cache:
            return True
        last = backbone(input_ids=ids[:, 3:], use_cache=True, **cache).last_hidden_state[:, -1]
        whole = backbone(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    return bool((last - whole).abs().max() <= 1e-3 * whole.abs().max().clamp(min=1))


def _first_that_runs(
    parts: Anatomy, config: ShadowPeftConfig, kind: Any
) -> tuple[PreTrainedConfig, PreTrainedModel, bool, list[str]]:
    """Configuration and backbone of a mirrored shadow: the first of :func:`layer_choices` that its own class accepts,
    preferably one of which every tensor can learn; whether it reads tokens; and what cannot learn.

    Raises:
        UnsupportedModelError: if none can be built.
    """
    refusals, found = [], None
    for choice in layer_choices(parts.config, config):
        state = torch.get_rng_state()
        try:
            shadow = mirror_config(parts.config, config, choice)
            _check_fits(parts.config, shadow, config)
        except ConfigError:
            raise  # what was asked for is impossible, whatever the layer
        except BUILD_ERRORS as error:
            refusals.append(shorten(error))
            continue
        try:
            record = json.loads(shadow.to_json_string(use_diff=False))
            shadow = config_from_record(record, type(parts.config))
            backbone, reads_tokens = _new_backbone(parts, config, kind, shadow)
            left = _unreached(backbone, reads_tokens)
            if not _caches(backbone):
                raise UnsupportedModelError("cached and uncached states differ")
        except BUILD_ERRORS as error:
            torch.set_rng_state(state)
            refusals.append(shorten(error))
            continue
        if not left:
            return shadow, backbone, reads_tokens, []
        torch.set_rng_state(state)
        found = found or (shadow, backbone, reads_tokens, left)
    if found is None:
        raise UnsupportedModelError(
            f"no layer of {kind.__name__} can be built alone as a shadow ({refusals[0]}); pass shadow_model, a small model "
            "with the base's tokenizer"
        )
    return found


def anatomy_of_backbone(backbone: nn.Module) -> nn.ModuleList:
    """The decoder layers of a bare backbone, of any length."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and _is_layer_list(name):
            return module
    raise UnsupportedModelError(f"no decoder layers were found in {type(backbone).__name__}")


def _plain_copy(source: PreTrainedModel) -> PreTrainedModel:
    if any(type(p).__name__ not in ("Parameter", "Tensor") for p in source.parameters()):
        raise UnsupportedModelError("the shadow model is quantised; load it unquantised, it is trained in float32")
    return copy.deepcopy(source)


def _pretrained(auto: Any, source: str) -> PreTrainedModel:
    # a pooler is no part of a decoder, and checkpoints of language models have none
    return load_whole(auto, source, f"shadow_model '{source}'", new=("pooler",), dtype=torch.float32)


def _tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    new = copy.deepcopy(config)
    new.vocab_size, new.pad_token_id = 1, 0
    return new


def _explicit_source(config: ShadowPeftConfig) -> PreTrainedModel:
    """The backbone of the explicit shadow: a PreTrainedModel with token embedding, its head left behind."""
    source = config.shadow_model
    if isinstance(source, str):
        source = _pretrained(AutoModel, source)
    if not isinstance(source, PreTrainedModel):
        raise UnsupportedModelError(
            f"shadow_model is a {type(source).__name__}; pass a transformers model, a folder or a Hub id"
        )
    if getattr(source.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"shadow_model is a {type(source).__name__}; a shadow must be decoder-only")
    body = source.base_model
    if not isinstance(body, PreTrainedModel):
        raise UnsupportedModelError(f"shadow_model {type(source).__name__} has no backbone that can run alone")
    return body


def _check_fits(base: PreTrainedConfig, shadow: PreTrainedConfig, config: ShadowPeftConfig) -> None:
    if config.shares_embeddings and shadow.hidden_size != base.hidden_size:
        raise ConfigError(
            f"the shadow has width {shadow.hidden_size} and the base {base.hidden_size}, so they cannot share embeddings; "
            "set share_embeddings=False or use equal widths"
        )
    if not config.shares_embeddings and shadow.vocab_size != base.vocab_size:
        raise ConfigError(
            f"the shadow has a vocabulary of {shadow.vocab_size} and the base of {base.vocab_size}; use a shadow with the "
            "base's tokenizer"
        )


def _copy_base_layers(parts: Anatomy, backbone: PreTrainedModel, chosen: list[int]) -> None:
    """A shadow that starts from the base: everything but the token embedding becomes a copy of the base's own."""
    mine, theirs = anatomy_of_backbone(backbone), parts.layers
    with torch.no_grad():
        for layer, index in zip(mine, chosen, strict=True):
            _copy_into(layer, theirs[index])
        for name, child in backbone.named_children():
            if child is not mine and child is not backbone.get_input_embeddings():
                _copy_into(child, parts.backbone.get_submodule(name))


def _copy_into(target: nn.Module, source: nn.Module) -> None:
    state = {k: v for k, v in source.state_dict().items() if "shadow_link" not in k}
    for key, value in target.state_dict().items():
        fits = key in state and state[key].shape == value.shape and type(state[key]) is Tensor
        fits = fits and state[key].is_floating_point() == value.is_floating_point()
        if not fits or (state[key].is_meta and not value.is_meta):
            found = f"{tuple(state[key].shape)}, {state[key].dtype}" if key in state else "nothing"
            raise ConfigError(
                f"a shadow that copies layers needs a base tensor of shape {tuple(value.shape)} for '{key}' but found "
                f"{found}; a quantised or offloaded base cannot be copied, use shadow_init='random'"
            )
        value.copy_(state[key])


def _projection_start(config: ShadowPeftConfig, model: nn.Module) -> Tensor:
    from shadowpeft.hf.starts import projection_start  # it imports this module

    source = config.shadow_model
    if isinstance(source, str):
        source = _pretrained(AutoModelForCausalLM, source)
    return projection_start(model, source).weight
