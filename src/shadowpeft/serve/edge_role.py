"""The edge: the shadow answers, and the router decides who else."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from shadowpeft.data.action_trie import Actions, ActionTrie, Choices
from shadowpeft.data.actions import REMOTE, written
from shadowpeft.data.calls import CallParser
from shadowpeft.data.chat import with_system
from shadowpeft.data.tools import Tools
from shadowpeft.errors import ConfigError
from shadowpeft.serve.calibrated import Calibrated
from shadowpeft.serve.client import CloudClient, CloudError, CloudRefusedError
from shadowpeft.serve.drift import Drift
from shadowpeft.serve.engine import Engine
from shadowpeft.serve.protocol import DECLINED, ChatRequest
from shadowpeft.serve.replies import ForwardedReply, Generation, LocalReply, Reply, begun
from shadowpeft.serve.requests import SamplingParams, TooLongError
from shadowpeft.serve.role import Asked, Role
from shadowpeft.serve.router import (
    ASKED,
    CLOUD,
    CLOUD_DOWN,
    DEVICE,
    FORMAT,
    OTHER_TOOLS,
    TAGGED,
    TOO_LONG,
    TOOL_RESULT,
    UNKNOWN,
    UNSURE,
    Decision,
    Router,
    Scores,
    action_probability,
    decisive,
)
from shadowpeft.serve.tool_protocol import NamedTool, ToolName
from shadowpeft.serve.toolbox import Saying, call_probabilities, must_call, request_text, result_of

_log = logging.getLogger("shadowpeft.serve")
DEVICE_TOKENS = 256
"""Longest answer of a device where nobody names a length: a small model that does not come to an end asks the cloud then."""
PATHS = {True: "/v1/chat/completions", False: "/v1/completions"}


class EdgeRole(Role):
    """Lets the detached shadow answer first and hands on what the router says.

    Args:
        cloud: None: everything is answered here. cloud_model: the cloud's name for the model.
        when_down: ``local``: give the device's answer, if it has one and the cloud has none, and say so; ``error``: refuse.
        actions: the device's answer starts with one of these; None: it answers freely, or with calls of ``tools``.
        tools: what the device was trained to call. hint: what it hands on because it is unsure of the arguments alone asks the
            cloud for the tool that it is sure of, where the client leaves the choice.
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
        default_tokens: int | None = None,
        when_down: str = "local",
        actions: ActionTrie | None = None,
        tools: Tools | None = None,
        hint: bool = False,
    ) -> None:
        super().__init__(engine, system=system, default_tokens=default_tokens, tools=tools)
        if when_down not in ("local", "error"):
            raise ConfigError(f"when_down is '{when_down}' but must be local or error")
        self.router, self.cloud, self.cloud_model, self.when_down = router, cloud, cloud_model, when_down
        self.actions: Actions | None = actions
        self.hint = hint
        self._not_for_cloud: set[str] = set()
        """Fields that this edge would add, and that its cloud refuses."""
        if actions is None and tools is not None and isinstance(router.parse, CallParser):
            self.actions = self.toolbox.calls(tools, device=True)
        self.drift = Drift.of(router.calibration)
        """None without a calibration to compare with."""
        self.calibrated = Calibrated.of(router.calibration, engine.backend)
        """None without a calibration that says for which model it was made."""

    @property
    def elsewhere(self) -> int:
        return 0 if self.cloud is None else self.cloud.exchanges

    async def answer(self, asked: Asked) -> Reply:
        began = time.monotonic()
        sampling = wanted = self.sampling(asked)
        ids: list[int] = []
        note: dict[str, Any]
        try:
            ids = await self.prompt(asked)
            room = self.room(ids)
            if not asked.wanted_tokens and self.default_tokens is None:
                room = min(room, DEVICE_TOKENS)
            if self.cloud is None or asked.route == "device":
                sampling = wanted = self.sampling(asked, room)
            else:  # what does not fit here is not refused but handed on
                most = min(wanted.max_tokens, self.engine.limits.new_tokens, room)
                sampling = replace(wanted, max_tokens=max(1, most))
            self.engine.check(len(ids), asked.model, sampling.max_tokens)
        except TooLongError:
            if self.cloud is None or asked.route == "device":
                raise
            note = {"where": CLOUD, "reason": ASKED if asked.route == "cloud" else TOO_LONG}
            return await self._forward(asked, ids, note, began)
        reason = ASKED if asked.route == "cloud" else self._elsewhere(asked)
        if reason is not None and (self.cloud is not None or reason == ASKED):
            try:
                return await self._forward(asked, ids, {"where": CLOUD, "reason": reason}, began)
            except CloudError as error:
                return await self._instead(asked, ids, sampling, error, {}, began)
        self.toolbox.check(asked)
        if self._only_repeats(asked):
            note = {"where": DEVICE, "reason": ASKED if asked.route == "device" else TOOL_RESULT}
            return await self._last_words(asked, ids, sampling, note, began)
        reachable = asked.route == "auto" and self.cloud is not None and self.cloud.breaker.state != "open"
        # the calibration is about all that the device knows: it chooses among that, and what was not offered is handed on
        narrowed = self.router.calibration is not None and self.toolbox.narrows(asked)
        held = await self._held_to(asked, widely=narrowed and reachable)
        router = self._router(asked, calibrated=reachable or not narrowed)
        with Generation() as generation:
            until = router.lost if reachable else None
            generation.start(self.engine, ids, asked.model, sampling, until, held)
            finish = await generation.run()
        pieces, scores = [t.piece for t in generation.tokens], Scores.of(generation.tokens)
        decision = router.decide(pieces, scores)
        if narrowed and not reachable and self.cloud is not None and decision.where == DEVICE:
            decision = replace(decision, where=CLOUD, reason=UNSURE)
        if self.drift is not None and asked.route == "auto" and not narrowed:
            self.drift.add(decision)
        if asked.stops and decision.where == DEVICE and router.parse(generation.text) is None:
            decision = Decision(CLOUD, UNKNOWN)  # a stop text of the request has cut the action
        note = {"where": decision.where, "reason": decision.reason, "action": decision.action}
        declined = None
        if held is not None and decision.action is not None:
            n, _ = decisive(pieces, router.parse)
            chance = action_probability(scores.first(n))
            note["probability"] = round(chance, 4)
            if decision.reason == TAGGED and (not isinstance(asked, ChatRequest) or asked.tools is None):
                declined = chance  # of a free answer it is none
            if isinstance(router.parse, CallParser):
                note["calls"], sure = call_probabilities(pieces[:n], scores.first(n), router.parse)
                if decision.reason == UNSURE and sure is not None:
                    note["hint"] = sure
        if decision.confidence is not None:
            note["confidence"] = round(decision.confidence, 4)
        note["device_milliseconds"] = round(1000 * (time.monotonic() - began), 2)
        if asked.route == "device":
            note.update(where=DEVICE, reason=ASKED)
        elif note["where"] == DEVICE and finish.reason == "length" and sampling != wanted:
            note.update(where=CLOUD, reason=TOO_LONG)
        if note["where"] == DEVICE:
            return await begun(LocalReply(generation, self.builder(asked, note), began))
        try:
            return await self._forward(self._hinted(asked, note), ids, note, began, declined)
        except CloudError as error:
            complete = generation if finish.reason != "until" and not (narrowed and reachable) else None
            return await self._instead(asked, ids, sampling, error, note, began, complete)

    def _elsewhere(self, asked: Asked) -> str | None:
        """Why the device is not asked at all; None: it is."""
        if asked.route == "device" or not isinstance(asked, ChatRequest):
            return None
        if asked.response_format is not None:
            return FORMAT
        if asked.tools is None:
            return TOOL_RESULT if self._only_repeats(asked) else None
        if asked.tool_choice == "none" or self.toolbox.lacks(asked) is not None:
            return OTHER_TOOLS
        return TOOL_RESULT if asked.messages[-1].role == "tool" else None

    def _only_repeats(self, asked: Asked) -> bool:
        """Whether the device has no words of its own for what a tool has said: it knows actions, and would act again."""
        if result_of(asked) is None or must_call(asked) or not isinstance(asked, ChatRequest):
            return False
        return asked.response_format is None and (self.actions is not None or asked.tools is not None)

    async def _last_words(
        self, asked: Asked, ids: list[int], sampling: SamplingParams, note: dict[str, Any], began: float
    ) -> Reply:
        """What the tools have said, which is no call even if it reads like one."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        encode = partial(self._tokenizer, result_of(asked), **options)
        text = (await asyncio.get_running_loop().run_in_executor(self._threads, encode)).input_ids
        said = Saying([*text, min(self.engine.backend.stop_token_ids)])
        if not asked.wanted_tokens:  # it costs no pass
            sampling = replace(sampling, max_tokens=max(1, min(self.engine.limits.new_tokens, self.room(ids))))
        generation = Generation().start(self.engine, ids, asked.model, sampling, actions=said)
        return await begun(LocalReply(generation, self.builder(asked, note, calls=False), began))

    async def _choices(self, asked: Asked, *, widely: bool = False) -> Actions | None:
        """What the device's answer is held to: the request's tools (``widely``: all that it knows), or what it knows."""
        if not isinstance(asked, ChatRequest):
            return self.actions
        if asked.tools is not None and asked.tool_choice == "none":
            return None
        if isinstance(self.actions, ActionTrie) and asked.offered is not None and asked.response_format is None:
            return self.actions if widely else self.actions.some(self.toolbox.chosen(asked).names)  # one action, as calibrated
        return await self.held(asked, device=True, widely=widely) or self.actions

    async def _held_to(self, asked: Asked, *, own: bool = False, widely: bool = False) -> Choices | None:
        """What one answer of the device is held to; ``own``: to what the device knows, whatever the request brings."""
        actions = self.actions if own else await self._choices(asked, widely=widely)
        if actions is None:
            return None
        prompt = request_text(asked, self._tokenizer)  # a second opinion on it takes some milliseconds
        return await asyncio.get_running_loop().run_in_executor(self._threads, actions.start, prompt)

    def _router(self, asked: Asked, *, calibrated: bool) -> Router:
        """The router of the request's tools."""
        parser = self.toolbox.parser(asked)
        return self.router if parser is None else Router(parser, self.router.calibration if calibrated else None)

    def _hinted(self, asked: Asked, note: dict[str, Any]) -> Asked:
        """The request with the name that the device is sure of, where the client lets others choose."""
        open_choice = isinstance(asked, ChatRequest) and asked.tools and asked.tool_choice in (None, "auto", "required")
        if not self.hint or not open_choice or "hint" not in note:
            return asked
        named = NamedTool(function=ToolName(name=note["hint"]))
        return asked.model_copy(update={"tool_choice": named, "parallel_tool_calls": False})

    async def _forward(
        self, asked: Asked, ids: list[int], note: dict[str, Any], began: float, declined: float | None = None
    ) -> Reply:
        """The cloud's answer; ``declined``: the probability of the device's ``[REMOTE]``, which goes along."""
        if self.cloud is None:
            raise CloudError(CLOUD_DOWN, "this edge server has no cloud")
        body = asked.model_dump(exclude_none=True, exclude={"route", "tools"}, by_alias=True)
        body.update(model=self.cloud_model)
        if isinstance(asked, ChatRequest) and asked.tools is not None:
            body["tools"] = asked.tools  # as they came
        # a default that does not fit here may not fit there either, and must not be the reason of a refusal
        default, own = self.default_tokens, dict[str, Any]()
        if not asked.wanted_tokens and default is not None and not 0 < self.room(ids) < default:
            own["max_tokens"] = default
        if asked.temperature is None:  # here that means greedy; another server, such as vLLM, would draw
            own["temperature"] = 0.0
        body |= {field: value for field, value in own.items() if field not in self._not_for_cloud}
        if isinstance(asked, ChatRequest):
            body["messages"] = with_system(body["messages"], self.system or None)  # else the cloud's own
        else:
            (body["prompt"],) = asked.prompt
        sent = time.monotonic()
        path = PATHS[isinstance(asked, ChatRequest)]
        declined = asked.declined if declined is None else declined  # a client may know more
        headers = {} if declined is None else {DECLINED: f"{declined:.6f}"}
        without: set[str] = set()
        while True:
            try:
                reply = await begun(ForwardedReply(self.cloud, path, body, asked.model, note, began, headers))
                break
            except CloudRefusedError as refusal:
                field, code = refusal.details.get("param"), refusal.details.get("code")
                if not isinstance(field, str) or field not in own or field not in body:
                    raise
                del body[field]
                if isinstance(code, str) and code.startswith("unsupported"):  # whatever its value
                    without.add(field)
        self._not_for_cloud |= without
        for field in without:
            _log.warning("the cloud takes no %s, which this edge added by itself; it goes without from now on", field)
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
        """The device's own answer, said to be one.

        Raises:
            CloudError: if that is to be refused, has to be a call and is none, or would be ``[REMOTE]`` and no more.
        """
        if self.when_down == "error":
            raise error
        wanted = {"wanted": note["reason"]} if note else {}
        note = {**note, "where": DEVICE, "reason": error.reason, "degraded": True, **wanted}
        if self._only_repeats(asked):
            return await self._last_words(asked, ids, sampling, note, began)
        lacks = self.toolbox.lacks(asked) is not None
        if generation is None and not (lacks and must_call(asked)):
            held = await self._held_to(asked, own=lacks)
            generation = Generation().start(self.engine, ids, asked.model, sampling, actions=held)
        if must_call(asked) and (generation is None or not await self._calls(asked, generation)):
            said = f"tool_choice asks for a call, for which the device has none, and {error}"
            raise CloudError(error.reason, said) from error
        assert generation is not None
        try:
            if self.cloud is not None and await self._only_hands_on(generation):
                said = f"the device hands this request on and has no answer of its own, and {error}"
                raise CloudError(error.reason, said) from error
        except BaseException:
            generation.__exit__()
            raise
        return await begun(LocalReply(generation, self.builder(asked, note), began))

    async def _only_hands_on(self, generation: Generation) -> bool:
        """Whether an answer is the ``[REMOTE]`` alone, which tells a client nothing; read no further than it takes to know."""
        tag = written(REMOTE)
        while generation.finish is None and tag.startswith(generation.text.strip()):
            await generation.next()
        return generation.text.strip() == tag

    async def _calls(self, asked: Asked, generation: Generation) -> bool:
        """Whether a whole answer is a call."""
        with generation:
            await generation.run()
        parser = self.toolbox.parser(asked)
        found = None if parser is None else parser.found(generation.text)
        return found is not None and bool(found.calls)
