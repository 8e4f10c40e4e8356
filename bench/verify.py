"""Is a results folder what it says it is? Compute again everything that can be, and name what does not agree.

A folder is ``claimed`` where something does not agree, ``consistent`` where everything that could be checked does, and
``reproduced`` where, on top, cells that were run again here came out the same (`bench.reproduce`). Hashes without a
key keep nobody from writing all of a folder anew: ``consistent`` means that its parts fit together, and only running
cells again says that they are true. No torch is imported here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench
from bench.config import SCHEMA_VERSION
from bench.errors import BenchError
from bench.findings import NO_IMAGES, Report, told
from bench.identity import digest, file_digest
from bench.planner import PLAN
from bench.plugin import REGISTRY
from bench.reproduce import OUTSIDE, drawn, metric_of, reproduce, used
from bench.results import (
    IMAGES,
    RESULT,
    CellRecord,
    MeasurementRecord,
    PluginRecord,
    Result,
    protocol_hash,
    read_result,
    result_folders,
    seal_of,
)
from bench.verify_boards import check_boards
from bench.verify_rows import check_rows, check_value
from bench.verify_sources import check_models, check_store

__all__ = ["Report", "reproduce_cells", "told", "verify_folder", "verify_suite"]


def verify_folder(folder: Path, store: Path | None = None, boards: bool = True) -> list[Report]:
    """Verify the suite in ``folder``, or every suite in it. ``store``: where artefacts lie, if they are at hand.
    ``boards``: make the leaderboard again, too, which takes longest.

    Raises BenchError where there is no suite.
    """
    suites = [folder] if list(result_folders(folder)) or (folder / PLAN).is_file() else sorted(
        {path.parent.parent for path in folder.glob(f"*/*/{RESULT}")})
    if not suites:
        raise BenchError(f"verify: {folder} holds no results; give a suite's folder, such as results/quickstart.")
    return [verify_suite(suite, store, boards) for suite in suites]


def verify_suite(folder: Path, store: Path | None = None, boards: bool = True) -> Report:
    """Everything that can be checked without running a cell."""
    report = Report(folder)
    for path in result_folders(folder):
        check_cell(report, path)
    check_plan(report)
    if boards:
        check_boards(report)
    check_models(report)
    check_store(report, store)
    report.notes += versions(list(report.cells.values()))
    return report


def check_cell(report: Report, path: Path) -> None:
    """One cell's folder: its record, rows and images."""
    try:
        result = read_result(path)
    except BenchError as error:
        report.wrong(path / RESULT, path.name, f"not a valid record: {str(error).replace(f'{report.folder}/', '')}")
        return
    report.cells[path] = result
    check_identity(report, result, path)
    check_seal(report, result, path)
    check_images(report, result, path)
    rows = check_rows(report, result, path)
    for measured in result.measurements:
        check_protocol(report, result.cell, measured, path)
        check_value(report, result, measured, rows.get(measured.name, []), path)


def check_identity(report: Report, result: Result, path: Path) -> None:
    """The folder's name, the recorded id, and what the recorded configuration gives, must be one."""
    cell = result.cell
    report.compare("names of cells", path / RESULT, cell.id, "its folder has another name", cell.id, path.name)
    known = {version: identity_of(cell, version) for version in range(SCHEMA_VERSION, 0, -1)}
    if cell.id not in known.values():
        report.wrong(path / RESULT, cell.id, "the recorded configuration is that of another cell", cell.id,
                     known[SCHEMA_VERSION])
    elif cell.id != known[SCHEMA_VERSION]:
        schema = next(version for version, name in known.items() if name == cell.id)
        report.checked[f"of these by schema {schema} of identities (schema {SCHEMA_VERSION} would name them anew)"] += 1
    report.checked["identities"] += 1


def identity_of(cell: CellRecord, schema: int = SCHEMA_VERSION) -> str:
    """The identity of a recorded cell, made as `bench.config.cell_id` makes it of a planned one."""
    surrogate = {"surrogate": cell.surrogate.digest} if cell.surrogate else {}
    named = {kind: _plugin_identity(getattr(cell, kind)) for kind in ("defense", "purifier", "attack")}
    return digest({
        "schema": schema, "track": cell.track, "model": cell.model.digest, "seed": cell.seed,
        "data": {"name": cell.data.name, "version": cell.data.version, "digest": cell.data_digest},
        **named, "protocol": cell.protocol, **surrogate,
    })


def _plugin_identity(plugin: PluginRecord | None) -> dict[str, Any] | None:
    return {"kind": plugin.kind, **plugin.identity()} if plugin else None


def check_seal(report: Report, result: Result, path: Path) -> None:
    if not result.seal:
        report.unchecked["records without a seal (written before there were seals)"] += 1
    else:
        report.compare("seals", path / RESULT, result.cell.id, "was changed after it was written",
                       result.seal[:16], seal_of(result)[:16])


def check_images(report: Report, result: Result, path: Path) -> None:
    """Those that are listed must be there, unchanged, and no others."""
    folder = path / IMAGES
    found = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if result.images and not found:
        report.unchecked[NO_IMAGES] += len(result.images)
        return
    for name in sorted(found - set(result.images)):
        report.wrong(folder / name, result.cell.id, "does not belong there")
    for name in result.images:
        if name not in found:
            report.wrong(folder / name, result.cell.id, "is missing")
        elif name in result.image_hashes:
            report.compare("hashes of images", folder / name, result.cell.id, "is not the image that was written",
                           result.image_hashes[name][:16], file_digest(folder / name)[:16])
        else:
            report.unchecked["images without a hash (written before images were hashed)"] += 1


def check_protocol(report: Report, cell: CellRecord, measured: MeasurementRecord, path: Path) -> None:
    again = protocol_hash(cell, metric_of(measured), measured.name, measured.protocol)
    report.compare("protocol hashes", path / RESULT, cell.id, f"{measured.name}: its protocol has another hash",
                   measured.protocol_hash, again)


def check_plan(report: Report) -> None:
    """Every planned cell has a result, and one of the planned kind."""
    file = report.folder / PLAN
    if not file.is_file():
        report.unchecked[f"plan (there is no {PLAN})"] += 1
        return
    statuses = {path.name: result.status for path, result in report.cells.items()}
    planned = set()
    for line in _plan_lines(report, file):
        cell = str(line["cell"])
        planned.add(cell)
        report.checked["planned cells"] += 1
        if not (report.folder / cell / RESULT).is_file():
            report.wrong(report.folder / cell / RESULT, cell, f"is missing; {PLAN} has it: {line['title']}")
        elif line["plan"] == "n/a" and statuses.get(cell) == "ok":
            report.wrong(file, cell, "planned as one that cannot run, and yet it ran", "n/a", "ok")
    if extra := statuses.keys() - planned:
        report.notes.append(f"{len(extra)} cells are not in {PLAN}, which holds the last plan of this suite only: "
                            f"{', '.join(sorted(extra)[:3])}{', ...' if len(extra) > 3 else ''}.")


def _plan_lines(report: Report, file: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [{"cell": line["cell"], "title": line["title"], "plan": line["plan"]} for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.wrong(file, "", f"is no plan ({type(error).__name__}: {error})")
        return []


def versions(results: Sequence[Result]) -> list[str]:
    """By which versions the cells were written, where that is not what is installed here."""
    from bench.provenance import now, provenance

    codes = Counter(_code(result.provenance) for result in results if result.provenance)
    if not codes:
        return []
    listed = ", ".join(f"{code} ({number} cells)" for code, number in codes.most_common(3))
    more = f" and {len(codes) - 3} others" if len(codes) > 3 else ""
    plugins = {(plugin.kind, plugin.name, plugin.version) for result in results for plugin in used(result)}
    return [f"Written by {listed}{more}; identities and values computed again with {_code(provenance(now()))}.",
            *sorted(set(_raised(plugins)))]


def _code(provenance: Mapping[str, Any]) -> str:
    git = provenance.get("git") or {}
    changed = " with uncommitted changes" if git.get("dirty") else ""
    commit = f" at {git['commit'][:8]}{changed}" if git.get("commit") else ""
    return f"bench {provenance.get('bench', bench.__version__)}{commit}"


def _raised(plugins: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    for kind, name, version in plugins:
        facts = REGISTRY.facts.get((kind, name))
        if facts is None:
            yield f"{kind} {name} is not installed here; its cells can be checked, not run again."
        elif facts.version != version:
            yield (f"{kind} {name}: written by its version {version}, here it is version {facts.version}; identities "
                   "hold for the version that is recorded, a run here would be another cell.")


def reproduce_cells(report: Report, count: int, seed: int, device: str, tell: Callable[[str], None]) -> None:
    """Run ``count`` cells again, drawn by ``seed``; ``tell`` names each before it runs."""
    for rerun in reproduce(report.cells, drawn(report.cells, seed), count, device, tell):
        if rerun.outdated:
            report.notes.append(f"{rerun.cell} ({rerun.title}) was drawn and not run again: {rerun.error}.")
            continue
        report.reruns.append(rerun)
        if rerun.error:
            report.wrong(rerun.folder / RESULT, rerun.cell, f"could not be run again: {rerun.error}")
        for one in rerun.compared:
            if one.verdict == OUTSIDE:
                report.wrong(rerun.folder / RESULT, rerun.cell, f"{one.name}: run again here it is another",
                             one.recorded, one.again)
    if not report.reruns:
        report.wrong(report.folder, "", "holds no cell that this version can run again")
