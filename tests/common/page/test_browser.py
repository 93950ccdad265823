"""The page in Chromium: it loads, sorts, filters, draws and finds every row."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 60
"""Seconds; other tests need the processor too."""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="there is no browser; apt-get install chromium chromium-driver",
)


class Browser:
    """Chromium without a window, and what it says about a page."""

    def __init__(self) -> None:
        options = ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = Chrome(options=options, service=ChromeService(DRIVER))

    def open(self, path: Path) -> None:
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def click(self, css: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", css)

    def write(self, css: str, text: str) -> None:
        self.run(
            "const it = document.querySelector(arguments[0]); it.value = arguments[1];"
            "it.dispatchEvent(new Event('input', {bubbles: true}))",
            css,
            text,
        )

    def shown(self, column: int = 0) -> list[str]:
        """Texts of a column of the table of all rows, of the rows that are shown."""
        script = (
            "return [...document.querySelectorAll('#all-rows tbody')].filter(one => !one.hidden)"
            ".map(one => one.rows[0].cells[arguments[0]].textContent.trim())"
        )
        return list(self.run(script, column))

    def wait(self, script: str) -> Any:
        return WebDriverWait(self.driver, PATIENCE).until(
            lambda driver: driver.execute_script(script)
        )

    def emulate(self, width: int, scheme: str = "light", media: str = "") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        given = {"media": media, "features": features}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", given)

    def background(self) -> str:
        return str(self.run("return getComputedStyle(document.body).backgroundColor"))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


def test_the_page_is_searched_sorted_and_read(
    browser: Browser, everything: Any, tmp_path: Path
) -> None:
    sources, html = everything
    rows = [one for source in sources for one in source.details]
    made = {one.row.stem for one in rows if one.parts}
    path = tmp_path / "index.html"
    path.write_text(html)
    browser.open(path)

    # Rows: those with a result, then all, then those of a choice and of words.
    assert {text.split()[-1] for text in browser.shown()} == made
    browser.click("[data-table=all-rows] input[type=checkbox]")
    assert len(browser.shown()) == len(rows)
    for one in rows[:: len(rows) // 15]:
        browser.write("[data-table=all-rows] input[type=search]", f"{one.row.stem} {one.short}")
        assert one.row.stem in {text.split()[-1] for text in browser.shown()}
    browser.write("[data-table=all-rows] input[type=search]", "NATURAL cifs")
    found = browser.shown()
    assert 0 < len(found) < len(rows)
    browser.write("[data-table=all-rows] input[type=search]", "no such row")
    assert browser.shown() == []
    browser.write("[data-table=all-rows] input[type=search]", "")
    browser.write("[data-table=all-rows] select[name=paper]", "wm")
    assert len(browser.shown()) == sum(one.package == "paper_wm" for one in rows)
    browser.write("[data-table=all-rows] select[name=paper]", "")

    # Columns: numbers from the highest, then from the lowest, without a number at the end.
    for is_up in (False, True):
        browser.click("#all-rows th:nth-child(3) button")
        texts = browser.shown(2)
        numbers = [float(text) for text in texts if text]
        assert len(numbers) == len(made)
        assert numbers == sorted(numbers, reverse=not is_up)
        assert texts[len(numbers) :] == [""] * (len(texts) - len(numbers))
    browser.click("#all-rows th:nth-child(1) button")
    assert browser.shown() == sorted(browser.shown(), key=str.lower)

    # Rows of a paper's table keep their lines.
    browser.click("#paper_cifs-table-1 th:nth-child(3) button")
    bodies = "return [...document.querySelectorAll('#paper_cifs-table-1 tbody')]"
    clean = browser.run(f"{bodies}.map(body => parseFloat(body.rows[0].cells[2].textContent))")
    assert len(clean) == 4
    assert clean == sorted(clean, reverse=True)
    for text in browser.run(f"{bodies}.map(body => body.textContent)"):
        assert text.index("last") < text.index("selected")

    # Details are opened by a link to them.
    for one in (one for one in rows if one.parts):
        browser.run("location.hash = arguments[0]", one.anchor)
        browser.wait(f"return document.getElementById('{one.anchor}').open")


def test_plots_are_drawn_and_tell_their_points(
    browser: Browser, everything: Any, tmp_path: Path
) -> None:
    path = tmp_path / "index.html"
    path.write_text(everything[1])
    browser.emulate(1280)
    browser.open(path)
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    count = browser.run("return document.querySelectorAll('.plot').length")
    assert count == sum(len(source.plots) for source in everything[0])
    browser.wait(
        f"return document.querySelectorAll('.plot .main-svg .scatterlayer').length == {count}"
    )
    point = browser.driver.find_element(By.CSS_SELECTOR, "#paper_cifs .plot .points path")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser.driver).move_to_element(point).perform()
    text = browser.wait("return document.querySelector('.hovertext')?.textContent")
    assert "worst case: " in text
    for width in (375, 820, 1280):
        browser.emulate(width)
        fits = f"document.documentElement.scrollWidth <= innerWidth && innerWidth == {width}"
        assert browser.wait(f"return {fits}")
        browser.wait(
            "return [...document.querySelectorAll('.plot')].every(box => {"
            "const drawn = box.querySelector('.main-svg').getBoundingClientRect();"
            "return drawn.height <= box.clientHeight && Math.abs(drawn.width - box.clientWidth) < 2"
            "})"
        )
        if width == 375:  # sentences need no scrolling sideways on a phone
            parents = "[...document.querySelectorAll('.prose')].map(one => one.parentElement)"
            assert browser.run(f"return {parents}.every(one => one.scrollWidth <= one.clientWidth)")
    assert browser.run("return performance.getEntriesByType('resource').map(one => one.name)") == []
    colors = []
    for scheme, media in (("light", ""), ("dark", ""), ("dark", "print")):
        browser.emulate(1280, scheme, media)
        colors.append(browser.background())
    assert colors[0] == colors[2] != colors[1]
    assert browser.complaints() == []


def test_scripts_of_strangers_do_not_run(
    browser: Browser, hostile: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "index.html"
    path.write_text(hostile[1])
    browser.open(path)
    browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    browser.wait("return document.querySelector('.plot .legendtext')")
    assert hostile[0].split()[0] in browser.run("return document.body.textContent")
    assert browser.run("return document.querySelectorAll('a:not([href^=\"#\"])').length") == 0
    assert browser.run("return window.ran") is None
    assert browser.complaints() == []
