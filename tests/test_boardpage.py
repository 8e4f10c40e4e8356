"""The page says what the boards say, holds everything that it needs, and shows texts from results as text."""

import base64
import hashlib
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from bench.boardpage import FOLDER, LARGEST, html_page
from bench.boards import make_boards
from bench.leaderboard import read_runs, write_boards
from bench.page.cells import Kept, script_json
from bench.page.pictures import entry, small
from bench.page.plots import LETTER, LINE, Axis, Candidate, Plot, frontier, make_plot, whiskers
from bench.records import Measurement, Row
from bench.results import ErrorRecord, ModelRecord, Result, StageRecord
from bench.stats import Estimate
from tests.test_leaderboard import NOISE, NONE, SHIELD, add, cell, ism, mean_of, record

REFERENCE = Path(__file__).parents[1] / "results/reference"
EVIL = "<script>alert(1)</script>"
OPEN = {"meta", "input", "br", "img", "link", "hr"}
"""Elements without an end tag."""


class Page(HTMLParser):
    """A page taken apart: what it holds, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] in self.raw:
            self.raw[self.stack[-1]].append(data)
        elif data.strip():
            self.texts.append(data.strip())

    def having(self, name: str) -> Iterator[str]:
        return (attrs[name] for _, attrs in self.elements if name in attrs)

    @property
    def data(self) -> Any:
        return json.loads(self.raw["script"][0])


def page_of(folder: Path, largest: int = LARGEST, images: dict[str, list[str]] | None = None) -> str:
    """``images``: by the name of a cell's folder, instead of those that its result names."""
    runs, notes = read_runs(folder)
    kept = [Kept(path, run.result.model_copy(update={"images": (images or {}).get(path.name, run.result.images)}))
            for path, run in runs.items()]
    return html_page(make_boards(folder.name, list(runs.values()), notes), kept, largest)


def purified(name: str) -> dict[str, Any]:
    return {"purifier": record("purifier", name, facts={"control": True} if name == "none" else {})}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Two attacks, one of them zero-shot and under two purifiers; visibility is measured; a defense knows the prompt;
    one that was protected on another model; one cell failed; a repaired model of another track."""
    folder = tmp_path / "grid"
    told = record("defense", "told", facts={"knows": ["prompt"]}, eps=16.0)
    adapter = record("attack", "adapter", facts={"needs": ["ip_image"]})
    for plugin, mean, seen in ((NONE, 0.6, 1.0), (NOISE, 0.6, 0.5), (SHIELD, 0.4, 0.6), (told, 0.3, 0.8)):
        visible = mean_of("ssim", [Row("0", f"s{s}", seen) for s in range(8)], True)
        cost = [StageRecord(stage="protect", key="k", seconds=4.0, peak_mb=512.0, reused=True),
                StageRecord(stage="customise", key="l", seconds=30.0)]
        add(folder, cell(plugin), ism(mean, plugin.name), visible, cost=cost)
        for purifier in ("none", "jpeg"):
            shift = 0.1 * (purifier == "jpeg")
            where = cell(plugin, id=f"{plugin.name}-{purifier}", attack=adapter, **purified(purifier))
            add(folder, where, ism(mean + shift, purifier), visible)
    add(folder, cell(SHIELD, surrogate=ModelRecord(name="other", digest="o")), ism(0.5, "o"))
    add(folder, cell(record("defense", "broken")), status="failed", error=ErrorRecord(type="ValueError", message="no"))
    for plugin, fired in ((NONE, 1.0), (record("defense", "mend"), 0.0)):
        add(folder, cell(plugin, track="backdoor", attack=record("attack", "implant")),
            mean_of("asr", [Row(str(i), f"{i}", fired) for i in range(8)], False, "share"))
    return folder


def paint(folder: Path, name: str, size: tuple[int, int] = (64, 128), seed: int = 0) -> Image.Image:
    """A picture beside a cell that no compression makes small."""
    (folder / "images").mkdir(exist_ok=True)
    image = Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))
    image.save(folder / "images" / name)
    return image


# The page as a document


def test_the_page_is_whole_and_needs_nothing_else(suite: Path) -> None:
    page = Page(page_of(suite))
    assert page.stack == []
    ids = list(page.having("id"))
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.having("href") if href.startswith("#")} <= set(ids)
    assert not [href for href in page.having("href") if "//" in href]
    assert not list(page.having("src"))
    assert not list(page.having("style"))
    assert not re.search(r"url\(|@import", page.raw["style"][0])
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert all(attrs.get("type") == "button" for tag, attrs in page.elements if tag == "button")


def test_only_its_own_script_and_style_may_run(suite: Path) -> None:
    page = Page(page_of(suite))
    policy = next(attrs["content"] for tag, attrs in page.elements if "Content-Security-Policy" in attrs.values())
    assert policy.startswith("default-src 'none'; img-src data:;")
    for kind, text in (("style", page.raw["style"][0]), ("script", page.raw["script"][1])):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy


def test_every_question_has_its_boards_in_order(suite: Path) -> None:
    page = Page(page_of(suite))
    asked = [attrs["id"] for tag, attrs in page.elements if tag == "section" and "id" in attrs]
    assert asked == [
        "customization", "customization-worst", "customization-mean", "customization-transfer",
        "customization-trained", "customization-zero_shot", "backdoor", "backdoor-repair", "all-cells"]


def test_a_line_unfolds_to_all_cells_behind_it(suite: Path) -> None:
    page = Page(page_of(suite))
    cells = page.data["cells"]
    assert len(cells) == len(read_runs(suite)[0])
    shown = [[cells[int(place)] for place in places.split()] for places in page.having("data-cells")]
    assert all(len({one["defense"] for one in line}) == 1 for line in shown)
    worst = next(line for line in shown if line[0]["defense"] == "shield")
    assert sorted((one["attack"], one["purifier"]) for one in worst) == [("adapter", "jpeg"), ("adapter", "none")]


def test_cells_say_where_they_came_from(suite: Path) -> None:
    data = Page(page_of(suite)).data
    runs = {run.result.cell.id: (path, run.result) for path, run in read_runs(suite)[0].items()}
    for one in data["cells"]:
        path, result = runs[one["id"]]
        assert suite / unquote(one["file"]) == path / "result.json"
        assert one["samples"] == result.samples.sha256
        hashes = [data["measures"][row[0]]["hash"] for row in one["numbers"]] if "numbers" in one else []
        assert hashes == [m.protocol_hash for m in result.measurements]
        assert [stage[1] for stage in one["stages"]] == [stage.key for stage in result.cost]
    assert any(one.get("error") == "ValueError: no" for one in data["cells"])


def test_costs_knowledge_and_controls_stand_on_the_board(suite: Path) -> None:
    text = page_of(suite)
    board = text[text.index('id="customization-trained"'):text.index('id="customization-zero_shot"')]
    told = next(row for row in board.split("<tbody") if ">told<" in row)
    assert ">prompt<" in told
    assert ">4.0 s<" in told
    assert ">512 MB<" in told
    assert ">30 s<" in told
    assert 'class="control"' not in told
    assert sum(row.startswith(' class="control"') for row in board.split("<tbody")) >= 2


def test_boards_of_one_attack_are_told_apart(tmp_path: Path) -> None:
    """By the parts of the protocol in which they differ, and by nothing else."""
    for told in (True, False):
        for plugin, mean in ((NONE, 0.6), (SHIELD, 0.4)):
            where = cell(plugin, id=f"{plugin.name}-{told}", protocol={"told": told, "steps": 20})
            add(tmp_path / "grid", where, ism(mean, plugin.name))
    add(tmp_path / "grid", cell(NONE, attack=record("attack", "other"), protocol={"told": True}), ism(0.6, "o"))
    titles = re.findall(r"<h4><a[^>]*>([^<]*)</a>", page_of(tmp_path / "grid"))
    assert sorted(titles) == ["other on tiny", "train on tiny, told False", "train on tiny, told True"]


def test_headings_that_are_no_plain_words_say_what_they_mean(suite: Path) -> None:
    text = page_of(suite)
    said = {name: title for title, name in re.findall(r'class="sort" title="([^"]+)">([^<]+)<', text)}
    assert {"rank", "ε", "P(best)", "rank 95 %", "Δ none", "Δ noise", "cost", "memory", "worst ↓"} <= set(said)
    assert "resampled" in said["rank 95 %"]
    assert said["Δ none"].startswith("paired difference to none")


def test_the_same_results_give_the_same_bytes(suite: Path) -> None:
    assert page_of(suite) == page_of(suite)


def test_the_page_is_written_with_the_others(suite: Path) -> None:
    write_boards(suite)
    assert (suite / "leaderboard.html").read_text().startswith("<!doctype html>")


def test_the_committed_quickstart_has_a_page() -> None:
    page = Page(page_of(REFERENCE / "quickstart"))
    assert {"customization", "backdoor"} <= set(page.having("id"))
    assert len(page.data["cells"]) == len(list((REFERENCE / "quickstart").glob("*/result.json")))


def test_making_no_page_imports_no_templates() -> None:
    code = "import sys, bench.leaderboard; print([m for m in ('jinja2', 'PIL', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_pages_own_files_ship() -> None:
    import tomllib

    whole = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    shipped = {path.name for pattern in whole["tool"]["setuptools"]["package-data"]["bench"]
               for path in FOLDER.parent.glob(pattern)}
    assert {"page.html", "page.css", "page.js"} <= shipped


# Text stays text


def test_texts_from_results_stay_text(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(2)>"
    evil = record("defense", EVIL, facts={"knows": ["\"><b>"], "summary": "</script><script>alert(3)</script>"})
    add(folder, cell(NONE), ism(0.5, "a"))
    where = folder / "evil"
    add(folder, cell(evil, id="evil"), ism(0.4, "b"), warnings=["<!--<script>"], stamp="<i>not</i>")
    assert where.is_dir()
    text = page_of(folder)
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [tag for tag, _ in page.elements if tag in ("img", "b", "i")]
    assert {EVIL, '"><b>', "<i>not</i>", folder.name} <= set(page.texts)
    assert "<!--<script>" not in text
    assert EVIL in [one["defense"] for one in page.data["cells"]]


def test_json_cannot_leave_its_script() -> None:
    value = {"a": "</script>", "b": "<!--", "c": "&amp; \u2028 ünï"}
    text = script_json(value)
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == value


# Pictures


def test_pictures_are_inside(suite: Path) -> None:
    where = next(path for path in sorted(read_runs(suite)[0]) if path.name.startswith("shield"))
    image = paint(where, "strip-a.png")
    page = Page(page_of(suite, images={where.name: ["strip-a.png", "strip-gone.png", "../../secret.png"]}))
    one = next(c for c in page.data["cells"] if "images" in c)
    found, gone, outside = one["images"]
    assert found["rows"] == ["original", "protected", "perturbation ×10", "generated"]
    kind, _, code = found["src"].partition(";base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(code)))
    assert kind == f"data:image/{shown.format.lower()}"
    assert shown.size == image.size == (found["width"], found["height"])
    pairs = zip(shown.convert("L").tobytes(), image.convert("L").tobytes(), strict=True)
    assert sum(abs(a - b) for a, b in pairs) / (64 * 128) < 25
    assert (gone["why"], outside["why"]) == ("not kept in this folder",) * 2
    assert "src" not in outside
    assert any("pictures not in this folder: 2" in text for text in page.texts)


def test_no_picture_outside_its_folder_is_read(tmp_path: Path) -> None:
    folder, other = tmp_path / "cell", tmp_path / "other"
    for each in (folder, other):
        each.mkdir()
    paint(other, "secret.png")
    (folder / "images").mkdir()
    (folder / "images/link.png").symlink_to(other / "images/secret.png")
    paint(folder, "own.png")
    for name in ("link.png", "../../other/images/secret.png", str(other / "images/secret.png")):
        assert entry(name, folder)[1] is None
    assert entry("own.png", folder)[1] == folder / "images/own.png"


def test_large_pictures_are_made_small_and_others_are_refused(tmp_path: Path) -> None:
    paint(tmp_path, "large.png", (1600, 400))
    found = small(tmp_path / "images/large.png")
    assert found is not None
    assert found[1:] == (768, 192)
    (tmp_path / "images/text.png").write_text("<svg onload=alert(1)>")
    assert small(tmp_path / "images/text.png") is None


def test_the_page_stays_within_its_size(suite: Path) -> None:
    folders = sorted(path.name for path in read_runs(suite)[0])
    for i, name in enumerate(folders):
        for part in "ab":
            paint(suite / name, f"strip-{part}.png", seed=i)
    images = {name: ["strip-a.png", "strip-b.png"] for name in folders}
    whole = Page(page_of(suite, images=images))
    embedded = [image for one in whole.data["cells"] for image in one["images"]]
    assert all("src" in image for image in embedded)
    bare = len(page_of(suite).encode())
    largest = bare + 20_000 + sum(len(image["src"]) for image in embedded) // 3
    text = page_of(suite, largest, images)
    assert len(text.encode()) <= largest
    page = Page(text)
    first, second = ([one["images"][i] for one in page.data["cells"]] for i in (0, 1))
    left = sum("src" not in image for image in [*first, *second])
    assert 0 < left < 2 * len(folders)
    assert not any("src" in image for image in second)
    assert any(f"pictures left out: {left} " in said for said in page.texts)
    assert all((suite / unquote(image["link"])).is_file() for image in [*first, *second])


def test_without_room_cells_are_named_and_linked(suite: Path) -> None:
    data = Page(text := page_of(suite, largest=1)).data
    assert not any("stages" in one for one in data["cells"])
    assert all((suite / unquote(one["file"])).is_file() for one in data["cells"])
    assert f"details left out of {len(data['cells'])} cells" in text


# Drawings


def test_whiskers_share_a_scale() -> None:
    scores = [Estimate(0.5, 0.2, 0.6, 9, 3), Estimate(0.1, None, None, 9, 2), None, Estimate(None, None, None, 0, 0)]
    first, bare, *none = whiskers(scores, 0.7)
    assert none == [None, None]
    assert first.reference == bare.reference == 115.0
    assert bare.at == 5.0
    assert (bare.low, bare.high) == (None, None)
    assert first.low < first.at < first.high < first.reference
    assert (first.at - first.low) / (first.high - first.at) == pytest.approx(3.0, rel=0.01)


def test_alike_values_can_be_drawn() -> None:
    assert whiskers([Estimate(0.0, 0.0, 0.0, 1, 3)], None)[0].at == pytest.approx(60.0)


def candidates(*points: tuple[float, float]) -> list[Candidate]:
    return [Candidate(str(i), False, x, Estimate(y, None, None, 1, 1)) for i, (x, y) in enumerate(points)]


def test_the_frontier_is_what_nobody_beats() -> None:
    up, down = Axis("u", "", True), Axis("d", "", False)
    points = candidates((1, 3), (2, 2), (3, 1), (1, 1), (2, 2), (0, 3))
    assert frontier(points, up, up) == {"0", "1", "2", "4"}
    assert frontier(points, up, down) == {"2"}
    assert frontier(points, down, up) == {"5"}


def test_better_is_up_and_right() -> None:
    plot = make_plot(candidates((1, 5), (2, 4), (4, 1)), Axis("ssim", "", True), Axis("ism", "", False))
    assert plot is not None
    worst, _, best = plot.marks
    assert best.x > worst.x
    assert best.y < worst.y
    assert [mark.frontier for mark in plot.marks] == [False, False, True]


def test_nothing_to_weigh_is_not_plotted() -> None:
    axis = Axis("a", "", True)
    assert make_plot(candidates((1, 2), (2, 1)), axis, axis) is None
    assert make_plot(candidates((1, 2), (1, 1), (1, 3)), axis, axis) is None


def test_labels_cover_neither_points_nor_each_other() -> None:
    draw = random.Random(3)
    points = [Candidate(f"method_{i}_micro", False, draw.random(), Estimate(draw.random(), None, None, 1, 1))
              for i in range(24)]
    axis = Axis("a", "", True)
    plot = make_plot(points, axis, axis)
    assert isinstance(plot, Plot)
    boxes = []
    for mark in plot.marks:
        if mark.text_x is not None and mark.text_y is not None:
            wide = len(mark.label) * LETTER
            left = mark.text_x - {"start": 0, "middle": wide / 2, "end": wide}[mark.anchor]
            boxes.append((left, mark.text_y - LINE + 3, left + wide, mark.text_y + 3))
    assert len(boxes) >= 18
    assert len(boxes) + len(plot.unlabelled) == 24
    for i, (a, b, c, d) in enumerate(boxes):
        assert not any(a < m.x < c and b < m.y < d for m in plot.marks)
        assert not any(a < x1 and x0 < c and b < y1 and y0 < d for x0, y0, x1, y1 in boxes[:i])


# Colours


def test_text_can_be_read_in_light_and_dark() -> None:
    style = (FOLDER / "page.css").read_text()
    light, dark = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})\b", part))
                   for part in style.split("prefers-color-scheme: dark")[:2])
    for colours in (light, dark):
        for text in ("ink", "soft", "accent"):
            for ground in ("paper", "raised", "sunk"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["warn"], colours["warn-soft"]) >= 4.5
        assert contrast(colours["focus"], colours["paper"]) >= 3


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_measurements_of_a_result_come_whole() -> None:
    """A missing value keeps its reason, a number six digits."""
    from bench.page.cells import Island, detailed
    from bench.results import measurement_record

    where = cell(SHIELD)
    made = [measurement_record(m, record("metric", m.name), where) for m in (
        Measurement("ism", 1 / 3, 3, "cosine", False), Measurement("psnr", None, 0, "dB", True, reason="identical"))]
    island = Island()
    told = detailed(Result(suite="s", cell=where, status="ok", measurements=made), island)
    assert told["numbers"] == [[0, 0.333333, None, None, 3, 0], [1, None, None, None, 0, 0, "identical"]]
    assert [one["name"] for one in island.measures.values] == ["ism", "psnr"]
