"""The one reader of JSON that somebody else wrote: whatever is wrong with it is a ``ValueError`` of one short clause."""

from __future__ import annotations

import json
import re
from typing import Any

from shadowpeft.messages import quote

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(content: bytes | str, **options: Any) -> Any:
    """What a JSON text says; a byte-order mark, as some editors write, is no data.

    Args:
        options: of :func:`json.loads`.

    Raises:
        ValueError: a clause that goes on after the name of the place: ``is not valid JSON (... at column 3)``.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text.rstrip(), **options)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error.reason})") from error
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        raise ValueError(f"is not valid JSON ({error.msg} at {line}column {error.colno}{_why(text, error.pos)})") from error
    except RecursionError as error:
        raise ValueError("nests brackets more deeply than can be read") from error
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise  # of a hook in the options
        raise ValueError("holds a number of more than 4,300 digits") from error
    return value


def _why(text: str, place: int) -> str:
    """What other readers would take at the place of an error, and JSON does not have: a comment, a comma before a bracket."""
    before, rest = text[:place].rstrip(), text[place:].lstrip()
    if rest.startswith(("//", "/*", "#")):
        return "; JSON has no comments"
    if re.match(r",\s*[]}]", rest) or (rest[:1] in ("]", "}") and before.endswith(",")):
        return "; JSON has no comma before a closing bracket"
    return ""


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As ``object_pairs_hook`` of :func:`parse_json`: an object must not name a key twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for n, key in enumerate(names) if key in names[:n])
        raise ValueError(f"names the key {quote(twice)} twice, of which one would be lost; keep one")
    return content
