"""The two roles of a server: the cloud answers by itself; the edge lets the shadow answer, and the router decide."""

from __future__ import annotations

import asyncio
import copy
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.chat import render_prompt, with_system
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.serve.client import CloudClient, CloudError
from shadowpeft.serve.drift import Drift
from shadowpeft.serve.engine import Engine
from shadowpeft.serve.protocol import ChatRequest, CompletionRequest, ResponseBuilder
from shadowpeft.serve.replies import ForwardedReply, Generation, LocalReply, Reply
from shadowpeft.serve.requests import SamplingParams, TooLongError
from shadowpeft.serve.router import (
    ASKED,
    BASE_PATH,
    CLOUD,
    CLOUD_DOWN,
    DEVICE,
    TOO_LONG,
    Router,
    Scores,
    action_probability,
    decisive,
)

PATHS = {True: "/v1/chat/completions", False: "/v1/completions"}
Asked = ChatRequest | CompletionRequest


class Role(ABC):
    """Makes an answer to a request.

    Args:
        system: system message for chats that bring none. default_tokens: length of an answer where the request names none.
    """

    name: str

    def __init__(self, engine: Engine, *, system: str | None, default_tokens: int) -> None:
        self.engine, self.system, self.default_tokens = engine, system, default_tokens
        self._tokenizer = copy.deepcopy(engine.backend.tokenizer)  # the engine's thread uses the other
        self._threads = ThreadPoolExecutor(2, "shadowpeft-tokenizing")  # nothing that takes long may hold these up
        longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        self.prompt_characters = longest * engine.limits.prompt_tokens
        """Longer prompts have more tokens than allowed, whatever they are."""

    @property
    def elsewhere(self) -> int:
        """Answers that another server makes for this one."""
        return 0

    def close(self) -> None:
        """Tokenize no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @abstractmethod
    async def answer(self, asked: Asked) -> Reply:
        """An answer that has begun.

        Raises:
            ShadowPeftError: for a request that cannot be served, see :meth:`Engine.submit`.
            CloudError: if the cloud would have to answer and does not.
        """

    async def prompt(self, asked: Asked) -> list[int]:
        """The prompt's tokens.

        Raises:
            TooLongError: if it has so many characters that it must have too many tokens; it is not tokenized then.
        """
        texts = (
            [asked.prompt]
            if isinstance(asked, CompletionRequest)
            else [m.content + str(m.tool_calls or "") for m in asked.messages]
        )
        characters = sum(map(len, texts))
        if characters > self.prompt_characters:
            raise TooLongError(
                f"the prompt has {characters} characters but {self.engine.limits.prompt_tokens} tokens hold at most "
                f"{self.prompt_characters}; shorten it"
            )
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, asked)

    def _encode(self, asked: Asked) -> list[int]:
        if isinstance(asked, CompletionRequest):
            text = asked.prompt
        else:
            turns = [m.model_dump(exclude={"name"}, exclude_none=True) for m in asked.messages]
            turns = with_system(turns, self.system)
            try:
                text = render_prompt(self._tokenizer, turns)
            except TypeError as error:  # of a template that wants the arguments of a call in another form
                raise DataError(
                    "tool_calls of a message cannot be written by the model's chat template; leave them out"
                ) from error
            if any("tool_calls" in turn for turn in turns):
                bare = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns]
                if text == render_prompt(self._tokenizer, bare):
                    raise DataError(
                        "tool_calls of a message are not written by the model's chat template; leave them out"
                    )
        # a chat template writes the tokens of a beginning itself
        ids: list[int] = self._tokenizer(text, add_special_tokens=isinstance(asked, CompletionRequest)).input_ids
        return ids

    def sampling(self, asked: Asked) -> SamplingParams:
        """What the engine is told."""
        return SamplingParams(
            max_tokens=asked.wanted_tokens or self.default_tokens,
            temperature=float(asked.temperature or 0.0),
            top_p=1.0 if asked.top_p is None else float(asked.top_p),
            seed=asked.seed,
            stop=asked.stops,
            top_logprobs=asked.wanted_logprobs or 0,
        )

    def builder(self, asked: Asked, note: dict[str, Any]) -> ResponseBuilder:
        """How the answer will look."""
        return ResponseBuilder(isinstance(asked, ChatRequest), asked.model, asked.wanted_logprobs, note)


class CloudRole(Role):
    """Answers with the attached model, or its base."""

    name = "cloud"

    async def answer(self, asked: Asked) -> Reply:
        if asked.route == "device":
            raise ConfigError("route is 'device' but this is the cloud; ask the edge server, or leave route out")
        began = time.monotonic()
        ids = await self.prompt(asked)
        generation = Generation().start(
            self.engine, ids, asked.model, self.sampling(asked), speculative=asked.speculative
        )
        return await _begun(LocalReply(generation, self.builder(asked, {"where": CLOUD, "reason": BASE_PATH}), began))


class EdgeRole(Role):
    """Lets the detached shadow answer first and hands on what the router says.

    Args:
        cloud: None: everything is answered here. cloud_model: the cloud's name for the model.
        when_down: ``local``: give the device's answer if the cloud has none, and say so; ``error``: refuse.
        actions: the device's answer starts with one of these; None: it answers freely.
    """

    name = "edge"

    def __init__(
        self,
        engine: Engine,
        router: Router,
        cloud: CloudClient | None,
        cloud_model: str,
        *,
        system: str | None,
        default_tokens: int,
        when_down: str = "local",
        actions: ActionTrie | None = None,
    ) -> None:
        super().__init__(engine, system=system, default_tokens=default_tokens)
        if when_down not in ("local", "error"):
            raise ConfigError(f"when_down is '{when_down}' but must be local or error")
        self.router, self.cloud, self.cloud_model, self.when_down = router, cloud, cloud_model, when_down
        self.actions = actions
        self.drift = Drift.of(router.calibration)
        """None without a calibration to compare with."""

    @property
    def elsewhere(self) -> int:
        return 0 if self.cloud is None else self.cloud.exchanges

    async def answer(self, asked: Asked) -> Reply:
        began = time.monotonic()
        sampling = wanted = self.sampling(asked)
        try:
            ids = await self.prompt(asked)
            if (
                self.cloud is not None and asked.route != "device"
            ):  # what does not fit here is not refused but handed on
                room = min(self.engine.limits.new_tokens, self.engine.backend.max_model_len - len(ids))
                sampling = replace(wanted, max_tokens=max(1, min(wanted.max_tokens, room)))
            self.engine.check(len(ids), asked.model, sampling.max_tokens)
        except TooLongError:
            if self.cloud is None or asked.route == "device":
                raise
            return await self._forward(
                asked, {"where": CLOUD, "reason": ASKED if asked.route == "cloud" else TOO_LONG}, began
            )
        if asked.route == "cloud":
            try:
                return await self._forward(asked, {"where": CLOUD, "reason": ASKED}, began)
            except CloudError as error:
                return await self._instead(asked, ids, sampling, error, {}, began)
        reachable = asked.route == "auto" and self.cloud is not None and self.cloud.breaker.state != "open"
        with Generation() as generation:
            until = self.router.lost if reachable else None
            generation.start(self.engine, ids, asked.model, sampling, until, self.actions)
            finish = await generation.run()
        pieces, scores = [t.piece for t in generation.tokens], Scores.of(generation.tokens)
        decision = self.router.decide(pieces, scores)
        if self.drift is not None and asked.route == "auto":
            self.drift.add(decision)
        note: dict[str, Any] = {"where": decision.where, "reason": decision.reason, "action": decision.action}
        if self.actions is not None and decision.action is not None:
            n, _ = decisive(pieces, self.router.parse)
            note["probability"] = round(action_probability(scores.first(n)), 4)
        if decision.confidence is not None:
            note["confidence"] = round(decision.confidence, 4)
        note["device_milliseconds"] = round(1000 * (time.monotonic() - began), 2)
        if asked.route == "device":
            note.update(where=DEVICE, reason=ASKED)
        elif note["where"] == DEVICE and finish.reason == "length" and sampling != wanted:
            note.update(where=CLOUD, reason=TOO_LONG)
        if note["where"] == DEVICE:
            return await _begun(LocalReply(generation, self.builder(asked, note), began))
        try:
            return await self._forward(asked, note, began)
        except CloudError as error:
            complete = generation if finish.reason != "until" else None
            return await self._instead(asked, ids, sampling, error, note, began, complete)

    async def _forward(self, asked: Asked, note: dict[str, Any], began: float) -> Reply:
        if self.cloud is None:
            raise CloudError(CLOUD_DOWN, "this edge server has no cloud")
        body = asked.model_dump(exclude_none=True, exclude={"route"})
        body.update(model=self.cloud_model)
        if not asked.wanted_tokens:
            body["max_tokens"] = self.default_tokens
        if asked.temperature is None:  # here that means greedy; another server, such as vLLM, would draw
            body["temperature"] = 0.0
        if isinstance(asked, ChatRequest):
            body["messages"] = with_system(body["messages"], self.system)
        sent = time.monotonic()
        path = PATHS[isinstance(asked, ChatRequest)]
        reply = await _begun(ForwardedReply(self.cloud, path, body, asked.model, note, began))
        note["cloud_milliseconds"] = round(1000 * (time.monotonic() - sent), 2)
        return reply

    async def _instead(
        self,
        asked: Asked,
        ids: list[int],
        sampling: SamplingParams,
        error: CloudError,
        note: dict[str, Any],
        began: float,
        generation: Generation | None = None,
    ) -> Reply:
        """The device's own answer, said to be one."""
        if self.when_down == "error":
            raise error
        wanted = {"wanted": note["reason"]} if note else {}
        note = {**note, "where": DEVICE, "reason": error.reason, "degraded": True, **wanted}
        if generation is None:
            generation = Generation().start(self.engine, ids, asked.model, sampling, actions=self.actions)
        return await _begun(LocalReply(generation, self.builder(asked, note), began))


async def _begun(reply: Reply) -> Reply:
    try:
        await reply.begin()
    except BaseException:
        reply.close()
        raise
    return reply
