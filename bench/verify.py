"""Is a results folder what it says it is? Compute again everything that can be, and name what does not agree.

A folder is ``claimed`` where something does not agree, ``consistent`` where everything that could be checked does, and
``reproduced`` where, on top, cells that were run again here came out the same (`bench.reproduce`). Hashes without a
key keep nobody from writing all of a folder anew: ``consistent`` means that its parts fit together, and only running
cells again says that they are true. No torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench
from bench.config import SCHEMA_VERSION, SINGLE
from bench.errors import BenchError
from bench.identity import digest, file_digest
from bench.planner import PLAN
from bench.plugin import REGISTRY
from bench.records import Measurement, Row
from bench.results import (
    IMAGES,
    MEASURE,
    RESULT,
    SAMPLES,
    CellRecord,
    MeasurementRecord,
    PluginRecord,
    Result,
    SampleRow,
    parse_rows,
    protocol_hash,
    read_result,
    result_folders,
    seal_of,
)
from bench.store import Store, describe, read_manifest
from bench.store import verify as artefact_problem

if TYPE_CHECKING:
    from bench.reproduce import Rerun

CLAIMED, CONSISTENT, REPRODUCED = "claimed", "consistent", "reproduced"
DIGITS = 1e-5
"""Rows keep six digits: what is computed from them agrees with what was computed before to this share of the largest
of them."""
FORMER = "of these with an interval that earlier versions computed so (bootstrap percentiles)"
NO_IMAGES = "images that are not in the folder"
UNSAID = object()
"""Stands for a key that a mapping lacks."""
SUMS = "SHA256SUMS"
NUMBER = re.compile(r"(-?\d+\.\d+(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Problem:
    """What does not agree. ``file``: relative to the folder that was verified; ``cell``: its identity, if it is of
    one."""

    file: str
    cell: str
    what: str
    expected: str = ""
    found: str = ""

    def line(self) -> str:
        """One line for people."""
        where = f"{self.file}: cell {self.cell}: " if self.cell and self.cell not in self.file else f"{self.file}: "
        told = f" (expected {self.expected}, found {self.found})" if self.expected or self.found else ""
        return f"{where}{self.what}{told}"


@dataclass
class Report:
    """What came out for one suite. ``checked``: what was compared, and how often. ``unchecked``: what could not be, and
    for how many. ``notes``: what a reader should know and that is no fault."""

    folder: Path
    cells: dict[Path, Result] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    unchecked: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    reruns: list[Rerun] = field(default_factory=list)

    @property
    def grade(self) -> str:
        if self.problems:
            return CLAIMED
        return REPRODUCED if any(rerun.agrees for rerun in self.reruns) else CONSISTENT

    def wrong(self, file: Path, cell: str, what: str, expected: object = "", found: object = "") -> None:
        place = file.relative_to(self.folder) if file.is_relative_to(self.folder) else file
        self.problems.append(Problem(place.as_posix(), cell, what, str(expected), str(found)))

    def compare(self, what: str, file: Path, cell: str, problem: str, expected: object, found: object) -> bool:
        """Count a check, and a problem where the two differ."""
        self.checked[what] += 1
        if expected != found:
            self.wrong(file, cell, problem, expected, found)
        return expected == found


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


def check_rows(report: Report, result: Result, path: Path) -> dict[str, list[SampleRow]]:
    """The rows by measurement, read even if they were changed, so that what follows from that is named, too."""
    file, cell, known = path / SAMPLES, result.cell.id, result.samples
    if known is None:
        report.unchecked["cells without a file of samples"] += 1
        return {}
    try:
        data = file.read_bytes()
        rows = parse_rows(data, known.layout, file)
    except (OSError, BenchError) as error:
        report.wrong(file, cell, f"cannot be read: {str(error).replace(f'{report.folder}/', '')}")
        return {}
    report.compare("hashes of samples", file, cell, "was changed after its result was written", known.sha256[:16],
                   hashlib.sha256(data).hexdigest()[:16])
    report.compare("counts of rows", file, cell, "holds another number of rows than its result says", known.rows,
                   len(rows))
    found: dict[str, list[SampleRow]] = {}
    for row in rows:
        found.setdefault(row.metric, []).append(row)
    for name in sorted(found.keys() - {m.name for m in result.measurements}):
        report.wrong(file, cell, f"holds rows of {name}, which its result does not measure")
    return found


def check_protocol(report: Report, cell: CellRecord, measured: MeasurementRecord, path: Path) -> None:
    metric = PluginRecord(kind="metric", name=measured.metric, label="", version=measured.version,
                          parameters=measured.parameters)
    again = protocol_hash(cell, metric, measured.name, measured.protocol)
    report.compare("protocol hashes", path / RESULT, cell.id, f"{measured.name}: its protocol has another hash",
                   measured.protocol_hash, again)


def check_value(
    report: Report, result: Result, measured: MeasurementRecord, rows: Sequence[SampleRow], path: Path,
) -> None:
    """Value, count, units and interval of one measurement against those that its rows give."""
    candidates = aggregates(measured, rows)
    if not candidates:
        left = "values that rest on no rows (only running the cell again says whether they are true)"
        report.unchecked[left] += measured.value is not None
        return
    report.checked["values computed from rows"] += 1
    scale = max((abs(row.value) for row in rows if row.value is not None), default=0.0)
    verdicts = [list(differences(measured, again, scale)) for again in candidates]
    best = min(verdicts, key=len)
    if best and not list(differences(measured, as_formerly(candidates[-1], measured), scale)):
        report.checked[FORMER] += 1
        return
    for what, expected, found in best:
        report.wrong(path / RESULT, result.cell.id, f"{measured.name}: {what} is not what its rows give", expected,
                     found)


def aggregates(measured: MeasurementRecord, rows: Sequence[SampleRow]) -> list[Measurement]:
    """What the rows give under the rule that the protocol names, one or several that it may mean; none where it names
    none that is known. The last is the plain mean, if it is any."""
    from bench.measuring import mean_of, share_of

    plain = [Row(row.sample, row.cluster, row.value, row.reason) for row in rows]
    name, unit, better = measured.name, measured.unit, measured.higher_is_better
    values = [row.value for row in rows if row.value is not None]
    if measured.protocol.get("measured") == "maximum" and values:
        return [Measurement(name, max(values), len(values), unit, better, rows=tuple(plain))]
    over = measured.protocol.get("interval")
    if over == "over clusters":
        return [mean_of(name, plain, unit, better, {})]
    if over == "over samples":
        shares = [share_of(name, plain, better, {})] if set(values) <= {0.0, 1.0} else []
        return [*shares, mean_of(name, plain, unit, better, {}, over_samples=True)]
    return []


def as_formerly(mean: Measurement, measured: MeasurementRecord) -> Measurement:
    """The same with the interval that earlier versions gave it."""
    from bench.former_stats import percentile_interval

    over_samples = measured.protocol.get("interval") == "over samples"
    low, high = percentile_interval(mean.rows, over_samples, measured.unit == "share")
    return replace(mean, low=low, high=high)


def differences(
    measured: MeasurementRecord, again: Measurement, scale: float,
) -> Iterator[tuple[str, object, object]]:
    """What of a measurement is not as its rows give it: name, what they give, what is recorded."""
    clusters = len({row.cluster for row in again.rows if row.value is not None})
    for what, right, said in (("n", again.n, measured.n), ("the number of units", clusters, measured.clusters)):
        if right != said:
            yield what, right, said
    for what in ("value", "low", "high"):
        right, said = getattr(again, what), getattr(measured, what)
        if (right is None) != (said is None) or abs((right or 0.0) - (said or 0.0)) > DIGITS * scale:
            yield {"value": "the value"}.get(what, f"the interval's {what} end"), _short(right), _short(said)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


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


def check_boards(report: Report) -> None:
    """The leaderboard's files against those that the cells give now."""
    from bench.leaderboard import FILES, PAGE, texts

    present = [name for name in FILES if (report.folder / name).is_file()]
    if PAGE in present and report.unchecked[NO_IMAGES]:
        present.remove(PAGE)
        report.unchecked[f"{PAGE} (it shows images that are not in the folder)"] += 1
    if not present or not report.cells:
        report.unchecked["leaderboard (its files are not there)"] += 1
        return
    _, again = texts(report.folder, present)
    stale = [name for name in present if not same_board(report, name, again[name])]
    if stale:
        report.notes.append(f"{', '.join(stale)}: if a newer version changed how boards are made, `bench leaderboard "
                            f"{report.folder}` writes them again from the cells.")


def same_board(report: Report, name: str, again: str) -> bool:
    """Whether a file of the leaderboard is what the cells give; names the first place where it is not."""
    file = report.folder / name
    report.checked["files of the leaderboard"] += 1
    old = file.read_text(errors="replace")
    if old == again:
        return True
    difference = json_difference(report, file, old, again) if file.suffix == ".json" else text_difference(old, again)
    if difference:
        report.wrong(file, "", f"does not follow from the cells, first at {difference[0]}", *difference[1:])
    return not difference


def json_difference(report: Report, file: Path, old: str, again: str) -> tuple[str, str, str] | None:
    """Place, what is expected and what is found. What an older file does not say yet is noted, and is no difference."""
    try:
        found = list(_differences(json.loads(again), json.loads(old), ""))
    except ValueError as error:
        return "its start", "JSON", str(error)
    unsaid = sorted({where.rpartition(".")[2] for where, _, said in found if said is UNSAID})
    if unsaid:
        report.notes.append(f"{file.name}: written by a version that did not yet say: {', '.join(unsaid)}.")
    return next(((where, _cut(right), _cut(said)) for where, right, said in found if said is not UNSAID), None)


def _differences(right: Any, said: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(right, dict) and isinstance(said, dict):
        for key in [*right, *(key for key in said if key not in right)]:
            yield from _differences(right.get(key, UNSAID), said.get(key, UNSAID), f"{where}.{key}".lstrip("."))
    elif isinstance(right, list) and isinstance(said, list) and len(right) == len(said):
        for place, (one, other) in enumerate(zip(right, said, strict=True)):
            yield from _differences(one, other, f"{where}[{place}]")
    elif right != said and not (isinstance(right, float) and isinstance(said, (int, float)) and _close(right, said)):
        yield where, right, said


def _cut(value: Any) -> str:
    return "nothing" if value is UNSAID else json.dumps(value, ensure_ascii=False)[:80]


def text_difference(old: str, new: str) -> tuple[str, str, str] | None:
    """The first line in which two texts differ, and from a little before that place what is expected and found."""
    for number, (right, said) in enumerate(zip_longest(new.splitlines(), old.splitlines(), fillvalue=""), 1):
        one, other = NUMBER.split(right), NUMBER.split(said)
        place = next((i for i, pair in enumerate(zip_longest(one, other, fillvalue="")) if not _same_part(*pair)), None)
        if place is not None:
            start = "".join(one[:place])[-30:]
            expected, found = ((start + "".join(parts[place:]))[:80] for parts in (one, other))
            return f"line {number}", expected, found
    return None


def _same_part(right: str, said: str) -> bool:
    if right == said:
        return True
    try:
        return _close(float(right), float(said))
    except ValueError:
        return False


def _close(right: float, said: float) -> bool:
    """The last digits of resampled means depend on the machine's linear algebra."""
    return math.isclose(right, said, rel_tol=DIGITS / 2)


def check_models(report: Report) -> None:
    """The weights of the models by name, where this machine has them."""
    asked: dict[tuple[str, str], tuple[Path, Result]] = {}
    for path, result in report.cells.items():
        for model in (result.cell.model, result.cell.surrogate):
            if model and model.digest:
                asked.setdefault((model.name, model.digest), (path, result))
    for (name, known), (path, result) in asked.items():
        place = model_folder(name, result)
        if place is None:
            report.unchecked[f"weights of {name} (not on this machine)"] += 1
        else:
            _check_weights(report, name, known, place, path, result.cell.id)


def model_folder(name: str, result: Result) -> Path | None:
    """Where the model of a result lies: under its alias, or where the command line said."""
    from bench.diffusion.checkpoints import aliases, locate

    words = [str(word).partition("=") for word in result.provenance.get("overrides", ())]
    given = [value for key, _, value in words if key in ("model", "surrogate") and Path(value).name == name]
    for place in [name] if name in aliases() else given:
        try:
            return locate(place)
        except BenchError:
            continue
    return None


def _check_weights(report: Report, name: str, known: str, place: Path, path: Path, cell: str) -> None:
    from bench.diffusion.checkpoints import aliases

    report.checked["weights of models"] += 1
    try:
        found = weights_digest(place)
        altered = [] if found == known else list(_altered(name, place))
    except (BenchError, OSError) as error:
        report.wrong(place, "", f"weights of {name} cannot be read: {error}")
        return
    for file, expected, there in altered:
        report.wrong(file, "", f"weights of {name}: not the file that is listed", expected, there)
    if found != known and name in aliases() and not altered:
        report.notes.append(f"{name}: the cells were computed with weights {known[:16]}, this version has "
                            f"{found[:16]}; a run here would be another cell.")
    elif found != known and not altered:
        report.wrong(path / RESULT, cell, f"the weights in {place} are not those it was computed with", known[:16],
                     found[:16])


def _altered(name: str, place: Path) -> Iterator[tuple[Path, str, str]]:
    """Files of a model that do not match the hashes that are shipped with it: file, expected, found."""
    from bench.diffusion.checkpoints import MICRO, PUBLISHED, read_index, weight_files

    published = PUBLISHED[name].sha256 if name in PUBLISHED else {}
    listed = {(place / file).resolve(): value for file, value in published.items()}
    for sums in (MICRO / SUMS, place / SUMS):
        lines = sums.read_text().splitlines() if sums.is_file() else []
        listed |= {(sums.parent / file.strip().lstrip("*")).resolve(): value
                   for value, _, file in (line.partition(" ") for line in lines)}
    for file in weight_files(place, read_index(place)).values():
        expected, found = listed.get(file.resolve()), file_digest(file)
        if expected not in (None, found):
            yield file, str(expected)[:16], found[:16]


def weights_digest(folder: Path) -> str:
    """A model's digest, from its files as they are now: `bench.diffusion.checkpoints` remembers hashes by file times,
    which whoever changes a byte can set back."""
    from bench.diffusion.checkpoints import read_index, weight_files

    files = weight_files(folder, read_index(folder))
    listing = "".join(f"{name} {file_digest(file)}\n" for name, file in files.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def check_store(report: Report, root: Path | None) -> None:
    """Every artefact that a cell rests on and that the store still holds: its files, its key, its measurements."""
    if root is None or not root.is_dir():
        keys = {(stage.stage, stage.key) for result in report.cells.values() for stage in result.cost}
        report.unchecked["artefacts (no store is at hand; --store names one)"] += len(keys)
        return
    store, seen = Store(root), dict[Path, bool]()
    for path, result in report.cells.items():
        for stage in result.cost:
            folder = store.find(stage.stage, stage.key)
            if folder is None:
                report.unchecked["artefacts that the store does not hold"] += 1
                continue
            if folder not in seen:
                seen[folder] = _intact(report, folder, result.cell.id)
            if seen[folder] and stage.stage == MEASURE:
                _compare_measured(report, folder, result, path)


def _intact(report: Report, folder: Path, cell: str) -> bool:
    report.checked["artefacts in the store"] += 1
    if problem := artefact_problem(folder):
        report.wrong(folder, cell, f"artefact: {problem}")
        return False
    manifest = read_manifest(folder)
    key = digest(describe(manifest["stage"], manifest["version"], manifest["inputs"], manifest.get("seeded_by")))
    if key != folder.name:
        report.wrong(folder, cell, "artefact: what produced it gives another key", folder.name, key)
    return key == folder.name


def _compare_measured(report: Report, folder: Path, result: Result, path: Path) -> None:
    """A metric's stored measurements against the record: the same numbers to the last bit."""
    for stored in json.loads((folder / "measurements.json").read_text()):
        measured = result.measurement(stored["name"])
        if measured is not None and measured.value is not None:
            report.compare("values in the store", path / RESULT, result.cell.id,
                           f"{measured.name}: the store has another value", stored["value"], measured.value)


def versions(results: Sequence[Result]) -> list[str]:
    """By which versions the cells were written, where that is not what is installed here."""
    codes = Counter(_code(result.provenance) for result in results if result.provenance)
    if not codes:
        return []
    listed = ", ".join(f"{code} ({number} cells)" for code, number in codes.most_common(3))
    more = f" and {len(codes) - 3} others" if len(codes) > 3 else ""
    here = _code(_here())
    return [f"Written by {listed}{more}; identities and values computed again with {here}.",
            *sorted(set(_raised(_plugins(results))))]


def _here() -> dict[str, Any]:
    from bench.provenance import now, provenance

    return provenance(now())


def _code(provenance: Mapping[str, Any]) -> str:
    git = provenance.get("git") or {}
    changed = " with uncommitted changes" if git.get("dirty") else ""
    commit = f" at {git['commit'][:8]}{changed}" if git.get("commit") else ""
    return f"bench {provenance.get('bench', bench.__version__)}{commit}"


def _plugins(results: Iterable[Result]) -> Iterator[tuple[str, str, int]]:
    for result in results:
        for kind in SINGLE:
            if plugin := getattr(result.cell, kind):
                yield kind, plugin.name, plugin.version
        for measured in result.measurements:
            yield "metric", measured.metric, measured.version


def _raised(used: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    for kind, name, version in set(used):
        facts = REGISTRY.facts.get((kind, name))
        if facts is None:
            yield f"{kind} {name} is not installed here; its cells can be checked, not run again."
        elif facts.version != version:
            yield (f"{kind} {name}: written by its version {version}, here it is version {facts.version}; identities "
                   "hold for the version that is recorded, a run here would be another cell.")


def reproduce_cells(report: Report, count: int, seed: int, device: str, tell: Callable[[str], None]) -> None:
    """Run ``count`` cells again, drawn by ``seed``; ``tell`` names each before it runs."""
    from bench.reproduce import OUTSIDE, drawn, reproduce

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


def told(report: Report) -> Iterator[str]:
    """What a report says, line by line, the grade last."""
    yield from (f"not checked: {number} {what}" for what, number in report.unchecked.items())
    yield from (f"note: {note}" for note in report.notes)
    checked = ", ".join(f"{number} {what}" for what, number in report.checked.items())
    yield f"checked: {checked or 'nothing'}"
    for rerun in report.reruns:
        yield f"ran again: cell {rerun.cell} ({rerun.title}): {rerun.summary()}"
    yield from (f"problem: {problem.line()}" for problem in report.problems)
    counts = Counter(result.status for result in report.cells.values())
    cells = ", ".join(f"{number} {status}" for status, number in counts.items()) or "no cell that can be read"
    wrong = f", {len(report.problems)} problems" if report.problems else ""
    yield f"{report.folder}: {report.grade} ({cells}{wrong})"
