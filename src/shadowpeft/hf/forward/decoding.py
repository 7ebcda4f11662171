"""The decoding loop of ``model.generate(..., speculative=True)``.

The shadow drafts some tokens, one attached pass verifies all of them with the states that the shadow made while it drafted
(:mod:`shadowpeft.hf.forward.drafting`), and the longest right beginning stays, with one more token of the attached model's
own. Greedy answers are those of ``generate`` without it (up to the rounding of passes of another length); drawn ones have the
same distribution (:func:`shadowpeft.core.speculation.accept_sampled`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from shadowpeft.core.speculation import Drafts, Gate, accept_greedy, accept_sampled, draw
from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.rotary import limit_of
from shadowpeft.hf.base.signature import CACHE_NAMES, Signature
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.forward.drafting import Ahead, Draft, realigned, take_back
from shadowpeft.hf.forward.joining import check_movable, select_rows
from shadowpeft.hf.forward.one_row import as_one_of, for_row
from shadowpeft.hf.forward.rows import row_names
from shadowpeft.hf.forward.speculation import Speculation
from shadowpeft.ops.thin import thin_products

_PASSED_ON = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict")


class _Row:
    """One answer that is being made."""

    def __init__(
        self,
        place: int,
        ids: Tensor,
        room: int,
        gate: Gate | None,
        processors: list[Any],
        criteria: list[Any],
        name: str | None,
    ) -> None:
        self.place, self.gate, self.processors, self.criteria, self.name = place, gate, processors, criteria, name
        self._ids = torch.cat([ids, ids.new_zeros(room)])
        self.length = len(ids)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        """``(1, V)`` of each token, where they were asked for."""
        self.drafts = Drafts(None, 0)

    def ids(self, with_drafts: int = 0) -> Tensor:
        """``(1, L)``, the prompt with its padding, the answer, and some of its drafts."""
        for place, token in enumerate(self.drafts.tokens[:with_drafts]):
            self._ids[self.length + place] = token
        return self._ids[None, : self.length + with_drafts]

    def append(self, token: int) -> None:
        self._ids[self.length] = token
        self.length += 1

    @property
    def last(self) -> int:
        return int(self._ids[self.length - 1])


class _Decoding:
    """One call of ``generate``."""

    def __init__(
        self, model: Any, settings: Speculation, processors: Any, criteria: Any, config: Any, streamer: Any, ids: Tensor
    ) -> None:
        self.model, self.settings = model, settings
        self.config, self.streamer = config, streamer
        self.head, self.samples = settings.head(), bool(config.do_sample)
        gates = settings.gates(model, len(ids), sampled=self.samples)
        room = int(config.max_length) - ids.shape[1] + 1
        names = row_names(model, len(ids)) or [None] * len(ids)
        self.rows = [
            _Row(
                place,
                row,
                room,
                gate,
                [for_row(each, place, len(ids)) for each in processors],
                [as_one_of(each, place, len(ids)) for each in criteria],
                name,
            )
            for place, (row, gate, name) in enumerate(zip(ids, gates, names, strict=True))
        ]
        self.live = list(self.rows)
        self.vocabulary = 0
        self.takes_positions = Signature(find_decoder(model).backbone).accepts("position_ids")

    @property
    def names(self) -> list[str] | None:
        """The adapters of the rows that go on, in a mixed batch; None if one adapter has all."""
        names = [row.name for row in self.live if row.name is not None]
        return names or None

    # -------------------------------------------------------------------------------------------------------- choosing

    def processed(self, row: _Row, logits: Tensor, ahead: int) -> Tensor:
        """Scores ``(V,)`` after ``generate``'s processors, with ``ahead`` drafts of the row as part of its text."""
        if not row.processors:
            return logits
        ids, scores = row.ids(ahead), logits[None].clone()
        for processor in row.processors:
            scores = processor(ids, scores)
        return scores[0]

    def choose(self, scores: Tensor) -> int:
        return draw(scores.softmax(-1)) if self.samples else int(scores.argmax())

    def add(self, row: _Row, token: int, scores: Tensor, logits: Tensor) -> bool:
        """Append a token; whether the answer goes on."""
        row.append(token)
        if self.config.return_dict_in_generate:
            if self.config.output_scores:
                row.scores.append(scores[None])
            if self.config.output_logits:
                row.logits.append(logits[None])
        self.settings.counts.tokens += 1
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        scores_so_far = tuple(row.scores) or None
        ended = [bool(torch.as_tensor(ends(row.ids(), scores_so_far)).all()) for ends in row.criteria]  # all are asked
        return not any(ended)

    # -------------------------------------------------------------------------------------------------------- drafting

    def draft(self, cache: Cache, mask: Tensor | None, positions: Tensor) -> Ahead:
        """Let the shadows read the last token of every row, and draft on.

        Rows that draft less than others read their last token again and again; nobody looks at what comes of it.
        """
        ahead = Ahead(self.model, self.head)
        for row in self.live:
            room = int(self.config.max_length) - row.length - 1
            row.drafts = Drafts(row.gate, min(self.settings.max_draft, room))
        column = torch.tensor([[row.last] for row in self.live], device=self.model.device)
        while True:
            mask = None if mask is None else torch.cat([mask, mask.new_ones((len(mask), 1))], 1)
            places = positions + self._steps(positions.new_tensor([ahead.length])) if self.takes_positions else None
            ahead.read(column, cache, attention_mask=mask, position_ids=places, names=self.names)
            if not any(row.drafts.go_on for row in self.live):
                return ahead
            for place, (row, draft) in enumerate(zip(self.live, ahead.drafts(), strict=True)):
                if draft is None:
                    row.drafts.stop()
                elif row.drafts.go_on:
                    self._draft_one(row, draft)
                    column[place, 0] = row.drafts.tokens[-1] if row.drafts.tokens else row.last
            if all(len(row.drafts.tokens) < ahead.length for row in self.live):
                return ahead

    def _steps(self, columns: Tensor) -> Tensor:
        """``(B, T)``, how far the tokens of columns ``(T,)`` are from the last one of each answer. What a row reads again stays
        where it was: the context may end there.
        """
        return torch.minimum(columns, columns.new_tensor([[len(row.drafts.tokens)] for row in self.live]))

    def _draft_one(self, row: _Row, draft: Draft) -> None:
        whole = bool(row.processors) or self.samples  # scores of every token, those that are not drafted at -inf
        scores, among = draft.logits, draft.tokens
        if whole and among is not None:
            scores = scores.new_full((self.vocabulary,), -torch.inf)
            scores[among.to(scores.device)] = draft.logits
        scores = self.processed(row, scores, len(row.drafts.tokens))
        p = scores.softmax(-1)

        def choose() -> int:
            token = draw(p) if self.samples else int(scores.argmax())
            return token if among is None or whole else int(among[token])

        row.drafts.add(p, choose, p)

    # ------------------------------------------------------------------------------------------------------- verifying

    def verify(self, row: _Row, logits: Tensor) -> tuple[bool, int]:
        """What becomes of a row's drafts, from the attached logits ``(n + 1, V)``.

        Returns:
            Whether the answer goes on, and how many tokens of it the cache may keep of this round.
        """
        drafted = row.drafts.tokens
        count = len(drafted)
        scores = [self.processed(row, logits[place], place) for place in range(count + 1)]
        if self.samples:
            target = [each.softmax(-1) for each in scores]
            new, kept = accept_sampled(drafted, row.drafts.shares, target)
        elif count == 0:
            new, kept = [int(scores[0].argmax())], 0
        else:
            new, kept = accept_greedy(drafted, torch.stack(scores).argmax(-1).tolist())
        counts = self.settings.counts
        counts.drafted, counts.accepted = counts.drafted + count, counts.accepted + kept
        before = 0 if row.gate is None else row.gate.pauses
        row.drafts.learn(kept)
        counts.pauses += 0 if row.gate is None else row.gate.pauses - before
        for place, token in enumerate(new):
            if not self.add(row, token, scores[place], logits[place]):
                return False, place + 1
        return True, len(new)

    # ------------------------------------------------------------------------------------------------------------ whole

    def run(self, outputs: Any, mask: Tensor | None, ahead_of_mask: Tensor | int) -> Cache:
        """Make all answers, from the outputs of a pass over the prompts; returns the cache.

        Args:
            ahead_of_mask: ``(B, 1)``, how far positions are beyond the number of tokens that the mask shows, or 0.
        """
        cache: Any = outputs.past_key_values
        cache.activate_past_recording()
        if len(self.live) > 1:
            check_movable(cache)
        first = outputs.logits[:, -1].float()
        self.vocabulary = first.shape[-1]
        width = self.live[0].length
        ended = []
        for place, row in enumerate(self.live):
            scores = self.processed(row, first[place], 0)
            if not self.add(row, self.choose(scores), scores, first[place]):
                ended.append(place)
        self.settings.counts.passes += len(self.live)
        padded = len(self.live) > 1 or (mask is not None and not bool(mask.all()))
        held = mask if mask is not None else torch.ones(len(self.live), width, dtype=torch.long, device=first.device)
        held = self._go_on(cache, held, ended)
        while self.live:
            shown = held if padded else None  # rows that move to the right bring padding
            beyond = ahead_of_mask if isinstance(ahead_of_mask, int) else ahead_of_mask[[row.place for row in self.live]]
            positions = held.sum(-1, keepdim=True) + beyond
            ahead = self.draft(cache, shown, positions)
            held, ended = self._verify_all(cache, held, shown, ahead, positions)
            held = self._go_on(cache, held, ended)
        return cache  # type: ignore[no-any-return]

    def _verify_all(
        self, cache: Cache, held: Tensor, shown: Tensor | None, ahead: Ahead, positions: Tensor
    ) -> tuple[Tensor, list[int]]:
        columns = ahead.length
        ids = torch.tensor(
            [
                [row.last, *row.drafts.tokens] + [row.last] * (columns - 1 - len(row.drafts.tokens))
                for row in self.live
            ],
            device=self.model.device,
        )
        held = torch.cat([held, held.new_ones((len(held), columns))], 1)
        inputs: dict[str, Any] = {"attention_mask": None if shown is None else held}
        if self.takes_positions:
            inputs["position_ids"] = positions + self._steps(torch.arange(columns, device=positions.device))
        if self.names is not None:
            inputs["adapter_names"] = self.names
        logits = self.model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=columns,
            shadow_state=ahead.states,
            **inputs,
        ).logits[:, -columns:]
        self.settings.counts.passes += len(self.live)
        lost, ended = [], []
        for place, row in enumerate(self.live):
            goes_on, kept = self.verify(row, logits[place, : len(row.drafts.tokens) + 1].float())
            lost.append(columns - kept)
            if not goes_on:
                ended.append(place)
        take_back(cache, lost)
        return realigned(held, lost), ended

    def _go_on(self, cache: Cache, held: Tensor, ended: list[int]) -> Tensor:
        """Without the rows that have ended."""
        if not ended or len(ended) == len(self.live):
            self.live = [] if ended else self.live
            return held
        rows = [place for place in range(len(self.live)) if place not in ended]
        self.live = [self.live[place] for place in rows]
        select_rows(cache, rows)
        return held[rows]


@torch.no_grad()
def speculate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    settings: Speculation,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop, for ``generate(custom_generate=...)``; returns what ``generate`` without it would.

    Raises:
        ConfigError: for what cannot be drafted: beams, a static cache, inputs that are no tokens.
        UnsupportedModelError: for several rows in a cache of recurrent or other layers that cannot be moved row by row.
    """
    _check(input_ids, generation_config, model_kwargs, streamer)
    _check_positions(model, generation_config)
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    if getattr(outputs, "past_key_values", None) is None:
        raise ConfigError(f"speculative=True was passed but {type(model).__name__} gives no cache to draft in; leave it out")
    mask, given = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    beyond: Tensor | int = 0
    if given is not None and given.ndim == 2:
        shown = input_ids.shape[1] if mask is None else mask.sum(-1, keepdim=True)
        beyond = (given[:, -1:] + 1 - shown).expand(len(input_ids), 1)
    decoding = _Decoding(model, settings, logits_processor, stopping_criteria, generation_config, streamer, input_ids)
    with thin_products(model):
        cache = decoding.run(outputs, mask, beyond)
    if streamer is not None:
        streamer.end()
    return _result(decoding, input_ids, generation_config, cache)


def _check_positions(model: Any, config: Any) -> None:
    """Raises:
    ConfigError: if the answer may cross the length at which the base turns its positions in another way.
    """
    limit = limit_of(model.config)
    if limit is not None and (config.max_length is None or config.max_length > limit):
        raise ConfigError(
            f"speculative=True was passed with room for {config.max_length} tokens, but beyond {limit} this "
            "base turns its positions in another way, also of what was read before; leave it out, or lower max_new_tokens"
        )


def _check(ids: Tensor, config: Any, kwargs: dict[str, Any], streamer: Any) -> None:
    def refuse(what: str, remedy: str) -> None:
        raise ConfigError(f"speculative=True was passed with {what}; {remedy}")

    if config.num_beams > 1:
        refuse(f"num_beams={config.num_beams}, but drafts follow one beam", "leave num_beams out")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        refuse(f"settings of {mode.value} (prompt_lookup_num_tokens, say)", "leave speculative or those out")
    if not kwargs.get("use_cache"):
        refuse("use_cache=False, but the shadow drafts ahead in the cache", "leave use_cache out")
    if getattr(kwargs.get("past_key_values"), "is_compileable", False):
        refuse(
            f"a {type(kwargs['past_key_values']).__name__}, from which no draft can be taken back",
            "use a dynamic cache",
        )
    if config.output_attentions or config.output_hidden_states:
        refuse("output_attentions or output_hidden_states, which a verifying pass has for drafts too", "leave them out")
    if streamer is not None and len(ids) > 1:
        refuse(f"a streamer and {len(ids)} rows", "stream one row at a time")
    if not ids.shape[1]:
        refuse("inputs_embeds, but the shadow drafts from tokens", "pass input_ids")
    strange = sorted(key for key, value in kwargs.items() if key not in _PASSED_ON and value is not None)
    if strange and strange[0] in CACHE_NAMES:
        refuse("a base whose cache is a recurrent state, which cannot go back", "leave it out")
    if strange:
        refuse(f"{strange[0]}, which later passes would need too", "leave speculative or that out")


def _result(decoding: _Decoding, ids: Tensor, config: Any, cache: Cache) -> Any:
    longest = max(row.length for row in decoding.rows)
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor.flatten()[0])
    sequences = ids.new_full((len(ids), longest), pad)
    for row in decoding.rows:
        sequences[row.place, : row.length] = row.ids()[0]
    if not config.return_dict_in_generate:
        return sequences

    def by_step(of: Any) -> tuple[Tensor, ...] | None:
        lists = [of(row) for row in decoding.rows]
        if not any(lists):
            return None
        blank = torch.zeros_like(next(each for each in lists if each)[0])
        steps = range(longest - ids.shape[1])
        return tuple(torch.cat([each[n] if n < len(each) else blank for each in lists]) for n in steps)

    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=by_step(lambda row: row.scores),
        logits=by_step(lambda row: row.logits),
        past_key_values=cache if len(ids) == 1 else None,  # of several rows it holds the last one to end
    )
