"""The record of one cell: ``result.json``, per-sample rows in ``samples.jsonl``, a few images beside them.

Validated when written and when read. A number is finite or it is null with a reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from bench.errors import BenchError
from bench.files import flush_folder, told, write_atomically
from bench.identity import digest, digest_plain, file_digest, plain
from bench.plugin import changed, facts_of, parameters
from bench.records import Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from bench.store import Cost

SCHEMA = 1
RESULT, SAMPLES, IMAGES = "result.json", "samples.jsonl", "images"
NEW = ".new-"
MEASURE = "measure"
"""The stage of a metric."""
UNSEALED = ("seal", "cost", "provenance", "warnings")
"""Parts of a result that its seal leaves out: they tell how it was found, and differ between runs that found the
same."""
Status = Literal["ok", "n/a", "failed"]
T = TypeVar("T")


class Record(BaseModel):
    """What all parts of a result share: unknown fields are refused, so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class PluginRecord(Record):
    """A plugin as it ran. ``label``: its row on boards. ``changed``: names of parameters that were not defaults."""

    kind: str
    name: str
    label: str
    version: int
    variant: str = ""
    parameters: dict[str, Any] = {}
    changed: list[str] = []
    facts: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """What makes it this method with these options, whatever it is called on boards."""
        return {"name": self.name, "version": self.version, "parameters": self.parameters}


class ModelRecord(Record):
    """``name``: the alias or the last part of the folder. ``digest``: hash of all weights, "" where unresolved."""

    name: str
    digest: str = ""


class CellRecord(Record):
    """What ran: the point of the grid, fully resolved. ``surrogate``: the model that photos were protected on, where it
    was not the attacked one."""

    id: str
    track: str
    model: ModelRecord
    surrogate: ModelRecord | None = None
    data: PluginRecord
    data_digest: str = ""
    attack: PluginRecord
    defense: PluginRecord
    purifier: PluginRecord | None = None
    seed: int
    protocol: dict[str, Any] = {}


class MeasurementRecord(Record):
    """One number. ``n`` samples in ``clusters`` units of statistics; ``low``/``high``: its 95 % interval, if any.

    ``higher_is_better``: from the defender's side. ``protocol``: what the metric says a comparison must share.
    ``protocol_hash``: of everything that a comparison must share; different hashes are never ranked together.
    """

    name: str
    metric: str
    version: int = 1
    parameters: dict[str, Any] = {}
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = Field(ge=0)
    clusters: int = Field(default=0, ge=0)
    unit: str = ""
    higher_is_better: bool | None = None
    reason: str = ""
    protocol: dict[str, Any] = {}
    protocol_hash: str

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.value is None and not self.reason:
            raise ValueError(f"{self.name}: a missing value needs a reason")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{self.name}: an interval needs both ends")
        if self.low is not None and self.high is not None and (self.value is None or self.low > self.high):
            raise ValueError(f"{self.name}: the interval [{self.low}, {self.high}] of {self.value} is none")
        return self


class StageRecord(Record):
    """What one stage cost when it was built; ``reused``: not in this run."""

    stage: str
    key: str
    seconds: float = Field(ge=0)
    peak_mb: float | None = None
    device: str = "cpu"
    reused: bool = False


class ErrorRecord(Record):
    """Why a cell failed."""

    type: str
    message: str
    traceback: str = ""


class SampleFile(Record):
    """What ``samples.jsonl`` must be. ``layout``: a line is one ``row``, as it was at first, or a ``block``."""

    rows: int
    sha256: str
    layout: Literal["rows", "blocks"] = "rows"


class Result(Record):
    """``stamp``: what the whole result is not ("pipeline check, not a result"). ``reason``: why it is n/a.

    ``image_hashes``: SHA-256 of the files of ``images``. ``seal``: see :func:`seal_of`. Results written before
    these two existed lack them.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    suite: str
    cell: CellRecord
    status: Status
    reason: str = ""
    measurements: list[MeasurementRecord] = []
    stamp: str = ""
    cost: list[StageRecord] = []
    artefacts: dict[str, str] = {}
    provenance: dict[str, Any] = {}
    warnings: list[str] = []
    error: ErrorRecord | None = None
    samples: SampleFile | None = None
    images: list[str] = []
    image_hashes: dict[str, str] = {}
    seal: str = ""

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.status == "n/a" and not self.reason:
            raise ValueError("status n/a needs a reason")
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"status {self.status} {'needs' if self.error is None else 'cannot have'} an error")
        names = [m.name for m in self.measurements]
        if len(set(names)) != len(names):
            raise ValueError(f"measurements have one name twice: {sorted(names)}")
        return self

    def measurement(self, name: str) -> MeasurementRecord | None:
        return next((m for m in self.measurements if m.name == name), None)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sample's value of one measurement; None needs a ``reason``. ``cluster``: the unit of statistics."""

    metric: str
    sample: str
    cluster: str
    value: Annotated[float, Field(allow_inf_nan=False)] | None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError(f"{self.metric} of {self.sample}: a missing value needs a reason")

    def alone(self) -> Block:
        return Block(self.cluster, [self.sample], {self.metric: [self.value]},
                     {self.metric: {"0": self.reason}} if self.reason else {})


@dataclass(frozen=True, slots=True)
class Block:
    """A line of ``samples.jsonl``: the samples of one cluster, and the values of those measurements that score just
    these. ``reasons``: measurement -> place in the line -> why its value is missing."""

    cluster: str
    samples: list[str]
    values: dict[str, list[Annotated[float, Field(allow_inf_nan=False)] | None]]
    reasons: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[SampleRow]:
        return [SampleRow(metric, sample, self.cluster, value, self.reasons.get(metric, {}).get(str(place), ""))
                for metric, values in self.values.items()
                for place, (sample, value) in enumerate(zip(self.samples, values, strict=True))]


def plugin_record(instance: Any, label: str = "") -> PluginRecord:
    """How a plugin goes on record. ``label``: a preset's name; else the plugin's own, either with its variant."""
    facts = facts_of(instance)
    options = plain(parameters(instance), facts.name)
    variant = str(options.get("variant", facts.variant))
    known = {f.name: getattr(facts, f.name) for f in dataclasses.fields(facts)}
    kept = {k: v for k, v in known.items() if k not in ("kind", "name", "version", "variant") and v}
    shown = (label or facts.name) + (f" ({variant})" if variant else "")
    return PluginRecord(kind=facts.kind, name=facts.name, label=shown, version=facts.version, variant=variant,
                        parameters=options, changed=sorted(changed(instance)), facts=plain(kept, facts.name))


def stage_record(stage: str, key: str, cost: Cost, reused: bool) -> StageRecord:
    peak = None if cost.peak_mb is None else round(cost.peak_mb, 1)
    return StageRecord(stage=stage, key=key, seconds=round(cost.seconds, 3), peak_mb=peak, device=cost.device,
                       reused=reused)


def measurement_record(measured: Measurement, metric: PluginRecord, cell: CellRecord) -> MeasurementRecord:
    """Put a measurement on record; a value that is not finite becomes a missing one, with that reason."""
    value, reason = _finite(measured.value, measured.reason)
    low, high = (measured.low, measured.high) if value is not None and _both_finite(measured) else (None, None)
    asked = plain(measured.protocol, f"{measured.name}.protocol")
    return MeasurementRecord(
        name=measured.name, metric=metric.name, version=metric.version, parameters=metric.parameters, value=value,
        low=low, high=high, n=measured.n, clusters=len({r.cluster for r in measured.rows if r.value is not None}),
        unit=measured.unit, higher_is_better=measured.higher_is_better, reason=reason, protocol=asked,
        protocol_hash=protocol_hash(cell, metric, measured.name, asked),
    )


def protocol_hash(cell: CellRecord, metric: PluginRecord, measurement: str, asked: Mapping[str, Any]) -> str:
    """Digest of everything that two numbers must share to be compared: all but the defense and the seed."""
    return digest_plain({
        "track": cell.track, "model": cell.model.digest or cell.model.name, "data": data_identity(cell),
        "attack": cell.attack.identity(), "purifier": cell.purifier.identity() if cell.purifier else None,
        "cell": cell.protocol, "metric": metric.identity(), "measurement": measurement, "protocol": asked,
    })


def data_identity(cell: CellRecord) -> Any:
    """The data's own digest where it has one: a folder of photos is what is in it, not where it lies."""
    return {"name": cell.data.name, "digest": cell.data_digest} if cell.data_digest else cell.data.identity()


def sample_rows(measurements: Iterable[Measurement]) -> list[SampleRow]:
    """The rows of measurements, as they are written."""
    rows = []
    for measured in measurements:
        for row in measured.rows:
            value, reason = _finite(row.value, row.reason)
            rows.append(SampleRow(measured.name, row.sample, row.cluster, value, reason))
    return rows


def _finite(value: float | None, reason: str) -> tuple[float | None, str]:
    if value is None:
        return None, reason or "the metric gave no value and no reason"
    return (float(value), reason) if math.isfinite(value) else (None, f"the metric gave {float(value)}")


def _both_finite(measured: Measurement) -> bool:
    return all(end is not None and math.isfinite(end) for end in (measured.low, measured.high))


def write_result(result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor], folder: Path) -> Result:
    """Write a cell's folder: images (uint8 [3, h, w]) and rows first, ``result.json`` last and in one step, so that
    a folder with it is complete. Returns the result as written. Raises BenchError when the disk refuses."""
    text = "".join(_block_line(block) + "\n" for block in blocks(rows))
    samples = SampleFile(rows=len(rows), sha256=hashlib.sha256(text.encode()).hexdigest(), layout="blocks")
    with told("results", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{NEW}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temp = Path(tempfile.mkdtemp(prefix=NEW, dir=folder))
        try:
            names = _write_images(images, temp / IMAGES)
            hashes = {name: file_digest(temp / IMAGES / name) for name in names}
            whole = _validated(result, samples=samples.model_dump(), images=names, image_hashes=hashes)
            write_atomically(temp / SAMPLES, text)
            write_atomically(temp / RESULT, _dump(whole))
            _replace(folder, temp)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return whole


def add_warnings(result: Result, warnings: Sequence[str], folder: Path) -> Result:
    """Put ``warnings`` on a result that was written already; nothing else in its folder changes."""
    whole = _validated(result, warnings=[*result.warnings, *warnings])
    with told("results", folder):
        write_atomically(folder / RESULT, _dump(whole))
    return whole


def _replace(folder: Path, temp: Path) -> None:
    """Only renames from here on: a disk that is full has refused before, and the old result is still whole."""
    (folder / RESULT).unlink(missing_ok=True)
    shutil.rmtree(folder / IMAGES, ignore_errors=True)
    for name in (IMAGES, SAMPLES, RESULT):
        if (temp / name).exists():
            os.replace(temp / name, folder / name)
    flush_folder(folder)


def _validated(result: Result, **fields: Any) -> Result:
    """Sealed, and checked as a whole: ``model_copy`` alone checks nothing, nor do the free parts of a record."""
    whole = Result.model_validate({**result.model_dump(by_alias=True), **fields})
    return whole.model_copy(update={"seal": seal_of(whole)})


def seal_of(result: Result) -> str:
    """Digest of what was found, without how: the same for two runs that agree in every number, row and picture."""
    return digest(result.model_dump(by_alias=True, exclude_defaults=True, exclude=set(UNSEALED)), length=64)


def _dump(result: Result) -> str:
    """JSON with a line per part, and in lists a line per item: as small as one line, and a change is seen as one. What
    has its default is left out."""
    parts = {"schema": SCHEMA, **plain(result.model_dump(by_alias=True, exclude_defaults=True), "result")}
    return "{\n" + ",\n".join(f'"{name}": {_lines(part)}' for name, part in parts.items()) + "\n}\n"


def _lines(part: Any) -> str:
    items = [json.dumps(item, allow_nan=False) for item in part] if isinstance(part, list) else []
    return "[\n " + ",\n ".join(items) + "\n]" if items else json.dumps(part, allow_nan=False)


def merged(result: Result, rows: Sequence[SampleRow], asked: Iterable[str], folder: Path,
           ) -> tuple[Result, list[SampleRow]]:
    """A finished result with what the one in ``folder`` measured by metrics that were not ``asked`` for now.

    Only where that one rests on the same artefacts; else it says nothing about these.
    """
    try:
        before = read_result(folder)
        old_rows = rows_of(before, folder)
    except BenchError:
        return result, list(rows)
    if before.status != "ok" or before.cell.id != result.cell.id or evidence(before) != evidence(result):
        return result, list(rows)
    taken = {m.name for m in result.measurements}
    kept = [m for m in before.measurements if m.metric not in set(asked) and m.name not in taken]
    names = {m.name for m in kept}
    whole = result.model_copy(update={"measurements": [*result.measurements, *kept]})
    return whole, [*rows, *(row for row in old_rows if row.metric in names)]


def evidence(result: Result) -> dict[str, str]:
    """The artefacts that metrics looked at."""
    return {stage: key for stage, key in result.artefacts.items() if stage.partition("_")[0] != MEASURE}


def blocks(rows: Sequence[SampleRow]) -> list[Block]:
    """Rows by cluster and by measurements of the same samples, each in the order of its first row. Values keep six
    digits."""
    columns: dict[tuple[str, str], list[SampleRow]] = {}
    for row in rows:
        columns.setdefault((row.cluster, row.metric), []).append(row)
    found: dict[tuple[str, tuple[str, ...]], Block] = {}
    for (cluster, metric), column in columns.items():
        samples = [row.sample for row in column]
        block = found.setdefault((cluster, tuple(samples)), Block(cluster, samples, {}))
        block.values[metric] = [None if row.value is None else _short(row.value) for row in column]
        if reasons := {str(place): row.reason for place, row in enumerate(column) if row.reason}:
            block.reasons[metric] = reasons
    return list(found.values())


def _short(value: float) -> float:
    """A number whose JSON text is short: 0.333333, and 1 for 1.0."""
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e6 else rounded


def _block_line(block: Block) -> str:
    parts = {f.name: part for f in dataclasses.fields(block) if (part := getattr(block, f.name))}
    return json.dumps(parts, allow_nan=False, separators=(",", ":"))


def _write_images(images: Mapping[str, Tensor], folder: Path) -> list[str]:
    from bench.codecs import slug, write_png

    names: list[str] = []
    for name, pixels in images.items():
        folder.mkdir(exist_ok=True)
        file = f"{slug(name)}.png"
        if file in names:
            raise BenchError(f"results: two images would be called {file}.")
        write_png(pixels, folder / file)
        names.append(file)
    flush_folder(folder)
    return names


def read_result(folder: Path) -> Result:
    """The result in a cell's folder; raises BenchError, naming the file, when it is missing or not valid."""
    path = folder / RESULT
    try:
        data = json.loads(path.read_text(), parse_constant=_refuse)
        version = data.get("schema") if isinstance(data, dict) else None
        if version != SCHEMA:
            raise BenchError(f"results: {path} has schema {version!r}; this version of bench reads schema {SCHEMA}.")
        return Result.model_validate(data)
    except FileNotFoundError:
        raise BenchError(f"results: {path} does not exist.") from None
    except ValidationError as error:
        raise BenchError(f"results: {path} is not a valid result: {_first(error)}.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchError(f"results: {path} cannot be read: {error}.") from error


def _refuse(constant: str) -> float:
    raise json.JSONDecodeError(f"{constant} is not a number", constant, 0)


def read_rows(folder: Path) -> list[SampleRow]:
    """The rows beside a result; raises BenchError when they are not those that were written with it."""
    return rows_of(read_result(folder), folder)


def rows_of(result: Result, folder: Path) -> list[SampleRow]:
    """As ``read_rows``, when the result is at hand."""
    data = _sample_bytes(result, folder)
    return parse_rows(data, result.samples.layout, folder / SAMPLES) if result.samples else []


def blocks_of(result: Result, folder: Path) -> list[Block]:
    """As ``rows_of``, by the lines that hold them; of the first layout a line each."""
    data, path = _sample_bytes(result, folder), folder / SAMPLES
    if result.samples and result.samples.layout == "rows":
        return [row.alone() for row in parse_rows(data, "rows", path)]
    return parse_blocks(data, path)


def _sample_bytes(result: Result, folder: Path) -> bytes:
    path = folder / SAMPLES
    if result.samples is None:
        return b""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BenchError(f"results: {path} cannot be read: {error}.") from error
    if hashlib.sha256(data).hexdigest() != result.samples.sha256:
        raise BenchError(f"results: {path} is not the file that was written with its result (hash mismatch).")
    return data


def parse_rows(data: bytes, layout: str, path: Path) -> list[SampleRow]:
    """The rows in the bytes of ``samples.jsonl``, whose place is named in errors."""
    if layout == "rows":
        return _parsed(_rows(), data, path)
    blocks = parse_blocks(data, path)
    try:
        return [row for block in blocks for row in block.rows()]
    except ValueError as error:
        raise BenchError(f"results: {path} holds a row that is not valid: {error}.") from error


def parse_blocks(data: bytes, path: Path) -> list[Block]:
    return _parsed(_blocks(), data, path)


def _parsed(kind: TypeAdapter[T], data: bytes, path: Path) -> T:
    try:
        return kind.validate_json(b"[" + b",".join(data.splitlines()) + b"]")
    except ValidationError as error:
        raise BenchError(f"results: {path} holds a row that is not valid: {_first(error)}.") from error


@cache
def _rows() -> TypeAdapter[list[SampleRow]]:
    return TypeAdapter(list[SampleRow])


@cache
def _blocks() -> TypeAdapter[list[Block]]:
    return TypeAdapter(list[Block])


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, found['loc'])) or 'record'}: {found['msg']}"


def read_suite(folder: Path) -> list[Result]:
    """All results of a suite, in the order of their folders' names; raises BenchError at the first bad one."""
    if not folder.is_dir():
        raise BenchError(f"results: there is no suite in {folder}.")
    return [read_result(path) for path in result_folders(folder)]


def result_folders(folder: Path) -> list[Path]:
    """The cells' folders of a suite that hold a result."""
    return sorted(path.parent for path in folder.glob(f"*/{RESULT}"))
