"""The cloud: it answers by itself."""

from __future__ import annotations

import asyncio
import copy
import time

from shadowpeft.constrained import Chosen, choose_after
from shadowpeft.data.action_trie import Actions, ActionTrie, Choices
from shadowpeft.data.actions import REMOTE
from shadowpeft.data.call_form import COMPACT
from shadowpeft.data.call_guide import Grammar
from shadowpeft.data.declined import Beginnings, Declined, InWords, Voted, VotedCalls
from shadowpeft.data.tools import Tools
from shadowpeft.errors import ConfigError
from shadowpeft.serve.engine import Engine
from shadowpeft.serve.protocol import ChatRequest
from shadowpeft.serve.replies import Generation, LocalReply, Reply, begun
from shadowpeft.serve.role import Asked, Role
from shadowpeft.serve.router import BASE_PATH, CLOUD, LORA
from shadowpeft.serve.toolbox import must_call


class CloudRole(Role):
    """Answers with the attached model, or its base.

    Args:
        vote: actions, of tools with arguments their names; an adapter's own shadow weighs which of them, or none, the answer
            to a chat begins with.
    """

    name = "cloud"
    reads_tools = True
    _begin: asyncio.Future[Beginnings] | None = None
    """What an action can begin with, once a device has declined or a shadow votes."""

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None,
        default_tokens: int | None = None,
        tools: Tools | None = None,
        vote: ActionTrie | None = None,
    ) -> None:
        super().__init__(engine, system=system, default_tokens=default_tokens, tools=tools)
        self.vote = vote

    async def answer(self, asked: Asked) -> Reply:
        if asked.route == "device":
            raise ConfigError("route is 'device' but this is the cloud; ask the edge server, or leave route out")
        began = time.monotonic()
        self.toolbox.check(asked)
        ids = await self.prompt(asked)
        self.engine.check(len(ids), asked.model, 1)  # nothing below asks about a name that is not there
        held = await self.held(asked, device=False)
        drafts = asked.speculative if held is None else False  # drafts are free text
        actions: Choices | None
        name = asked.model
        if self._says_last_words(asked):
            name, actions = self.engine.backend.plain(name), InWords(await self._beginnings())
        elif held is None:
            actions = await self._weighed(asked, ids)
        else:
            actions = await self._calling(asked, ids, held)
        sampling = self.sampling(asked, self.room(ids))
        generation = Generation().start(self.engine, ids, name, sampling, actions=actions, speculative=drafts)
        note = {"where": CLOUD, "reason": self.engine.backend.reason(name)}
        return await begun(LocalReply(generation, self.builder(asked, note), began))

    def _says_last_words(self, asked: Asked) -> bool:
        """Whether the answer is about what a tool has said, and the model learnt calls in the compact form: a call for each
        request, so it would call again and again. Words are said then, by the base where it is there."""
        if not isinstance(asked, ChatRequest) or asked.messages[-1].role != "tool" or must_call(asked):
            return False
        known = self.toolbox.known is not None and self.toolbox.form(asked) is COMPACT
        return known and asked.response_format is None and self.engine.backend.reason(asked.model) in (BASE_PATH, LORA)

    async def _weighed(self, asked: Asked, ids: list[int]) -> Choices | None:
        """How the answer leans because a device found no action, or its own shadow would act; None: it leans nowhere."""
        backend = self.engine.backend
        chances = await self._vote_on(asked, ids)
        if self.vote is not None and chances is not None:
            if self.toolbox.known is None or self.toolbox.known.plain:
                return Voted(await self._beginnings(), self.vote, chances, asked.declined)
            calls = await asyncio.to_thread(self.toolbox.calls, self.toolbox.known, device=False, optional=True)
            declined = chances[REMOTE] if asked.declined is None else asked.declined
            return VotedCalls(await self._beginnings(), calls.start(), declined)
        if asked.declined is None or backend.reason(asked.model) not in (BASE_PATH, LORA):
            return None
        return Declined(await self._beginnings(), asked.declined)

    async def _calling(self, asked: Asked, ids: list[int], held: Actions) -> Choices:
        """What holds the answer to a request with tools or a form; where words may do, the shadow weighs whether it calls."""
        guide = held.start()
        if not isinstance(asked, ChatRequest) or not isinstance(held, Grammar) or not held.optional:
            return guide
        chances = await self._vote_on(asked, ids) if self.toolbox.form(asked) is COMPACT else None
        if chances is None:
            return guide
        calls = sum(chances.get(name, 0.0) for name in self.toolbox.chosen(asked).names)
        return VotedCalls(await self._beginnings(), guide, 1.0 - calls if asked.declined is None else asked.declined)

    async def _vote_on(self, asked: Asked, ids: list[int]) -> dict[str, float] | None:
        """The chances of the adapter's own shadow; None: nobody votes here."""
        if self.vote is None or not isinstance(asked, ChatRequest) or asked.messages[-1].role != "user":
            return None
        return await self._chances(self.vote, asked.model, ids)

    async def _chances(self, trie: ActionTrie, name: str, ids: list[int]) -> dict[str, float] | None:
        """What the shadow of ``name`` would do, asked between two steps of the engine; None: there is none, or no action fits
        behind the prompt."""
        if len(ids) + trie.longest > self.engine.backend.max_model_len:
            return None
        found: list[Chosen] = []

        def ask() -> None:
            self.engine.check(len(ids), name, 1)  # it may have gone meanwhile
            alone = self.engine.backend.shadow(name)
            found.extend([] if alone is None else choose_after(alone, [ids], trie, [trie]))

        await asyncio.wrap_future(self.engine.between(ask))
        return found[0].probabilities if found else None

    async def _beginnings(self) -> Beginnings:
        if self._begin is None:  # a second of work for a large vocabulary, once, and not in the threads that tokenize
            own = copy.deepcopy(self._tokenizer)
            self._begin = asyncio.ensure_future(asyncio.to_thread(Beginnings.of, own, self.toolbox.vocabulary))
        return await asyncio.shield(self._begin)
