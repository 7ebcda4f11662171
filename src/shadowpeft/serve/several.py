"""Several answers to one request: for each of its prompts, and each prompt ``n`` times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from shadowpeft.serve.answers import usage
from shadowpeft.serve.protocol import ChatRequest, CompletionRequest
from shadowpeft.serve.replies import Reply

Asked = ChatRequest | CompletionRequest


def single(asked: Asked) -> list[Asked]:
    """Requests for one answer each, in the order of the answers' ``index``: what ``asked`` wants."""
    prompts: list[Any] = [None] if isinstance(asked, ChatRequest) else [[prompt] for prompt in asked.prompt]
    wanted: list[Asked] = []
    for prompt in prompts:
        for turn in range(asked.n or 1):
            more: dict[str, Any] = {"n": None} if prompt is None else {"n": None, "prompt": prompt}
            if asked.seed is not None:
                more["seed"] = (asked.seed + turn + (1 << 63)) % (1 << 64) - (1 << 63)  # stays one
            wanted.append(asked.model_copy(update=more))
    return wanted


async def answer_all(answer: Callable[[Asked], Awaitable[Reply]], wanted: list[Asked], waiting: int) -> list[Reply]:
    """A reply to each; raises what the first that fails raises, and gives up the others then.

    Args:
        waiting: how many wait at a time, so that they do not fill the queue against each other.
    """
    turn = asyncio.Semaphore(waiting)

    async def begun(each: Asked) -> Reply:
        async with turn:
            return await answer(each)

    tasks = [asyncio.ensure_future(begun(each)) for each in wanted]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for made in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(made, Reply):
                made.close()
        raise


class SeveralReplies(Reply):
    """The replies to one request as one.

    Args:
        replies: which have begun, in the order of ``index``. each: how many there are for each prompt.
    """

    def __init__(self, replies: list[Reply], each: int, began: float) -> None:
        super().__init__({key: _joined(replies, key) for key in ("where", "reason")}, began)
        self.replies, self.each = replies, each

    @property
    def parts(self) -> list[Reply]:
        return self.replies

    async def begin(self) -> None:
        """Nothing: they have begun."""

    async def whole(self) -> dict[str, Any]:
        answers = await asyncio.gather(*(reply.whole() for reply in self.replies))
        choices = [_numbered(answer["choices"][0], n, answer) for n, answer in enumerate(answers)]
        return {**answers[0], "choices": choices, "usage": self._count(), "shadowpeft": self.note}

    async def chunks(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        head: dict[str, Any] = {}
        for n, reply in enumerate(self.replies):
            async for chunk in reply.chunks(False):
                head = head or {key: chunk[key] for key in ("id", "created", "model", "object") if key in chunk}
                choices = [_numbered(choice, n, chunk) for choice in chunk["choices"]]
                rest = {key: value for key, value in chunk.items() if key not in ("choices", "shadowpeft")}
                yield {**rest, **head, "choices": choices, **({"usage": None} if with_usage else {})}
        if with_usage:
            yield {**head, "choices": [], "usage": self._count(), "shadowpeft": self.note}

    def close(self) -> None:
        for reply in self.replies:
            reply.close()

    def _count(self) -> dict[str, Any] | None:
        """Tokens of all answers; a prompt that was answered several times counts once. None: a cloud did not say."""
        known = [reply.counts for reply in self.replies if reply.counts is not None]
        if len(known) < len(self.replies):
            return None
        details = [count.get("completion_tokens_details") or {} for count in known]
        accepted, rejected = (
            sum(detail.get(f"{kind}_prediction_tokens") or 0 for detail in details) for kind in ("accepted", "rejected")
        )
        prompt = sum(count["prompt_tokens"] for count in known[:: self.each])
        return usage(prompt, sum(count["completion_tokens"] for count in known), accepted + rejected, accepted)


def _numbered(choice: dict[str, Any], n: int, answer: dict[str, Any]) -> dict[str, Any]:
    """A choice with its place, and what was said of its answer."""
    note = {"shadowpeft": answer["shadowpeft"]} if "shadowpeft" in answer else {}
    return {**choice, "index": n, **note}


def _joined(replies: list[Reply], key: str) -> str:
    """What all of them say, each once."""
    return ", ".join(dict.fromkeys(str(reply.note[key]) for reply in replies))
