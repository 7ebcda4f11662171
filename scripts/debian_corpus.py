"""A corpus for pretraining from documentation packages of Debian: ``python -m scripts.debian_corpus FOLDER [--only PACKAGES]``.

``apt-get download`` fetches each package by name (no root needed, on Debian or Ubuntu), ``dpkg-deb`` unpacks it beside, and its
HTML, text and Info files become documents: one file, one document. Kept is running text in English or Chinese. A paragraph that
was seen before is left out, so that menus, licences and second editions count once. A fiftieth of the documents, drawn by
their text, is held out. Writes ``en`` and ``zh`` with ``train.jsonl.gz`` and ``validation.jsonl.gz`` (fields ``text``,
``source``, ``doc``), as ``shadowpeft pretrain`` reads them, and ``counts.json``: packages, their versions, documents, tokens.
Needs beautifulsoup4, which is in the extra ``dev``.
The texts have the licences of their packages (``/usr/share/doc/PACKAGE/copyright`` in each) and are not ours to publish.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from rich.progress import track

from shadowpeft.errors import ConfigError, DataError
from shadowpeft.storage import whole, write_json
from shadowpeft.tokenizer import load_tokenizer

LIST = Path(__file__).with_name("debian_packages.txt")
"""Names of packages in Debian 12, one a line."""
ENDINGS = (".html", ".htm", ".page", ".txt", ".rst", ".info")
LEAST_CHARACTERS, LEAST_PARAGRAPH = 400, 30
HELD_OUT = 50
"""One document in so many."""
_FUNCTION_WORDS = frozenset(
    ("the", "of", "and", "to", "a", "in", "is", "that", "for", "it", "as", "with", "be", "on", "are", "this", "by", "or", "not")
)
_WORD, _HAN = re.compile(r"[A-Za-z']+"), re.compile(r"[\u3400-\u9fff]")
_BLOCKS = ["p", "li", "dd", "dt", "h1", "h2", "h3", "h4", "td", "blockquote", "title"]


@dataclass
class Seen:
    """Paragraphs and documents so far."""

    paragraphs: set[bytes] = field(default_factory=set)

    def fresh(self, paragraph: str) -> bool:
        """Whether the paragraph, whatever its white space and case, has not come before; it has now."""
        digest = hashlib.sha256(" ".join(paragraph.lower().split()).encode()).digest()[:12]
        if digest in self.paragraphs:
            return False
        self.paragraphs.add(digest)
        return True


def language(text: str) -> str | None:
    """``en`` or ``zh``; None for anything else, and for what is no running text."""
    han, words = len(_HAN.findall(text)), _WORD.findall(text)
    if han > 0.2 * len("".join(text.split())):
        return "zh"
    letters = sum(map(len, words))
    if han or letters < 0.6 * len("".join(text.split())) or not words:
        return None
    return "en" if sum(word.lower() in _FUNCTION_WORDS for word in words) >= 0.15 * len(words) else None


def paragraphs(content: str, ending: str) -> list[str]:
    """Running text, block by block; of HTML without scripts, navigation and code."""
    if ending in (".html", ".htm", ".page"):
        soup = BeautifulSoup(content, "html.parser")
        for tag in soup(["script", "style", "nav", "pre", "code-block", "header", "footer", "form"]):
            tag.decompose()
        blocks = [block for block in soup.find_all(_BLOCKS) if block.find(_BLOCKS) is None]
        return [" ".join(block.get_text(" ").split()) for block in blocks]
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", content)]


def document(content: str, ending: str, seen: Seen) -> tuple[str, str] | None:
    """The language and text of a file; None if too little of it is running text that has not come before."""
    blocks = [block for block in paragraphs(content, ending) if len(block) >= LEAST_PARAGRAPH or _HAN.search(block)]
    kind = language("\n".join(blocks))
    if kind is None:
        return None
    text = "\n\n".join(block for block in blocks if seen.fresh(block))
    least = LEAST_CHARACTERS if kind == "en" else LEAST_CHARACTERS // 4
    return (kind, text) if len(text) >= least else None


def files(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Every readable file below ``root`` in order: path, its content, its ending without ``.gz``."""
    for file in sorted(root.rglob("*")):
        name = file.name.removesuffix(".gz")
        ending = next((e for e in ENDINGS if name.endswith(e)), "" if "/usr/share/games/fortunes/" in str(file) else None)
        if ending is None or not file.is_file() or file.is_symlink() or file.stat().st_size > 20_000_000:
            continue
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        try:
            yield file, raw.decode("utf-8"), ending
        except UnicodeDecodeError:
            yield file, raw.decode("latin-1"), ending


def fetched(package: str, folder: Path) -> tuple[Path, str]:
    """An unpacked package and its version.

    Raises:
        DataError: if apt-get knows no such package or cannot fetch it.
    """
    made = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.deb"))
    if made.returncode or len(archives) != 1:
        reason = (made.stderr.strip() or made.stdout.strip()).splitlines()[-1:]
        raise DataError(f"package {package} was not fetched ({' '.join(reason)}); run apt-get update, or leave it out")
    subprocess.run(["dpkg-deb", "-x", str(archives[0]), str(folder / "files")], check=True)
    return folder / "files", archives[0].name.split("_")[1].replace("%3a", ":")


def is_held_out(text: str) -> bool:
    """By the document's text alone, so that another list of packages moves no document."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def build(target: Path, packages: list[str]) -> dict[str, Any]:
    """Write the corpus; its counts."""
    seen, tokenizer = Seen(), load_tokenizer("smollm2-135m")
    counts: dict[str, Any] = {"packages": {}, "files": {}}
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for package in track(packages, "packages"):
        with tempfile.TemporaryDirectory() as scratch:
            root, version = fetched(package, Path(scratch))
            found = 0
            for file, content, ending in files(root):
                made = document(content, ending, seen)
                if made is not None:
                    found += 1
                    part = "validation" if is_held_out(made[1]) else "train"
                    row = {"text": made[1], "source": package, "doc": file.relative_to(root).as_posix()}
                    rows.setdefault((made[0], part), []).append(row)
            counts["packages"][package] = {"version": version, "documents": found}
    for (kind, part), own in sorted(rows.items()):
        file = target / kind / f"{part}.jsonl.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as beside, gzip.GzipFile(beside, "wb", mtime=0) as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in own)
        tokens = sum(len(tokenizer(row["text"], add_special_tokens=False)["input_ids"]) for row in track(own, f"{kind} {part}"))
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        size = sum(len(row["text"]) for row in own)
        counts["files"][f"{kind}/{part}"] = {"documents": len(own), "characters": size, "tokens": tokens, "sha256": sha}
    write_json(target / "counts.json", counts)
    return counts


def main() -> int:
    """0: done; 2: a package could not be fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="names of packages, with commas")
    chosen = parser.parse_args()
    try:
        counts = build(chosen.folder, chosen.only.split(",") if chosen.only else LIST.read_text().split())
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(counts["files"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
