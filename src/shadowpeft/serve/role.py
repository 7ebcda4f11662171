"""What both roles of a server share: prompts, lengths, what an answer is held to, and how it will look."""

from __future__ import annotations

import asyncio
import copy
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shadowpeft.data.action_trie import Actions
from shadowpeft.data.chat import with_system
from shadowpeft.data.tools import Tools
from shadowpeft.errors import DataError
from shadowpeft.serve.answers import ResponseBuilder
from shadowpeft.serve.engine import Engine
from shadowpeft.serve.protocol import ChatRequest, CompletionRequest
from shadowpeft.serve.replies import Reply
from shadowpeft.serve.requests import SamplingParams, TooLongError
from shadowpeft.serve.toolbox import Toolbox

Asked = ChatRequest | CompletionRequest


class Role(ABC):
    """Makes an answer to a request.

    Args:
        system: system message for chats that bring none; None: the one that the model was trained under, if that is
            recorded; an empty one: none.
        default_tokens: longest answer where the request names no length; None: the engine's longest.
        tools: what the model was trained to call.
    """

    name: str
    reads_tools = False
    """Whether its prompts have room for the tools of a request."""

    def __init__(
        self, engine: Engine, *, system: str | None, default_tokens: int | None = None, tools: Tools | None = None
    ) -> None:
        self.engine, self.system, self.default_tokens = engine, system, default_tokens
        self._tokenizer = copy.deepcopy(engine.backend.tokenizer)  # the engine's thread uses the other
        vocabulary = engine.backend.model.config.get_text_config().vocab_size
        self.toolbox = Toolbox(self._tokenizer, vocabulary, tools, template=self.reads_tools)
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

    def system_for(self, asked: Asked) -> str | None:
        """The system message of a chat that brings none."""
        return self.engine.backend.system_message(asked.model) if self.system is None else self.system or None

    async def prompt(self, asked: Asked) -> list[int]:
        """The prompt's tokens.

        Raises:
            TooLongError: if it has so many characters that it must have too many tokens; it is not tokenized then.
        """
        texts = (
            [prompt for prompt in asked.prompt if isinstance(prompt, str)]
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
            (text,) = asked.prompt
            if not isinstance(text, str):
                return self._checked(text)
        else:
            turns = [m.model_dump(exclude={"name"}, exclude_none=True) for m in asked.messages]
            turns = with_system(turns, self.system_for(asked))
            text = self.toolbox.prompt(turns, asked)
        # a chat template writes the tokens of a beginning itself
        ids: list[int] = self._tokenizer(text, add_special_tokens=isinstance(asked, CompletionRequest)).input_ids
        return ids

    def _checked(self, ids: list[int]) -> list[int]:
        """Tokens that a client sent, if the model has them."""
        rows = self.engine.backend.model.config.get_text_config().vocab_size
        wrong = next((token for token in ids if not 0 <= token < rows), None)
        if wrong is not None:
            raise DataError(f"prompt has the token {wrong} but the model has those from 0 to {rows - 1}; send these")
        return ids

    async def held(self, asked: Asked, *, device: bool, widely: bool = False) -> Actions | None:
        """What the answer is held to; see :meth:`Toolbox.actions`."""
        if not isinstance(asked, ChatRequest) or (asked.tools is None and asked.response_format is None):
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: self.toolbox.actions(asked, device=device, widely=widely))

    def room(self, ids: list[int]) -> int:
        """Tokens that the model can still read after a prompt; negative if it is too long."""
        return self.engine.backend.max_model_len - len(ids)

    def sampling(self, asked: Asked, room: int | None = None) -> SamplingParams:
        """What the engine is told.

        Args:
            room: what a default length is cut to, if there is any; a length that the request names is not.
        """
        default = self.default_tokens or self.engine.limits.new_tokens
        if room is not None:
            default = max(1, min(default, room))
        return SamplingParams(
            max_tokens=asked.wanted_tokens or default,
            temperature=float(asked.temperature or 0.0),
            top_p=1.0 if asked.top_p is None else float(asked.top_p),
            seed=asked.seed,
            stop=asked.stops,
            top_logprobs=asked.wanted_logprobs or 0,
        )

    def builder(self, asked: Asked, note: dict[str, Any], *, calls: bool = True) -> ResponseBuilder:
        """How the answer will look; ``calls``: whether text of it may be a call."""
        parser = self.toolbox.parser(asked) if calls else None
        return ResponseBuilder(isinstance(asked, ChatRequest), asked.model, asked.wanted_logprobs, note, parser)
