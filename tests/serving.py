"""Tiny models behind an engine, and its events collected."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import torch

import shadowpeft
from chatbase import chat_model, chat_tokenizer
from several import several
from shadowpeft.serve.backend import Attached, Detached
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.requests import Failed, Finish, SamplingParams, Token
from shadowpeft.serve.router import Calibration
from shadowpeft.serve.sessions import Session

ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"r": 4},
    "late": {"variant": "peft", "refined_layers": [2, 2], "shadow_alpha": 0.9, "update_hidden_size": 3},
    "deep": {"variant": "authors", "r": 3, "shadow_num_hidden_layers": 2, "shadow_intermediate_size": 24},
}


def ending_model(**overrides: Any) -> Any:
    """A random model that ends some answers early: the end token is made likely."""
    made = chat_model(**overrides)
    with torch.no_grad():
        made.lm_head.weight[3] *= 2.5
    return made


def attached(**overrides: Any) -> Attached:
    """Three adapters and their base."""
    model = several(ending_model(**overrides), ADAPTERS)
    return Attached(model, chat_tokenizer(), {name: f"{name}-folder" for name in ADAPTERS}, "base")


def detached(name: str = "edge", **overrides: Any) -> Detached:
    """The first adapter's detached shadow."""
    model = several(ending_model(**overrides), ADAPTERS)
    return Detached(shadowpeft.detach(model), chat_tokenizer(), name)


def saying(answer: str, name: str = "edge") -> Detached:
    """A model that answers with ``answer``, no byte of which comes twice."""
    made = chat_model(max_position_embeddings=512)
    said = [*chat_tokenizer()("\n" + answer, add_special_tokens=False).input_ids, 3]
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.down_proj.weight.mul_(1e-4)
        rows = torch.nn.functional.normalize(made.model.embed_tokens.weight, dim=-1)
        made.lm_head.weight.zero_()
        for before, after in pairwise(said):
            made.lm_head.weight[after] += 3 * rows[before]
    return Detached(made, chat_tokenizer(), name)


class Reader:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.end: Finish | Failed | None = None
        self.done = threading.Event()

    def __call__(self, event: Any) -> None:
        assert not self.done.is_set(), "an event after the end"
        if isinstance(event, Token):
            self.tokens.append(event)
        else:
            self.end = event
            self.done.set()

    def wait(self) -> Finish:
        assert self.done.wait(60), "no end"
        if isinstance(self.end, Failed):
            raise self.end.error
        assert isinstance(self.end, Finish)
        return self.end

    @property
    def text(self) -> str:
        last = self.wait().text
        return "".join(t.text for t in self.tokens) + last


def ask(engine: Engine, prompt: str, name: str, until: Any = None, **sampling: Any) -> Reader:
    """Submit a prompt, as it is."""
    reader = Reader()
    ids = engine.backend.tokenizer(prompt, add_special_tokens=False).input_ids
    reader.request = engine.submit(ids, name, SamplingParams(**sampling), reader, until)  # type: ignore[attr-defined]
    return reader


def engine_of(backend: Any, **limits: Any) -> Engine:
    """A running engine."""
    made = Engine(backend, EngineLimits(**limits))
    made.start()
    return made


CALIBRATION = Calibration("min_logprob", (-5.0, -0.1), (0.0, 1.0), 0.9)
"""Takes the sure lines of :class:`Scripted` for right and the unsure ones for wrong."""


class Scripted:
    """An edge's backend, made to say a line by a word of the prompt, surely or unsurely."""

    def __init__(self, inner):
        self.inner, self.passes = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    LINES = {  # noqa: RUF012
        "sit": "[Sit()] Here I sit.",
        "unsure": "[Bark()] Woof, maybe.",
        "remote": "[REMOTE] Ask the cloud, this is a long note about it.",
        "words": "The capital of Italy is Rome and it is very old.",
    }

    def open(self, names):
        outer, rows = self, None
        pad = self.inner.tokenizer.pad_token_id
        end = next(iter(self.inner.stop_token_ids))

        class Saying(Session):
            def forward(self, ids, mask):
                nonlocal rows
                outer.passes += 1
                if rows is None:
                    texts = [outer.inner.tokenizer.decode([t for t in row if t != pad]) for row in ids.tolist()]
                    rows = []
                    for text in texts:
                        word = next(w for w in outer.LINES if w in text)
                        said = outer.inner.tokenizer(outer.LINES[word], add_special_tokens=False).input_ids
                        rows.append((iter([*said, end]), 2.0 if word == "unsure" else 30.0))
                logits = torch.zeros(len(rows), 260)
                for i, (said, strength) in enumerate(rows):
                    logits[i, next(said)] = strength
                return logits

            def keep(self, kept):
                nonlocal rows
                rows = [rows[i] for i in kept]

            restart = None

        return Saying()
