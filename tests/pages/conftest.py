"""A real browser for the pages: Chromium and its driver as the system has them (Debian: chromium chromium-driver), led
by selenium (PyPI). Nothing is downloaded by a test: where one of them lacks, its tests are skipped and say so.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from base64 import b64decode
from pathlib import Path

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# the file alone is taken: axe-core (Deque), which this package carries
AXE = "axe_playwright_python"


class Browser:
    """One tab. Every address it asked for and every line of its console is kept."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, page: Path, width: int = 1100, dark: bool = False, scripts: bool = True) -> None:
        """Show a file at this width, px, in dark or light, with or without scripts."""
        tell = self.driver.execute_cdp_cmd
        tell("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        tell("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tell("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.requests(), self.console()  # those of the page before
        self.driver.get(Path(page).resolve().as_uri())

    def js(self, code: str, *args):
        """What a function body returns in the page."""
        return self.driver.execute_script(code, *args)

    def console(self) -> list[str]:
        """The console's errors and warnings since it was last asked."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """The addresses asked for since this was last asked, data: apart."""
        events = (json.loads(line["message"])["message"] for line in self.driver.get_log("performance"))
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        asked = [one["request"]["url"] for one in sent]
        return [url for url in asked if not url.startswith("data:")]

    def wider_than_its_window(self) -> float:
        """By how many px the page is wider than its window."""
        return self.js("return document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def violations(self, *rules: str) -> list[str]:
        """What axe finds, "rule: element"; all of WCAG 2.1 A and AA, or these rules alone."""
        found = importlib.util.find_spec(AXE)
        if found is None:
            pytest.skip(f"no {AXE} here, which carries axe-core: pip install --no-deps {AXE}")
        if not self.js("return Boolean(window.axe)"):
            axe = (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")
            # past the page's policy, which would not run it
            self.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
        only = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
        if rules:
            only = {"type": "rule", "values": rules}
        self.driver.set_script_timeout(120)
        return self.driver.execute_async_script(
            "const [only, done] = arguments;"
            "const told = rule => rule.nodes.map(node => `${rule.id}: ${node.html} ${node.any[0]?.message}`);"
            "axe.run(document, {runOnly: only}).then(found => done(found.violations.flatMap(told)))", only)

    def picture(self, file: Path, height: int | None = None) -> None:
        """A screenshot of the whole page, or of its first `height` px."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        Path(file).write_bytes(b64decode(shot["data"]))


@pytest.fixture(scope="session")
def browser():
    """A Browser; the test is skipped, and says why, where there is none."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                 "--disable-background-networking", "--no-first-run"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield Browser(opened)
    opened.quit()
