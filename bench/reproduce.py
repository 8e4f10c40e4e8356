"""Run recorded cells again, from their records alone, and compare what comes out with what was recorded."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.config import SINGLE, Cell, Settings, Tracker, cell_id, on_surrogate, remembered
from bench.discovery import raise_if_broken
from bench.errors import BenchError
from bench.plugin import REGISTRY
from bench.protocols import BackdoorProtocol, CustomizationProtocol, EditingProtocol, Protocol
from bench.results import CellRecord, MeasurementRecord, ModelRecord, PluginRecord, Result, SampleRow, read_rows

NEAR = 1e-3
"""A value that was recorded without an interval agrees with one that differs by at most this share of it."""
IDENTICAL, WITHIN, OUTSIDE = "identical", "within", "outside"
MEANINGS = {IDENTICAL: "bit-identical", WITHIN: "within the recorded interval (0.1 % where there is none)",
            OUTSIDE: "outside"}
PROTOCOLS: dict[str, type[Protocol]] = {
    "customization": CustomizationProtocol, "editing": EditingProtocol, "backdoor": BackdoorProtocol}


@dataclass(frozen=True)
class Compared:
    """One measurement, recorded and run again. ``verdict``: ``identical`` to the last bit in its value and rows (where
    it has none, in its interval), ``within`` the recorded interval, or ``outside``."""

    name: str
    verdict: str
    recorded: str
    again: str


@dataclass(frozen=True)
class Rerun:
    """A cell that was run again. ``error``: why it could not be, or what it ended with; ``outdated``: it was not even
    tried, for a run here would be another cell."""

    folder: Path
    cell: str
    title: str
    compared: tuple[Compared, ...] = ()
    error: str = ""
    outdated: bool = False

    @property
    def agrees(self) -> bool:
        return not self.error and all(one.verdict != OUTSIDE for one in self.compared)

    @property
    def identical(self) -> bool:
        return not self.error and all(one.verdict == IDENTICAL for one in self.compared)

    def summary(self) -> str:
        """How its measurements came out, in words."""
        if self.error:
            return self.error
        if self.identical:
            return f"all {len(self.compared)} measurements are bit-identical"
        counts = Counter(one.verdict for one in self.compared)
        return ", ".join(f"{counts[word]} {meaning}" for word, meaning in MEANINGS.items() if counts[word])


def drawn(cells: Mapping[Path, Result], seed: int = 0) -> list[Path]:
    """The folders of all cells that ran to their end, in an order that ``seed`` and the cells' names alone decide, so
    that everybody draws the same."""
    ran = [path for path, result in cells.items() if result.status == "ok"]
    return sorted(ran, key=lambda path: hashlib.sha256(f"{seed}/{cells[path].cell.id}".encode()).hexdigest())


def reproduce(cells: Mapping[Path, Result], order: Sequence[Path], count: int, device: str,
              tell: Callable[[str], None]) -> Iterator[Rerun]:
    """Run the first ``count`` cells of ``order`` again, into a store and a results folder that are new and are removed
    afterwards. Those of plugins whose version here is another are told, and the next ones take their places."""
    left = count
    with tempfile.TemporaryDirectory(prefix="bench-verify-") as temp:
        for path in order:
            if not left:
                return
            cell, shown = cells[path].cell.id, title(cells[path])
            if why := "; ".join(outdated(cells[path])):
                yield Rerun(path, cell, shown, error=why, outdated=True)
                continue
            left -= 1
            tell(f"running cell {cell} again: {shown}")
            yield run_again(cells[path], path, Path(temp), device)


def outdated(recorded: Result) -> Iterator[str]:
    """The plugins of a cell that are not installed here, or in another version."""
    for plugin in used(recorded):
        known = REGISTRY.facts.get((plugin.kind, plugin.name))
        if known is None:
            yield f"{plugin.kind} {plugin.name} is not installed here"
        elif known.version != plugin.version:
            yield f"{plugin.kind} {plugin.name} was version {plugin.version} and is version {known.version} here"


def used(recorded: Result) -> list[PluginRecord]:
    """Every plugin that a result rests on, its metrics last."""
    metrics = {m.metric: metric_of(m) for m in recorded.measurements}
    return [*singles(recorded.cell).values(), *metrics.values()]


def singles(cell: CellRecord) -> dict[str, PluginRecord]:
    """The plugins that a cell has one of, by kind."""
    return {kind: plugin for kind in SINGLE if (plugin := getattr(cell, kind))}


def run_again(recorded: Result, folder: Path, temp: Path, device: str) -> Rerun:
    """One cell, with as many threads as it had, as the runner runs it."""
    from bench.runner import run_cell

    run = Rerun(folder, recorded.cell.id, title(recorded))
    try:
        cell = rebuilt(recorded)
        if cell.id != recorded.cell.id:
            raise BenchError(f"with this version its configuration is that of cell {cell.id}"
                             f"{''.join(f'; {why}' for why in reasons(recorded.cell, cell))}")
        threads = int(recorded.provenance.get("threads") or 1)
        how = Settings(temp / "results", temp / "store", device, threads, Tracker(wandb="disabled"))
        again = run_cell(cell, how)
        if again.status != "ok":
            return replace(run, error=again.error.message if again.error else again.reason)
        rows = _rows(folder), _rows(cell.folder(how.results))
    except BenchError as error:
        return replace(run, error=str(error))
    return replace(run, compared=tuple(compared(recorded, again, *rows)))


def rebuilt(recorded: Result) -> Cell:
    """The cell of a record: its plugins with the recorded options, on the models that this machine has."""
    record, words = recorded.cell, [str(word) for word in recorded.provenance.get("overrides", ())]
    pickles, resolve = "allow_pickle=true" in words, remembered()
    model = resolve(place_of(record.model, "model", words), pickles)
    made = {kind: made_from(plugin) for kind, plugin in singles(record).items()}
    metrics = {m.metric: made_from(metric_of(m)) for m in recorded.measurements}
    cell = Cell(
        "", recorded.suite, record.track, place_of(record.model, "model", words), model.digest, model.capabilities,
        pickles, record.seed, made["data"], made["defense"], made["purifier"], made["attack"],
        typed(PROTOCOLS[record.track], record.protocol), metrics, {}, labels(record), tuple(words), recorded.stamp)
    if record.surrogate:
        cell = on_surrogate(cell, place_of(record.surrogate, "surrogate", words), resolve)
    return replace(cell, id=cell_id(cell))


def place_of(model: ModelRecord, key: str, words: Sequence[str]) -> str:
    """A model's alias, or its folder where the command line named one: records keep a folder's last part only."""
    given = [value for word in words for k, _, value in [word.partition("=")] if k == key]
    return next((value for value in given if Path(value).name == model.name), model.name)


def made_from(plugin: PluginRecord) -> Any:
    """The plugin with the recorded options."""
    raise_if_broken(plugin.name)
    return typed(REGISTRY.get(plugin.kind, plugin.name), plugin.parameters)


def typed(cls: type[Any], options: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from plain values, as Hydra makes it of a config."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), dict(options)))
    except OmegaConfBaseException as error:
        raise BenchError(f"{cls.__name__}: the recorded options do not fit this version: {error}") from error


def metric_of(measured: MeasurementRecord) -> PluginRecord:
    return PluginRecord(kind="metric", name=measured.metric, label=measured.metric, version=measured.version,
                        parameters=measured.parameters)


def labels(cell: CellRecord) -> dict[str, str]:
    """What boards called the choices, without the variant, which the new record adds itself."""
    return {kind: plugin.label.removesuffix(f" ({plugin.variant})") for kind, plugin in singles(cell).items()}


def reasons(recorded: CellRecord, cell: Cell) -> Iterator[str]:
    """Why a recorded configuration is another cell with this version."""
    from bench.outcomes import cell_record

    here = cell_record(cell)
    for kind in SINGLE:
        then, now = getattr(recorded, kind), getattr(here, kind)
        if then and now and then.parameters != now.parameters:
            differ = sorted(k for k in then.parameters.keys() | now.parameters.keys()
                            if then.parameters.get(k) != now.parameters.get(k))
            yield f"{kind} {then.name} has other options here: {', '.join(differ)}"
    for what in ("model", "surrogate", "data_digest", "protocol"):
        if getattr(recorded, what) != getattr(here, what):
            yield f"its {what.partition('_')[0]} is not the same here"


def compared(recorded: Result, again: Result, rows: Mapping[str, list[SampleRow]],
             new_rows: Mapping[str, list[SampleRow]]) -> Iterator[Compared]:
    """Every recorded measurement against the one that came out now."""
    for old in recorded.measurements:
        new = again.measurement(old.name)
        found = verdict(old, new, rows.get(old.name, []), new_rows.get(old.name, []))
        yield Compared(old.name, found, said(old), said(new) if new else "not measured")


def verdict(old: MeasurementRecord, new: MeasurementRecord | None, old_rows: Sequence[SampleRow],
            new_rows: Sequence[SampleRow]) -> str:
    """How a measurement agrees with the one that was recorded."""
    if new is None or new.protocol_hash != old.protocol_hash:
        return OUTSIDE
    # Intervals follow from rows, by rules that a newer version may have changed.
    same = bool(old_rows) or (old.low, old.high) == (new.low, new.high)
    if same and old_rows == new_rows and (old.value, old.n) == (new.value, new.n):
        return IDENTICAL
    if old.value is None or new.value is None:
        return WITHIN if old.value is new.value else OUTSIDE
    if old.low is None or old.high is None:
        return WITHIN if math.isclose(old.value, new.value, rel_tol=NEAR) else OUTSIDE
    return WITHIN if old.low <= new.value <= old.high else OUTSIDE


def said(measured: MeasurementRecord) -> str:
    """A value with its interval."""
    if measured.value is None:
        return f"no value ({measured.reason})"
    interval = "" if measured.low is None else f" [{measured.low:.6g}, {measured.high:.6g}]"
    return f"{measured.value:.6g}{interval}"


def title(result: Result) -> str:
    """One line for people, as `bench.config.Cell.title`."""
    cell = result.cell
    purifier = [cell.purifier.label] if cell.purifier and cell.purifier.name != "none" else []
    return " · ".join([cell.defense.label, *purifier, cell.attack.label, cell.model.name, f"seed {cell.seed}"])


def _rows(folder: Path) -> dict[str, list[SampleRow]]:
    found: dict[str, list[SampleRow]] = {}
    for row in read_rows(folder):
        found.setdefault(row.metric, []).append(row)
    return found
