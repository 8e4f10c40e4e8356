"""Send a results folder to Weights & Biases after it was made: its cells, its board, and where its files lie.

W&B is a mirror. Nothing here changes a result; what could not be sent is told, and the same command sends only that.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.files import write_atomically
from bench.identity import digest, file_digest
from bench.planner import PLAN, result_of
from bench.results import IMAGES, RESULT, SAMPLES, read_result, result_folders, rows_of
from bench.tracking import WandbTracker, referring

OWN, SENT = "wandb", "sent.json"
"""In a suite's folder: where W&B keeps its files; and in that, what was sent."""
PATIENCE = 2
"""Failures in a row after which W&B is taken to be down."""
MOST = 10_000
"""Rows of a table; W&B shows no more."""
NAMES = ("board", "model", "data", "defense", "surrogate", "seeds", "protocol_hash")
"""Columns of ``leaderboard.csv`` that are names even where all of them look like numbers."""
DIFFERENCES = ("control_name", "difference", "difference_low", "difference_high", "difference_units", "p", "mark",
               "p_holm", "detectable")
"""Those of a comparison with one control, of which a line may have several."""

log = logging.getLogger(__name__)


@dataclass
class Sent:
    """What became of each cell, and of the board, which is called by its suite. ``failed``: with the reason."""

    new: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def told(self) -> str:
        """One line for people."""
        counts = {"sent": self.new, "sent before": self.before, "failed": self.failed, "not tried": self.left}
        return ", ".join(f"{len(names)} {what}" for what, names in counts.items() if names) or "nothing to send"


@dataclass
class Ledger:
    """What was sent where: name -> target -> digest of what was sent. Written after each, so that nothing is sent twice
    when a run is interrupted."""

    file: Path
    target: str
    known: dict[str, dict[str, str]] = field(default_factory=dict)

    def has(self, name: str, content: str) -> bool:
        return self.known.get(name, {}).get(self.target) == content

    def add(self, name: str, content: str) -> None:
        self.known.setdefault(name, {})[self.target] = content
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps(self.known, indent=1, sort_keys=True))


def send_suite(folder: Path, tracker: WandbTracker, tell: Callable[[str], None]) -> Sent:
    """Send every cell of a suite that was not sent yet as it is now, then its board.

    A cell's run has the cell's identity as its id, so one that is sent again updates its run. ``tell`` gets a line for
    each failure.
    """
    tracker = replace(tracker, files=folder)
    ledger = open_ledger(folder, tracker)
    sent, failures = Sent(), 0
    for name, content, send in parcels(folder, tracker):
        if ledger.has(name, content):
            sent.before.append(name)
        elif failures >= PATIENCE:
            sent.left.append(name)
        elif error := attempt(send, folder, name):
            failures += 1
            sent.failed[name] = error
            tell(f"{name}: {error}")
        else:
            failures = 0
            sent.new.append(name)
            ledger.add(name, content)
    return sent


def open_ledger(folder: Path, tracker: WandbTracker) -> Ledger:
    """What was sent from a folder, for this tracker's target."""
    file = folder / OWN / SENT
    target = "/".join([tracker.mode, tracker.entity or "", tracker.project])
    try:
        known = json.loads(file.read_text())
    except FileNotFoundError:
        known = {}
    except ValueError as error:
        raise BenchError(f"send: {file} cannot be read ({error}); remove it to send everything again.") from error
    return Ledger(file, target, known)


def parcels(folder: Path, tracker: WandbTracker) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """What there is to send: name, digest of its content, and what sends it."""
    for path in result_folders(folder):
        if not (tracker.mode == "offline" and mirrored_when_run(path)):
            yield path.name, file_digest(path / RESULT), partial(send_cell, path, tracker)
    content = digest([file_digest(path / RESULT) for path in result_folders(folder)])
    yield folder.name, content, partial(send_board, folder, tracker)


def mirrored_when_run(path: Path) -> bool:
    """Whether the cell's own run lies beside it, as sweeps with ``tracker.wandb=offline`` leave it."""
    return any(path.glob(f"{OWN}/offline-run-*/run-{path.name}.wandb"))


def attempt(send: Callable[[], None], folder: Path, name: str) -> str:
    """Send one thing; why it failed, or ""."""
    try:
        send()
    except Exception as error:  # whatever W&B or the network raises, the others must have their turn
        log.debug("send: %s in %s", name, folder, exc_info=True)
        return f"{type(error).__name__}: {error}"
    return ""


def send_cell(path: Path, tracker: WandbTracker) -> None:
    """One cell as it would have been mirrored when it ran."""
    result = read_result(path)
    images = {name.removesuffix(".png"): path / IMAGES / name for name in result.images}
    drop_outdated(tracker, result.cell.id)
    tracker.record(result, rows_of(result, path), {k: v for k, v in images.items() if v.is_file()}, path)


def drop_outdated(tracker: WandbTracker, id: str) -> None:
    """Remove the offline run that an earlier result of this id left, lest two be uploaded under one id."""
    if tracker.mode == "offline" and tracker.files:
        for file in tracker.files.glob(f"{OWN}/offline-run-*/run-{id}.wandb"):
            shutil.rmtree(file.parent)


def send_board(folder: Path, tracker: WandbTracker) -> None:
    """The suite's leaderboard as tables: who ranks where, and every measurement behind it; and where its files lie."""
    from bench.leaderboard import texts

    results = [result for path in result_folders(folder) if (result := result_of(path))]
    _, made = texts(folder, ["leaderboard.csv"])
    rows = board_rows(made["leaderboard.csv"])
    id = digest(["leaderboard", folder.name])
    drop_outdated(tracker, id)
    with tracker.begin(id, folder, group=folder.name, job_type="leaderboard", name=f"leaderboard {folder.name}",
                       tags=["leaderboard"], config={"suite": folder.name}) as run:
        run.log({"leaderboard": table_of(ranking(rows)), "measurements": table_of(rows)})
        counts: dict[str, int] = Counter(result.status for result in results)
        run.summary.update({"cells": len(results), **counts})
        run.log_artifact(referring(f"suite-{folder.name}", "suite", suite_files(folder), {"cells": len(results)}))


def board_rows(text: str) -> list[dict[str, Any]]:
    """The rows of ``leaderboard.csv``; a column of numbers as numbers, None where one is missing."""
    rows: list[dict[str, Any]] = [dict(row) for row in csv.DictReader(io.StringIO(text))]
    for column in set(rows[0] if rows else ()) - set(NAMES):
        numbers = [_number(row[column]) for row in rows]
        if all(number is not None or not row[column] for number, row in zip(numbers, rows, strict=True)):
            for row, number in zip(rows, numbers, strict=True):
                row[column] = number
    return rows


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def ranking(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each line of each board the measurement that ranks, which comes first; without its differences to controls."""
    first: dict[str, str] = {}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        ranks = row["part"] == "board" and first.setdefault(row["board"], row["measurement"]) == row["measurement"]
        if ranks:
            kept = {k: v for k, v in row.items() if k not in DIFFERENCES}
            found.setdefault((row["board"], row["defense"], row["surrogate"]), kept)
    return list(found.values())


def table_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A W&B table of rows that have the same columns."""
    import wandb

    columns: list[str | int] = [*rows[0]] if rows else ["board"]
    return wandb.Table(columns=columns, data=[list(row.values()) for row in rows[:MOST]], allow_mixed_types=True)


def suite_files(folder: Path) -> dict[str, Path]:
    """The suite's own files and every cell's record and rows: name in the folder -> place."""
    cells = [path / name for path in result_folders(folder) for name in (RESULT, SAMPLES)]
    own = [folder / PLAN, *sorted(folder.glob("leaderboard.*"))]
    return {file.relative_to(folder).as_posix(): file for file in [*own, *cells] if file.is_file()}
