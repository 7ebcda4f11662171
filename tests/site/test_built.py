"""The site built strictly and opened from the disk, without a network. pytest -m site; needs shadowpeft[docs]."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytestmark = [pytest.mark.site, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_no_page_needs_another_place(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="https?://', text), page.name
        assert not re.search(r":(?:func|mod|class|meth):", text), page.name


def test_records_are_reachable_and_out_of_the_way(site):
    assert (site / "records" / "demo.json").is_file()
    assert (site / "repository" / "examples" / "home" / "train.jsonl").is_file()
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert "fixed-sequence testing" in index
    assert "repository/" not in index


def test_the_search_works_from_the_disk(site):
    api = pytest.importorskip("playwright.sync_api")
    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_file is None:
        pytest.skip("no Chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 1400, "height": 900}).new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.goto((site / "reference" / "package.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("fixed-sequence testing")
        first = page.locator(".md-search-result__item").first
        api.expect(first).to_contain_text("A bound that holds", timeout=60_000)
        first.locator("a").first.click()
        api.expect(page.locator("h1")).to_contain_text("Routing")
        assert wrong == []
        browser.close()
