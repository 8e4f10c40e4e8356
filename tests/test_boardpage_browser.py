"""The page in a real browser, opened from a file: it sorts, filters, unfolds, fits a phone, and runs nothing that
results say. Skipped where Chromium and its driver are not installed."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_boardpage import EVIL, REFERENCE, page_of
from tests.test_leaderboard import NONE, add, cell, ism, record

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
exceptions = pytest.importorskip("selenium.common.exceptions", reason="selenium is not installed")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [pytest.mark.timeout(900),
              pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or its driver is not installed")]
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")
PATIENCE = 280
"""Seconds that a slow machine may take to start the browser, or to draw a page."""
COMMITTED = sorted(path.parent.name for path in REFERENCE.glob("*/leaderboard.json"))
ENTER, SPACE, BACKSPACE = "\ue007", "\ue00d", "\ue003"
"""Keys, as WebDriver calls them."""
PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    made.command_executor.client_config.timeout = PATIENCE
    made.set_page_load_timeout(PATIENCE)
    yield made
    made.quit()


class Opened:
    """A page on a screen of some size."""

    def __init__(self, driver: Any, file: Path) -> None:
        self.driver = driver
        self.resize(DESK)
        driver.get(file.as_uri())

    def resize(self, size: tuple[int, int]) -> None:
        width, height = size
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE})

    def prefer(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def ask(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def press(self, element: Any, keys: str) -> None:
        """Keys on what has the focus."""
        self.driver.execute_script("arguments[0].focus()", element)
        self.driver.switch_to.active_element.send_keys(keys)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def open_page(driver: Any, tmp_path: Path) -> Callable[[Path], Opened]:
    def opened(folder: Path) -> Opened:
        file = tmp_path / "leaderboard.html"
        file.write_text(page_of(folder), encoding="utf-8")
        return Opened(driver, file)

    return opened


MAIN = "main table.main"
ORDER = ("[...document.querySelector(arguments[0]).tBodies].map("
         "b => b.rows[0].cells[arguments[1]].dataset.o).filter(o => o !== '').map(Number)")
ROWS = "[...document.querySelectorAll('table.main > tbody')].filter(b => b.checkVisibility()).map(b => b.innerText)"


def check_sorting(page: Opened) -> None:
    """By keyboard, both ways; only one heading says that it sorts."""
    heads = page.ask(f"[...document.querySelectorAll('{MAIN} thead:first-of-type th')].map(h => h.textContent)")
    place = next(i for i, text in enumerate(heads) if text == "attack cost")
    button = f"{MAIN} thead th:nth-child({place + 1}) button"
    before = page.ask(ORDER, MAIN, place)
    assert len(set(before)) > 1
    page.press(page.find(button), ENTER)
    assert page.ask(ORDER, MAIN, place) == sorted(before)
    page.find(button).click()
    assert page.ask(ORDER, MAIN, place) == sorted(before, reverse=True)
    said = page.ask("[...document.querySelector(arguments[0]).querySelectorAll('th')].map(h => h.ariaSort)", MAIN)
    assert [one for one in said if one not in (None, "none")] == ["descending"]


def check_filtering(page: Opened) -> None:
    """By a defense's name, and without controls."""
    word = page.ask("document.querySelector('table.main tbody:not(.control) .open').textContent.split(' ')[0]")
    everything = page.ask(ROWS)
    page.press(page.find("#filter"), word)
    found = page.ask(ROWS)
    assert 0 < len(found) < len(everything)
    assert all(word in row for row in found)
    page.press(page.find("#filter"), BACKSPACE * len(word))
    assert page.ask(ROWS) == everything
    controls = page.ask("document.querySelectorAll('table.main > tbody.control').length")
    page.press(page.find("#controls"), SPACE)
    assert page.find("#controls").get_attribute("aria-pressed") == "false"
    assert controls > 0
    assert len(page.ask(ROWS)) == len(everything) - controls
    page.press(page.find("#controls"), SPACE)


DATA = "JSON.parse(document.getElementById('data').textContent).cells"
BEHIND = "arguments[0].dataset.cells.split(' ').map(place => " + DATA + "[Number(place)])"


def check_unfolding(page: Opened) -> None:
    """By keyboard: a line shows its cells, with pictures and where they came from, and folds again."""
    kept = page.ask(f"{DATA}.map((cell, place) => [String(place), (cell.images || []).some(i => i.src)])"
                    ".filter(([, has]) => has).map(([place]) => place)")
    script = ("[...document.querySelectorAll('table.main .open')].findIndex(b => !arguments[0].length || "
              "b.dataset.cells.split(' ').some(place => arguments[0].includes(place)))")
    line = page.ask("[...document.querySelectorAll('table.main .open')][arguments[0]]", page.ask(script, kept))
    page.press(line, ENTER)
    assert line.get_attribute("aria-expanded") == "true"
    text = page.ask("document.querySelector('.panel').textContent")
    behind = page.ask(BEHIND, line)
    shown = next((c for c in behind if any("src" in i for i in c.get("images", []))), behind[0])
    assert shown["id"] in text
    assert "commit" in text
    assert all(stage[1] in text for stage in shown["stages"])
    assert (seen(page) > 0) is bool(kept)
    page.press(line, ENTER)
    assert page.ask("document.querySelectorAll('.panel').length") == 0


def seen(page: Opened) -> int:
    """Pictures on the page, each of which was decoded."""
    pictures, until = "[...document.querySelectorAll('.panel img')]", time.monotonic() + 60
    while not page.ask(f"{pictures}.every(i => i.complete)") and time.monotonic() < until:
        time.sleep(0.1)
    assert page.ask(f"{pictures}.every(i => i.naturalWidth > 0)")
    return int(page.ask(f"{pictures}.length"))


def check_phone(page: Opened) -> None:
    """No sideways scrolling, folded or unfolded, and every board can still be sorted."""
    page.resize(PHONE)
    page.driver.execute_script("document.querySelector('table.main .open').click();"
                               "document.querySelectorAll('details.more').forEach(d => d.open = true)")
    assert page.ask("document.documentElement.scrollWidth") <= PHONE[0]
    assert page.find(f"{MAIN} .sort").is_displayed()
    page.resize(DESK)


def check_schemes(page: Opened) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        colours.append(page.ask("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(252, 252, 250)", "rgb(19, 21, 25)"]


@pytest.mark.parametrize("suite", COMMITTED)
def test_the_page_of_a_committed_suite(open_page: Callable[[Path], Opened], suite: str) -> None:
    page = open_page(REFERENCE / suite)
    assert suite in page.driver.title
    check_sorting(page)
    check_filtering(page)
    check_unfolding(page)
    check_phone(page)
    check_schemes(page)
    assert page.ask("performance.getEntriesByType('resource').map(e => e.name)"
                    ".filter(name => !name.startsWith('data:'))") == []
    assert page.errors() == []


def test_a_name_that_is_a_script_is_shown_as_text(open_page: Callable[[Path], Opened], tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(2)>"
    evil = record("defense", EVIL, facts={"knows": ["</td><img src=x onerror=alert(3)>"], "summary": EVIL})
    add(folder, cell(NONE), ism(0.5, "a"))
    add(folder, cell(evil, id="evil"), ism(0.4, "b"), warnings=["</script><script>alert(4)</script>"])
    page = open_page(folder)
    page.driver.execute_script("document.querySelectorAll('.open').forEach(b => b.click())")
    assert EVIL in page.ask("document.querySelector('table.main').innerText")
    assert EVIL in page.ask("document.querySelector('.panel').textContent")
    assert page.ask("document.querySelectorAll('script').length") == 2
    assert page.ask("document.querySelectorAll('img').length") == 0
    with pytest.raises(exceptions.NoAlertPresentException):
        _ = page.driver.switch_to.alert
    assert page.errors() == []
