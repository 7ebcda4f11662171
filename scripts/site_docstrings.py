"""What the site makes of docstrings (an extension of griffe, named in mkdocs.yml).

Docstrings here put several short entries of a section on one line; on a page each gets a line. Sphinx's roles become code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data):`(~?)([\w.]+)`")
_SECTION = re.compile(r"^( *)(Args|Attributes|Raises):\n((?:\1 +.*\n?|\n(?=\1 ))+)", re.MULTILINE)
_ERROR = r"[A-Z]\w*(?:Error|Interrupt)"


def tidy(text: str, names: list[str]) -> str:
    """``text`` with an entry a line in its sections; ``names`` are the parameters or attributes that may begin one."""

    def split(match: re.Match[str]) -> str:
        indent, title, body = match[1], match[2], match[3]
        begins = _ERROR if title == "Raises" else "|".join(map(re.escape, names)) or "(?!)"
        return f"{indent}{title}:\n" + re.sub(rf"(?<=[.;]) (?=(?:{begins}): )", f"\n{indent}    ", body)

    return _SECTION.sub(split, _ROLE.sub(lambda match: f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`", text))


class Tidy(griffe.Extension):
    """Applies :func:`tidy` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            own = list(getattr(obj, "parameters", [])) if obj.is_function else list(obj.members)
            names = [parameter.name for parameter in own] if obj.is_function else own
            if obj.is_class and "__init__" in obj.members:
                names += [parameter.name for parameter in obj.members["__init__"].parameters]
            obj.docstring.value = tidy(obj.docstring.value, names)
