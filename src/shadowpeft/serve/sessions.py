"""A batch's forward passes: one cache, rows that leave and join, weights that stay what they were at the first pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shadowpeft.hf.base.rotary import turns_by_length
from shadowpeft.hf.forward import joining
from shadowpeft.hf.forward.call import Scope, within
from shadowpeft.hf.forward.drafting import Ahead, Draft, DraftHead, take_back
from shadowpeft.hf.forward.rows import BASE


class Session(ABC):
    """One batch from its prompts to its last token; it ends with the weights it began with.

    A session that cannot be joined with others runs by itself to its end.
    """

    @abstractmethod
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(B, V)`` in float32 of the token after the last.

        Args:
            input_ids: the new tokens ``(B, T_new)``. attention_mask: of old and new ones ``(B, T)``, 0 for padding on the left.
        """

    @abstractmethod
    def keep(self, rows: list[int]) -> None:
        """Go on with these rows of the batch only; at least one."""

    @abstractmethod
    def restart(self, row: int) -> Session:
        """A session of this row alone that has read nothing yet, with the weights of this one."""

    @property
    def can_continue(self) -> bool:
        """Whether a prompt may be read in pieces."""
        return False

    @property
    def can_shift(self) -> bool:
        """Whether columns may be added and dropped."""
        return False

    def shift(self, columns: int) -> None:
        """Add so many columns of padding on the left, or drop as many where the number is negative."""
        raise NotImplementedError

    def drafter(self, columns: int) -> Drafter | None:
        """What drafts at most ``columns`` tokens ahead, or None if nothing does; for one round."""
        return None

    def can_join(self, other: Session) -> bool:
        """Whether :meth:`join` can."""
        return False

    def join(self, other: Session) -> None:
        """Take over the rows of ``other``, which has as many columns; they come last."""
        raise NotImplementedError


class Drafter(ABC):
    """One round: shadows read ahead, one pass verifies, and what was not accepted is taken back."""

    @abstractmethod
    def read(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Let the shadows read one more column of tokens ``(B, 1)``.

        Args:
            attention_mask: of old and new tokens ``(B, T)``.
        """

    @abstractmethod
    def drafts(self) -> list[Draft | None]:
        """What each row's shadow says after the last column; None for rows that have none."""

    @abstractmethod
    def verify(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(B, n, V)`` in float32 after each of the ``n`` columns that were read, ``input_ids`` ``(B, n)``."""

    @abstractmethod
    def take_back(self, columns: list[int]) -> None:
        """Forget the last ``columns[i]`` tokens of row ``i``; rows move to the right so that all end together."""


def _positions(mask: Tensor, columns: int) -> Tensor:
    """Of the last ``columns`` tokens ``(B, columns)``; padding is not counted."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -columns:]


class CachedSession(Session):
    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self._whole = turns_by_length(model.config)
        """Whether a prompt must be read at once."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self._call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=_positions(attention_mask, input_ids.shape[1]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def keep(self, rows: list[int]) -> None:
        joining.select_rows(self.cache, rows)

    @property
    def can_continue(self) -> bool:
        return joining.can_continue(self.cache) and not self._whole

    @property
    def can_shift(self) -> bool:
        return joining.can_join(self.cache)

    def shift(self, columns: int) -> None:
        joining.shift(self.cache, columns)

    def can_join(self, other: Session) -> bool:
        alike = isinstance(other, CachedSession) and other.model is self.model
        return alike and self.can_shift and other.can_shift

    @abstractmethod
    def _call(self, **inputs: Any) -> Any: ...


class AttachedSession(CachedSession):
    def __init__(self, model: Any, scope: Scope, head: DraftHead) -> None:
        super().__init__(model)
        self.scope = scope
        """Whose rows there are, and the weights of the first pass, held for all later ones."""
        self.head = head

    def _call(self, **inputs: Any) -> Any:
        with within(self.scope):
            return self.model(**inputs)

    def drafter(self, columns: int) -> Drafter | None:
        shadows = any(name != BASE for name in self.scope.names)
        return _ShadowDrafter(self) if shadows and joining.can_take_back(self.cache, columns + 1) else None

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self.scope.names = tuple(self.scope.names[row] for row in rows)
        self.scope.held = {name: self.scope.held[name] for name in self.scope.held if name in self.scope.names}

    def restart(self, row: int) -> Session:
        scope = Scope(self.model, (self.scope.names[row],), held=dict(self.scope.held))
        return AttachedSession(self.model, scope, self.head)

    def can_join(self, other: Session) -> bool:
        if not isinstance(other, AttachedSession) or not super().can_join(other):
            return False
        mine, theirs = self.scope.held, other.scope.held
        return all(mine[name] is theirs[name] for name in mine.keys() & theirs.keys())

    def join(self, other: Session) -> None:
        assert isinstance(other, AttachedSession)
        self.scope.names += other.scope.names
        self.scope.held.update(other.scope.held)
        joining.join_caches(self.cache, other.cache, self.scope.names)


class _ShadowDrafter(Drafter):
    def __init__(self, session: AttachedSession) -> None:
        self.session = session
        self._ahead = Ahead(session.model, session.head)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        with within(self.session.scope):
            self._ahead.read(
                input_ids,
                self.session.cache,
                attention_mask=attention_mask,
                position_ids=_positions(attention_mask, 1),
            )

    def drafts(self) -> list[Draft | None]:
        with within(self.session.scope):
            return self._ahead.drafts()

    def verify(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.session._call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=_positions(attention_mask, input_ids.shape[1]),
            past_key_values=self.session.cache,
            use_cache=True,
            logits_to_keep=input_ids.shape[1],
            shadow_state=self._ahead.states,
        )
        logits: Tensor = out.logits[:, -input_ids.shape[1] :].float()
        return logits

    def take_back(self, columns: list[int]) -> None:
        take_back(self.session.cache, columns)


class DetachedSession(CachedSession):
    def _call(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def restart(self, row: int) -> Session:
        return DetachedSession(self.model)

    def join(self, other: Session) -> None:
        assert isinstance(other, DetachedSession)
        joining.join_caches(self.cache, other.cache, None)


@dataclass
class Share:
    """One backend's part of a batch: a session, and which rows of the batch its rows are."""

    session: Session
    rows: list[int]


class MultiSession(Session):
    def __init__(self, shares: dict[Hashable, Share], size: int) -> None:
        self.shares, self.size = shares, size

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        parts = list(self.shares.values())
        logits = torch.cat([part.session.forward(input_ids[part.rows], attention_mask[part.rows]) for part in parts])
        order = torch.tensor([row for part in parts for row in part.rows], device=logits.device)
        return logits[order.argsort()]

    def keep(self, rows: list[int]) -> None:
        for member, share in list(self.shares.items()):
            kept = [row for row in rows if row in share.rows]
            if kept:
                share.session.keep([share.rows.index(row) for row in kept])
                share.rows = [rows.index(row) for row in kept]
            else:
                del self.shares[member]
        self.size = len(rows)

    def restart(self, row: int) -> Session:
        member, share = next((m, s) for m, s in self.shares.items() if row in s.rows)
        return MultiSession({member: Share(share.session.restart(share.rows.index(row)), [0])}, 1)

    @property
    def can_continue(self) -> bool:
        return all(share.session.can_continue for share in self.shares.values())

    @property
    def can_shift(self) -> bool:
        return all(share.session.can_shift for share in self.shares.values())

    def shift(self, columns: int) -> None:
        for share in self.shares.values():
            share.session.shift(columns)

    def can_join(self, other: Session) -> bool:
        if not isinstance(other, MultiSession) or not (self.can_shift and other.can_shift):
            return False
        both = self.shares.keys() & other.shares.keys()
        return all(self.shares[member].session.can_join(other.shares[member].session) for member in both)

    def join(self, other: Session) -> None:
        assert isinstance(other, MultiSession)
        for member, share in other.shares.items():
            rows = [self.size + row for row in share.rows]
            if member in self.shares:
                self.shares[member].session.join(share.session)
                self.shares[member].rows += rows
            else:
                self.shares[member] = Share(share.session, rows)
        self.size += other.size
