"""A hook of the documentation site (mkdocs.yml): what pages link to outside docs/.

Pages name files of the repository (``../examples/home/home.yaml``). The site brings a copy of each under ``repository/``, so
that every link works from the disk; a folder becomes a list of its files.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "repository"
_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)


def outside(page: str, target: str) -> str | None:
    """The path from the repository's root that a link of the page ``docs/page`` leads to; None if it stays inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path == "docs" or path.startswith("docs/") else path


def place(path: str) -> str:
    """Where the site has a file of the repository. Markdown keeps its text: its own links would lead nowhere here."""
    folder = (ROOT / path).is_dir()
    return f"{REPOSITORY}/{path}/files.md" if folder else f"{REPOSITORY}/{path}{'.txt' if path.endswith('.md') else ''}"


def links_outside(page: str, text: str) -> set[str]:
    """Paths from the root of everything outside docs/ that a page links to, code left out."""
    parts = _FENCE.split(text)[::2]
    found = {outside(page, match[1]) for part in parts for match in _LINK.finditer(part)}
    return {path for path in found if path is not None}


def on_files(files: Files, config: Any) -> Files:
    """Bring what pages link to."""
    wanted: set[str] = set()
    for file in files.documentation_pages():
        wanted |= links_outside(file.src_uri, file.content_string)
    for path in sorted(wanted):
        source = ROOT / path
        if source.is_dir():
            inside = sorted(each for each in source.iterdir() if each.is_file())
            lines = [f"# {path}", "", *(f"- [{each.name}]({Path(place(each.name)).name})" for each in inside)]
            page = "---\nsearch:\n  exclude: true\n---\n" + "\n".join(lines) + "\n"
            level = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place(path), content=page, inclusion=level))
            wanted_here = [f"{path}/{each.name}" for each in inside]
        elif source.is_file():
            wanted_here = [path]
        else:
            raise PluginError(f"a page links to '{path}', which is not in the repository; mend the link")
        for each in wanted_here:
            if files.get_file_from_path(place(each)) is None:
                files.append(File.generated(config, place(each), abs_src_path=str(ROOT / each)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the copies."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[1])
        return match[0] if path is None else posixpath.relpath(place(path), here or ".")

    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(moved, part) for i, part in enumerate(parts))


def on_post_build(config: Any) -> None:
    """Every link that leads into the site leads to a file: the last look, at what was written."""
    site = Path(config.site_dir)
    missing = [
        f"{file.relative_to(site)} -> {target}"
        for file in sorted(site.rglob("*.html"))
        if file.name != "404.html"  # its links are from the server's root
        for target in re.findall(r'(?:href|src)="([^"#?:]+)(?:[#?][^"]*)?"', file.read_text(encoding="utf-8"))
        if not Path(os.path.normpath(file.parent / target)).exists()
    ]
    if missing:
        raise PluginError(f"{len(missing)} links of the site lead nowhere: {'; '.join(missing[:10])}")
