"""A smaller vocabulary for small devices: a one-layer shadow is mostly its token table and its head.

Kept are the tokens that the data need, every special token, and every single byte, so that any text can still be written. A
token brings the merges that lead to it, and those bring their halves. Byte-pair encoding applies the earliest merge it can.
Each merge that it applies to a word of the data leads to a kept token, so the earliest one is still there and the word is split
as before. Other words split into shorter pieces.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from shadowpeft.data.chat import encode
from shadowpeft.errors import UnsupportedModelError

_NAMED = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id")


@dataclass(frozen=True)
class Trimmed:
    """A model and a tokenizer over fewer tokens."""

    model: PreTrainedModel
    tokenizer: Any
    kept: Tensor
    """``(V')`` the old id of each new one, ascending."""


def needed_tokens(tokenizer: Any, rows: Iterable[dict[str, Any]], system: str | None = None) -> set[int]:
    """Ids that occur in chat rows: the rendered prompt and every answer with what closes it.

    Args:
        rows: as :func:`shadowpeft.data.chat.check_row` gives them. system: for rows that bring none.
    """
    sequences = encode(rows, tokenizer, max_length=sys.maxsize, system=system)
    return {token for sequence in sequences for token in sequence.ids}


@torch.no_grad()
def trim(model: PreTrainedModel, tokenizer: Any, needed: Iterable[int]) -> Trimmed:
    """``model`` over ``needed``, the special tokens, the single bytes and what lies between; a copy.

    The logits of kept tokens are the source's; the probabilities are renormalised over them.

    Raises:
        UnsupportedModelError: if the tokenizer is not byte-level BPE, or the model names tokens by id in other places than
            bos, eos, pad and unk.
    """
    content = _content(tokenizer)
    named = [getattr(h, n, None) for h in (tokenizer, model.config, model.generation_config) for n in _NAMED]
    ids = (i for value in named for i in (value if isinstance(value, list) else [value]))
    kept = closure(content, {*needed, *(i for i in ids if i is not None)})
    rows = int(model.get_input_embeddings().weight.shape[0])
    if kept[-1] >= rows:
        raise UnsupportedModelError(f"token {kept[-1]} has no row in a model of {rows}; resize its embeddings first")
    index = {old: new for new, old in enumerate(kept)}
    words = _tokenizer(tokenizer, content, index)
    return Trimmed(_model(model, index, torch.tensor(kept)), words, torch.tensor(kept))


def closure(content: dict[str, Any], needed: set[int]) -> list[int]:
    """Ids to keep, ascending: ``needed``, added tokens, single bytes, and both halves of every merge that makes one of them."""
    vocab: dict[str, int] = content["model"]["vocab"]
    halves: dict[int, list[tuple[int, int]]] = {}
    for left, right in map(_pair, content["model"]["merges"]):
        halves.setdefault(vocab[left + right], []).append((vocab[left], vocab[right]))
    kept = {t["id"] for t in content["added_tokens"]} | {i for text, i in vocab.items() if len(text) == 1}
    waiting = list(needed | kept)
    kept |= needed
    while waiting:
        new = {i for pair in halves.get(waiting.pop(), []) for i in pair} - kept
        kept |= new
        waiting += new
    return sorted(kept)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _content(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = content.get("model", {"type": type(tokenizer).__name__})
    if model["type"] != "BPE" or '"ByteLevel"' not in json.dumps(content.get("pre_tokenizer")):
        raise UnsupportedModelError(
            f"the tokenizer is a {model['type']} but only byte-level BPE can be trimmed; leave --vocab-from out"
        )
    return content


def _tokenizer(tokenizer: Any, content: dict[str, Any], index: dict[int, int]) -> Any:
    content = copy.deepcopy(content)
    model = content["model"]
    old: dict[str, int] = model["vocab"]
    model["vocab"] = {text: index[i] for text, i in sorted(old.items(), key=lambda item: item[1]) if i in index}
    model["merges"] = [m for m in model["merges"] if all(old[part] in index for part in (*_pair(m), "".join(_pair(m))))]
    for token in content["added_tokens"]:
        token["id"] = index[token["id"]]
    _renumber(content.get("post_processor"), index)
    Tokenizer.from_str(json.dumps(content))  # refuses what does not fit together
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for stale in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
            (folder / stale).unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # by id; tokenizer.json says the same
        file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _renumber(part: Any, index: dict[int, int]) -> None:
    """Ids inside a post-processor: ``special_tokens`` of a template, alone or in a sequence."""
    if not isinstance(part, dict):
        return
    for inner in part.get("processors", []):
        _renumber(inner, index)
    for token in (part.get("special_tokens") or {}).values():
        token["ids"] = [index[i] for i in token["ids"]]


def _model(model: PreTrainedModel, index: dict[int, int], kept: Tensor) -> PreTrainedModel:
    small: Any = copy.deepcopy(model)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    small.resize_token_embeddings(len(kept), mean_resizing=False)
    for old, new in zip(tables, [small.get_input_embeddings(), small.get_output_embeddings()], strict=True):
        for name in ("weight", "bias"):
            values = getattr(old, name, None)
            if values is not None:
                getattr(new, name).copy_(values[kept.to(values.device)])
    for holder in (small.config, small.generation_config):
        set_by_id = [name for name in _LISTS if getattr(holder, name, None) is not None]
        if set_by_id:
            raise UnsupportedModelError(
                f"the model's configuration names tokens by id in '{set_by_id[0]}'; remove it before trimming"
            )
        for name in _NAMED:
            value = getattr(holder, name, None)
            if value is not None:
                setattr(holder, name, [index[i] for i in value] if isinstance(value, list) else index[value])
    return small  # type: ignore[no-any-return]
