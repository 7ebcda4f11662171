"""The edge server's page in a headless Chromium. pytest -m server; needs ``pip install playwright`` and a Chromium.

``SHADOWPEFT_SCREENSHOT`` names a PNG to write.
"""

import os
import shutil
from dataclasses import replace

import pytest

from serving import CALIBRATION, Scripted, attached, detached
from shadowpeft.data.robot import parse_action
from shadowpeft.serve.client import Breaker, CloudClient
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.drift import FEWEST
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.router import CLOUD, KNOWN, TAGGED, Decision, Router
from shadowpeft.serve.server import Settings, build
from webserver import Running

pytestmark = pytest.mark.server
playwright = pytest.importorskip("playwright.sync_api")
KEY = "user-key-0123456789"
TRAFFIC = {"reasons": {KNOWN: 80, TAGGED: 20}, "edges": [-1.0], "known": [0, 80]}


@pytest.mark.timeout(300)
def test_the_dialogue_its_route_and_its_time():
    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_file is None:
        pytest.skip("no Chromium")
    cloud_role = CloudRole(Engine(attached(max_position_embeddings=512), EngineLimits()), system=None, default_tokens=8)
    cloud = Running(build(cloud_role, Settings(Keys((KEY,), ()))))
    with cloud:
        link = CloudClient(cloud.url, KEY, breaker=Breaker(failures=1, pause=60), connect_timeout=2)
        role = EdgeRole(
            Engine(Scripted(detached()), EngineLimits()),
            Router(parse_action, replace(CALIBRATION, report={"traffic": TRAFFIC})),
            link,
            "late",
            system=None,
            default_tokens=64,
        )
        with Running(build(role, Settings(Keys((KEY,), ())))) as edge, playwright.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
            page = browser.new_context(
                http_credentials={"username": "me", "password": KEY}, viewport={"width": 760, "height": 560}
            ).new_page()
            errors, requests = [], []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(edge.url + "/")
            playwright.expect(page.locator("#state")).to_have_text("model edge, cloud: reachable", timeout=60_000)

            def say(text, where, *parts):
                page.fill("#text", text)
                page.click("button")
                row = page.locator("#dialogue li").last
                playwright.expect(row).to_have_attribute("data-done", "true", timeout=60_000)
                assert row.locator(".said").inner_text() == text
                assert row.locator(".badge").inner_text() == where
                told = row.locator(".meta").inner_text()
                assert all(part in told for part in parts), told
                return row.locator(".answer").inner_text()

            assert (
                say("Please sit", "device", "known skill", "action Sit", "confidence 1.00", "device ", "ms in all")
                == Scripted.LINES["sit"]
            )
            say("Are you unsure?", "cloud", "low confidence", "action Bark", "cloud ")
            say("<b>remote</b> & more", "cloud", "[REMOTE]")
            assert page.locator("#dialogue b").count() == 0  # what is said is text, not markup
            cloud.stop()
            say("remote again", "device", "cloud unavailable", "wanted the cloud: [REMOTE]")
            assert page.locator("#counts").inner_text() == "50 % of 4 on the device"
            playwright.expect(page.locator("#state")).to_have_text("model edge, cloud: unavailable", timeout=20_000)
            assert page.locator("#warning").is_hidden()
            for _ in range(FEWEST):
                role.drift.add(Decision(CLOUD, TAGGED, "REMOTE"))
            playwright.expect(page.locator("#warning")).to_contain_text("calibrate again", timeout=20_000)
            if os.environ.get("SHADOWPEFT_SCREENSHOT"):
                page.screenshot(path=os.environ["SHADOWPEFT_SCREENSHOT"])
            assert not errors
            assert all(url.startswith(edge.url) for url in requests)
            browser.close()
