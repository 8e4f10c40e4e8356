"""Progress says something now and then, and nothing too often."""

import io
import logging

import pytest

from bench.progress import Bars, Lines, eta, shown


def test_without_a_terminal_lines_come_rarely(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), shown("cell") as progress:
        assert isinstance(progress, Lines)
        for done in range(1001):
            progress("steps", done, 1000)
    assert caplog.messages == []


def test_a_line_tells_what_is_done_and_left(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines("cell", every=0.0)
    with caplog.at_level(logging.INFO):
        lines("steps", 0, 10)
        lines("steps", 5, 10)
        lines("steps", 10, 10)
    assert len(caplog.messages) == 2
    assert caplog.messages[0] == "cell: steps: 0 of 10"
    assert caplog.messages[1].startswith("cell: steps: 5 of 10, about 0:00 left")


def test_eta() -> None:
    assert eta(10, 1, 6) == ", about 1:00 left"
    assert eta(3600, 1, 2) == ", about 2:00:00 left"
    assert eta(10, 0, 6) == ""


def test_bars_come_and_go() -> None:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=io.StringIO(), force_terminal=True)) as drawn:
        bars = Bars("cell", drawn)
        bars("steps [red]", 1, 3)
        bars("images", 1, 2)
        assert [(t.description, t.completed, t.total) for t in drawn.tasks] == [
            ("cell: steps \\[red]", 1, 3), ("cell: images", 1, 2)]
        bars("steps [red]", 3, 3)
        assert [t.description for t in drawn.tasks] == ["cell: images"]
