"""What all bodies of requests have in common: unknown fields are refused by name, null means absent."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """Null means absent; what is not supported may be there as long as it asks for nothing."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields of the OpenAI API that are not supported, and their values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        for name, values in cls.neutral.items():
            given = content.get(name)
            # True is 1 for Python, not for JSON
            if given is not None and not any(
                given == v and isinstance(given, bool) == isinstance(v, bool) for v in values
            ):
                also = "".join(f" or send {json.dumps(value)}" for value in values[:1])
                raise invalid(f"asks for what this server does not do; leave it out{also}", name)
        return {name: value for name, value in content.items() if value is not None and name not in cls.neutral}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> Any:
        schema = handler.resolve_ref_schema(handler(core))
        schema["properties"] |= {name: {"enum": [None, *values]} for name, values in cls.neutral.items()}
        return schema


_SUBJECT = re.compile(r"^\w+ (?=should )")
"""Pydantic's name for the field."""


def remedy(problem: str) -> str:
    """What pydantic says of a value, in our words: without its subject, and with what to do."""
    return _SUBJECT.sub("", problem).replace(" after validation", "") + "; change it or leave it out"


def invalid(problem: str, *where: str) -> PydanticCustomError:
    """A refusal of the field ``where``, seen from the one that is validated."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem, "where": where})
