"""Two models with one tokenizer whose tables have other numbers of rows: aligned; with other tokens: refused.

Families pad their tables to a multiple of something, each size to its own (Qwen2.5: 151,936 rows for 0.5B, 152,064 for 7B,
one tokenizer). Rows beyond the tokenizer's last token are never read and never the answer. A shadow therefore gets as many
rows as its base: missing ones are zeros, surplus ones are dropped; and Eq. 12 is solved over the tokens' rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from shadowpeft.errors import ConfigError
from shadowpeft.messages import quote, shorten


def shared_tokens(base: Any, small: Any) -> int:
    """Rows that the tokens of two tokenizers need, the largest id + 1, if every token has the same id in both.

    Raises:
        ConfigError: naming the first token that differs.
    """
    ours, theirs = base.get_vocab(), small.get_vocab()
    if ours == theirs:
        return int(max(ours.values())) + 1
    token, number = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: (item[1], item[0]))
    if token in ours and token in theirs:
        where = f"has id {ours[token]} in the base's and {theirs[token]} in the shadow's"
    else:
        where = f"with id {number} is only in the {'base' if token in ours else 'shadow'}'s"
    raise ConfigError(
        f"the tokenizers of base and shadow differ: token {quote(token)} {where}; a shadow reads the base's tokens, use a "
        "small model of the same family"
    )


def _tokenizer_of(model: Any) -> tuple[Any, str]:
    """The tokenizer beside a model, found by the name it was loaded from; or None and why."""
    name = getattr(model, "name_or_path", "")
    if not name:
        return None, "it was not loaded from a folder or the Hub"
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False), ""
    except (OSError, ValueError) as error:
        return None, shorten(error)


def common_rows(base: Any, small: Any, rows: tuple[int, int]) -> int:
    """How many rows of two tables hold tokens that both models mean; all, if they have equally many.

    The tokenizers are looked up by the names that the models were loaded from. Where one has none (a model that was made in
    memory), equal numbers of rows are taken for the same tokens; other numbers are refused.

    Args:
        base, small: models, or anything else with a ``name_or_path``. rows: of the base's table and the small model's.

    Raises:
        ConfigError: if the tokenizers differ, need more rows than there are, or are needed and not to be found.
    """
    tokenizers = []
    for model, what in ((base, "base"), (small, "shadow")):
        tokenizer, reason = _tokenizer_of(model)
        if tokenizer is None:
            if rows[0] == rows[1]:
                return rows[0]
            raise ConfigError(
                f"the shadow has a vocabulary of {rows[1]} and the base of {rows[0]}, and the {what} has no tokenizer to "
                f"compare ({reason}); use a shadow with the base's tokenizer, and load both from where their tokenizers are"
            )
        tokenizers.append(tokenizer)
    tokens = shared_tokens(*tokenizers)
    if tokens > min(rows):
        raise ConfigError(
            f"the tokenizer has {tokens} ids but the base's table has {rows[0]} rows and the shadow's {rows[1]}; a checkpoint "
            "and its tokenizer do not belong together"
        )
    return rows[0] if rows[0] == rows[1] else tokens


def align_rows(table: Tensor, rows: int) -> Tensor:
    """``table`` ``(V, d)`` with ``rows`` rows: cut, or filled with zeros."""
    if len(table) >= rows:
        return table[:rows].clone()
    return torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])


def align_embedding(backbone: PreTrainedModel, rows: int) -> None:
    """Give the token embedding of ``backbone`` ``rows`` rows, in place; its configuration follows."""
    embedding: Any = backbone.get_input_embeddings()
    embedding.weight = nn.Parameter(align_rows(embedding.weight.detach(), rows), embedding.weight.requires_grad)
    embedding.num_embeddings = rows
    backbone.config.get_text_config(decoder=True).vocab_size = rows
