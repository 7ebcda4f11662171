"""The corpus from Debian's documentation: what becomes a document, in which language, and what is left out."""

import gzip
import json

import pytest
from scripts import debian_corpus
from scripts.debian_corpus import Seen, build, document, files, is_held_out, language, paragraphs

PROSE = (
    "The shadow of the tree is long in the evening, and it is not easy to say where it ends. "
    "A path goes from the house to the hill, as it was built by those who live there."
)


def test_html_gives_running_text_without_code_and_navigation():
    left_out = f"<nav><p>{PROSE}</p></nav><script>x</script><pre>ls -l</pre>"
    page = f"<html>{left_out}<p>A  first\nparagraph.</p><ul><li><p>Point.</p></li></ul>"
    assert paragraphs(page, ".html") == ["A first paragraph.", "Point."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, "en"),
        ("这是一个关于机器狗的文档,它说明如何走路。", "zh"),
        ("Der Schatten des Baumes ist am Abend lang, und niemand weiss, wo er endet.", None),
        ("0x1f 0x2e 0x3d; 12.5 | 13.5 | 14.5 -- [ok]", None),
        ("", None),
    ],
)
def test_languages(text, expected):
    assert language(text) == expected


def test_what_came_before_is_left_out():
    seen = Seen()
    text = "\n\n".join([PROSE, *(f"{PROSE} And this is number {n} of them." for n in range(4))])
    kind, first = document(text, ".txt", seen)
    assert kind == "en"
    assert first.count("And this is number") == 4
    assert document(text.replace("  ", " ").upper(), ".txt", seen) is None
    assert document(text + "\n\nA short end.", ".txt", seen) is None  # too little is new


def test_a_corpus_of_a_local_package(tmp_path, monkeypatch):
    root = tmp_path / "root" / "usr" / "share" / "doc"
    root.mkdir(parents=True)
    pages = [f"<p>{PROSE} Page {n}.</p>" + "".join(f"<p>{PROSE} {n}, {m}.</p>" for m in range(5)) for n in range(120)]
    for n, page in enumerate(pages):
        (root / f"{n:03}.html").write_text(page)
    with gzip.open(root / "zh.txt.gz", "wt", encoding="utf-8") as handle:
        handle.write("\n\n".join(f"这是第{n}段关于机器狗走路和坐下的文字,它说明如何使用。" for n in range(9)))
    (root / "code.c").write_text(PROSE * 9)
    monkeypatch.setattr(debian_corpus, "fetched", lambda package, folder: (tmp_path / "root", "1.0"))
    counts = build(tmp_path / "made", ["example"])
    assert counts["packages"] == {"example": {"version": "1.0", "documents": 121}}
    made = [(tmp_path / "made" / "en" / f"{part}.jsonl.gz").read_bytes() for part in ("train", "validation")]
    rows = [json.loads(line) for part in made for line in gzip.decompress(part).splitlines()]
    assert len(rows) == 120
    assert {row["source"] for row in rows} == {"example"}
    held = [row for row in rows if is_held_out(row["text"])]
    assert len(held) == counts["files"]["en/validation"]["documents"] > 0
    assert counts["files"]["zh/train"]["documents"] == 1
    again = build(tmp_path / "again", ["example"])
    assert again["files"] == counts["files"]
    assert not [path for path, _, _ in files(root) if path.suffix == ".c"]
