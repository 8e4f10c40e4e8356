"""What a suite's cells rest on, where this machine has it: the weights of models, the artefacts of stages."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.errors import BenchError
from bench.findings import Report
from bench.identity import digest, file_digest
from bench.results import MEASURE, RESULT, Result, StageRecord, stage_record
from bench.store import Cost, Store, describe, read_manifest
from bench.store import verify as artefact_problem

SUMS = "SHA256SUMS"


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
    store, seen, others = Store(root), dict[Path, Cost | None](), Counter[str]()
    for path, result in report.cells.items():
        held = list(_held(report, store, result, seen))
        measured = [folder for stage, folder, _ in held if stage.stage == MEASURE]
        if all(_on_record(stage, cost) for stage, _, cost in held):
            for folder in measured:
                _compare_measured(report, folder, result, path)
        elif measured:
            others += Counter(_same_as_other_run(measured, result)) + Counter(["cells"])
    if others:
        report.notes.append(f"the store holds another run of {others['cells']} of these cells, at another time or on "
                            f"another machine: {others['same']} of {others['same'] + others['other']} values came out "
                            "the same to the last bit. --reproduce says whether the rest are near.")


def _held(
    report: Report, store: Store, result: Result, seen: dict[Path, Cost | None],
) -> Iterator[tuple[StageRecord, Path, Cost]]:
    """The stages of a cell whose artefacts the store has and that are intact, with what the artefacts took; ``seen``:
    of those looked at before, None where one is not intact."""
    for stage in result.cost:
        folder = store.find(stage.stage, stage.key)
        if folder is None:
            report.unchecked["artefacts that the store does not hold"] += 1
            continue
        if folder not in seen:
            seen[folder] = _intact(report, folder, result.cell.id)
        if (cost := seen[folder]) is not None:
            yield stage, folder, cost


def _on_record(stage: StageRecord, cost: Cost) -> bool:
    """Whether the artefact with this cost is the one that the record was written from: it took the same time and
    memory. Another run of the stage, on another machine above all, has the same key and may differ in the last bits,
    and training makes more of them."""
    return stage_record(stage.stage, stage.key, cost, stage.reused) == stage


def _intact(report: Report, folder: Path, cell: str) -> Cost | None:
    """What an artefact took to build, None where its files or its key are not as its manifest says."""
    report.checked["artefacts in the store"] += 1
    if problem := artefact_problem(folder):
        report.wrong(folder, cell, f"artefact: {problem}")
        return None
    manifest = read_manifest(folder)
    key = digest(describe(manifest["stage"], manifest["version"], manifest["inputs"], manifest.get("seeded_by")))
    if key != folder.name:
        report.wrong(folder, cell, "artefact: what produced it gives another key", folder.name, key)
        return None
    return Cost(**manifest["cost"])


def _compare_measured(report: Report, folder: Path, result: Result, path: Path) -> None:
    """A metric's stored measurements against the record: the same numbers to the last bit."""
    for name, stored, value in _values(folder, result):
        report.compare("values in the store", path / RESULT, result.cell.id, f"{name}: the store has another value",
                       stored, value)


def _same_as_other_run(measured: list[Path], result: Result) -> Iterator[str]:
    for folder in measured:
        yield from ("same" if stored == value else "other" for _, stored, value in _values(folder, result))


def _values(folder: Path, result: Result) -> Iterator[tuple[str, float | None, float]]:
    """Of a metric's stored measurements: name, the store's value, the record's."""
    for stored in json.loads((folder / "measurements.json").read_text()):
        measured = result.measurement(stored["name"])
        if measured is not None and measured.value is not None:
            yield measured.name, stored["value"], measured.value
