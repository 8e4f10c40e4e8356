"""A results folder is graded by what can be computed again, and what was tampered with is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from attacks.dreambooth import DreamBooth
from attacks.purifier_none import NoPurifier
from bench import cli, discovery, verify
from bench.config import Cell, Settings, Tracker, cell_id
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.errors import BenchError
from bench.leaderboard import write_boards
from bench.planner import Planned, freeze
from bench.plugin import REGISTRY
from bench.protocols import CustomizationProtocol
from bench.reproduce import drawn, verdict
from bench.results import MeasurementRecord, SampleRow, read_result, read_rows, result_folders, write_result
from bench.runner import run_cell
from bench.verify import Report, reproduce_cells, told, verify_folder, verify_suite
from defenses.noise import SignNoise
from defenses.none import NoDefense
from metrics.image_quality import ImageQuality

REFERENCE = Path(__file__).resolve().parents[1] / "results/reference"


@dataclass(frozen=True)
class Place:
    """A small suite of real cells, with its store and its model."""

    suite: Path
    store: Path
    model: Path

    def cell(self, defense: str = "noise") -> Path:
        return next(p for p in result_folders(self.suite) if read_result(p).cell.defense.name == defense)

    def report(self) -> Report:
        return verify_suite(self.suite, self.store)


def planned(model: Path, defense: Any) -> Cell:
    known = resolve(str(model))
    cell = Cell(
        id="", suite="small", track="customization", model=str(model), model_digest=known.digest,
        capabilities=known.capabilities, allow_pickle=False, seed=0, data=MicroSubjects(count=3, size=16),
        defense=defense, purifier=NoPurifier(), attack=DreamBooth(steps=1, class_images=1, class_steps=1, batch=1),
        protocol=CustomizationProtocol(per_prompt=1, steps=1), metrics={"image_quality": ImageQuality()},
        overrides=(f"model={model}",),
    )
    return replace(cell, id=cell_id(cell))


@pytest.fixture(scope="module")
def original(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    discovery.load()
    root = tmp_path_factory.mktemp("verified")
    shutil.copytree(tiny_sd, root / "model")
    cells = [planned(root / "model", defense) for defense in (NoDefense(), SignNoise(eps=4.0))]
    list(freeze([Planned(cell, "run") for cell in cells], root / "results"))
    for cell in cells:
        how = Settings(root / "results", root / "store", "cpu", 1, Tracker(wandb="disabled"))
        assert run_cell(cell, how).status == "ok"
    write_boards(root / "results/small")
    return Place(root / "results/small", root / "store", root / "model")


@pytest.fixture
def place(original: Place, tmp_path: Path) -> Place:
    """A copy to tamper with. The model stays where it is: records say its place."""
    shutil.copytree(original.suite, tmp_path / "small")
    shutil.copytree(original.store, tmp_path / "store")
    return Place(tmp_path / "small", tmp_path / "store", original.model)


def edit(file: Path, change: Callable[[Any], None]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def of(record: Any, name: str) -> dict[str, Any]:
    return next(m for m in record["measurements"] if m["name"] == name)


def test_an_untouched_folder_is_consistent(place: Place) -> None:
    report = place.report()
    assert (report.grade, report.problems) == ("consistent", [])
    assert report.checked["identities"] == report.checked["seals"] == report.checked["planned cells"] == 2
    assert report.checked["hashes of images"] == len(list(place.suite.rglob("*.png"))) > 0
    assert report.checked["values computed from rows"] == 6
    assert report.checked["weights of models"] == 1
    assert report.checked["files of the leaderboard"] == 4
    artefacts = {p.parent for p in place.store.rglob("manifest.json")}
    assert report.checked["artefacts in the store"] > 4 and report.checked["artefacts in the store"] <= len(artefacts)
    assert report.checked["values in the store"] == sum(
        m.value is not None for p in result_folders(place.suite) for m in read_result(p).measurements)
    assert not report.unchecked


def another_value(place: Place) -> tuple[str, str, str, str]:
    """Recorded value of a measurement."""
    file = place.cell() / "result.json"
    before = of(json.loads(file.read_text()), "ssim")["value"]
    edit(file, lambda record: of(record, "ssim").update(value=0.999, low=None, high=None))
    return f"{place.cell().name}/result.json", "ssim: the value is not what its rows give", f"{before:.6g}", "0.999"


def another_row(place: Place) -> tuple[str, str, str, str]:
    """One number in the rows."""
    file = place.cell() / "samples.jsonl"
    before, after = file.read_bytes(), file.read_bytes().replace(b'"linf":[4,', b'"linf":[3,', 1)
    file.write_bytes(after)
    return (f"{place.cell().name}/samples.jsonl", "was changed after its result was written",
            hashlib.sha256(before).hexdigest()[:16], hashlib.sha256(after).hexdigest()[:16])


def a_row_less(place: Place) -> tuple[str, str, str, str]:
    """A person whose rows are gone."""
    file = place.cell() / "samples.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[1:]))
    return f"{place.cell().name}/result.json", "ssim: n is not what its rows give", "8", "12"


def a_row_less_and_hashed_again(place: Place) -> tuple[str, str, str, str]:
    """The same, with a new hash and a new count."""
    told = a_row_less(place)
    data = (place.cell() / "samples.jsonl").read_bytes()
    edit(place.cell() / "result.json",
         lambda record: record["samples"].update(sha256=hashlib.sha256(data).hexdigest(), rows=24))
    return told


def a_swapped_image(place: Place) -> tuple[str, str, str, str]:
    """Two cells' pictures of one person."""
    one, other = (next((place.cell(name) / "images").glob("*.png")) for name in ("noise", "none"))
    found = hashlib.sha256(other.read_bytes()).hexdigest()[:16]
    expected = hashlib.sha256(one.read_bytes()).hexdigest()[:16]
    shutil.copy(other, one)
    return f"{place.cell().name}/images/{one.name}", "is not the image that was written", expected, found


def an_image_less(place: Place) -> tuple[str, str, str, str]:
    one = next((place.cell() / "images").glob("*.png"))
    one.unlink()
    return f"{place.cell().name}/images/{one.name}", "is missing", "", ""


def a_weight_byte(place: Place) -> tuple[str, str, str, str]:
    """One bit of the model that the attacker trained, its time set back."""
    file = next(place.store.glob("customise/*/**/*.safetensors"))
    flip(file)
    return "store/customise", f"{file} does not match its hash", "", ""


def flip(file: Path) -> None:
    """The lowest bit of a file's last byte. The file itself is new: others may be linked to the same bytes."""
    times, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def an_edited_option(place: Place) -> tuple[str, str, str, str]:
    """The budget, as if the defense had needed less."""
    edit(place.cell() / "result.json", lambda record: record["cell"]["defense"]["parameters"].update(eps=2.0))
    cell = place.cell()
    return (f"{cell.name}/result.json", "the recorded configuration is that of another cell", cell.name,
            verify.identity_of(read_result(cell).cell))


def an_edited_protocol(place: Place) -> tuple[str, str, str, str]:
    """What a comparison must share."""
    file = place.cell() / "result.json"
    before = of(json.loads(file.read_text()), "psnr")["protocol_hash"]
    edit(file, lambda record: of(record, "psnr")["protocol"].update(peak=1))
    return f"{place.cell().name}/result.json", "psnr: its protocol has another hash", before, ""


def a_nicer_name(place: Place) -> tuple[str, str, str, str]:
    """A label, which no identity holds."""
    edit(place.cell() / "result.json", lambda record: record["cell"]["defense"].update(label="ours"))
    return f"{place.cell().name}/result.json", "was changed after it was written", "", ""


def a_cell_less(place: Place) -> tuple[str, str, str, str]:
    """A cell that one would rather not show."""
    cell = place.cell()
    shutil.rmtree(cell)
    return f"{cell.name}/result.json", "is missing; plan.jsonl has it", "", ""


def an_edited_board(place: Place) -> tuple[str, str, str, str]:
    """A digit in the table that people read."""
    file = place.suite / "leaderboard.json"
    value = json.loads(file.read_text())["tables"][0]["lines"][0]["scores"]["psnr"]["value"]
    file.write_text(file.read_text().replace(str(value), "99.5"))
    return "leaderboard.json", "does not follow from the cells", str(value), "99.5"


@pytest.mark.parametrize("tamper", [
    another_value, another_row, a_row_less, a_row_less_and_hashed_again, a_swapped_image, an_image_less, a_weight_byte,
    an_edited_option, an_edited_protocol, a_nicer_name, a_cell_less, an_edited_board,
], ids=lambda tamper: tamper.__name__)
def test_what_was_tampered_with_is_named(place: Place, tamper: Callable[[Place], tuple[str, str, str, str]]) -> None:
    cell = place.cell().name
    file, what, expected, found = tamper(place)
    report = place.report()
    assert report.grade == "claimed"
    named = [p for p in report.problems if file in p.file and what in p.what]
    assert named, [p.line() for p in report.problems]
    for wanted, said in ((expected, named[0].expected), (found, named[0].found)):
        assert not wanted or said == wanted
    assert cell in (named[0].cell, named[0].file.split("/")[0]) or tamper in (a_weight_byte, an_edited_board)
    assert named[0].line() in "\n".join(told(report))


def test_a_changed_weight_of_the_attacked_model_is_named(original: Place, tmp_path: Path) -> None:
    """Its file times are set back, so that remembered hashes would not notice."""
    file = next(original.model.glob("unet/*.safetensors"))
    kept = file.read_bytes()
    flip(file)
    try:
        report = verify_suite(original.suite, None, boards=False)
    finally:
        file.write_bytes(kept)
    assert len(report.problems) == 1, "cells that share a model name it once"
    assert f"the weights in {original.model} are not those it was computed with" in report.problems[0].what


def test_a_changed_weight_of_an_embedded_model_is_named(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the list of hashes that ships with the models; without that, weights of another version are no fault."""
    monkeypatch.setattr("bench.diffusion.checkpoints.MICRO", tmp_path / "weights")
    shutil.copytree(place.model, tmp_path / "weights/micro-t")
    for cell in result_folders(place.suite):
        edit(cell / "result.json", lambda record: (record.pop("seal"), record["cell"]["model"].update(name="micro-t")))
    files = [p for p in (tmp_path / "weights").rglob("*") if p.is_file()]
    (tmp_path / "weights/SHA256SUMS").write_text("".join(
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(tmp_path / 'weights')}\n" for p in files))
    assert verify_suite(place.suite, None, boards=False).problems == []
    changed = next((tmp_path / "weights/micro-t/unet").glob("*.safetensors"))
    flip(changed)
    report = verify_suite(place.suite, None, boards=False)
    assert [p.file for p in report.problems] == [changed.as_posix()]
    (tmp_path / "weights/SHA256SUMS").unlink()
    report = verify_suite(place.suite, None, boards=False)
    assert report.grade == "consistent" and "micro-t: the cells were computed with weights" in "".join(report.notes)


def test_what_cannot_be_checked_is_said(place: Place) -> None:
    for cell in result_folders(place.suite):
        edit(cell / "result.json", lambda record: [record.pop(name) for name in ("seal", "image_hashes")])
    shutil.rmtree(place.cell() / "images")
    (place.suite / "plan.jsonl").unlink()
    report = verify_suite(place.suite, None)
    assert report.grade == "consistent", [p.line() for p in report.problems]
    said = "\n".join(told(report))
    for what in ("2 records without a seal", "2 images that are not in the folder", "2 images without a hash",
                 "plan (there is no plan.jsonl)", "leaderboard.html (it shows images", "no store is at hand"):
        assert what in said


def test_another_version_is_told_and_is_no_fault(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = REGISTRY.facts["defense", "noise"]
    monkeypatch.setitem(REGISTRY.facts, ("defense", "noise"), replace(facts, version=facts.version + 1))
    monkeypatch.setattr(verify, "SCHEMA_VERSION", 2)
    report = place.report()
    assert report.grade == "consistent"
    notes = "\n".join(report.notes)
    assert "defense noise: written by its version 1, here it is version 2" in notes
    assert report.checked["of these by schema 1 of identities (schema 2 would name them anew)"] == 2


def test_a_folder_of_suites(place: Place, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(place.suite, tmp_path / "all" / name)
    assert [r.folder.name for r in verify_folder(tmp_path / "all", boards=False)] == ["a", "b"]
    with pytest.raises(BenchError, match="no results"):
        verify_folder(tmp_path / "all/a/images", boards=False)


def test_cells_run_again_come_out_the_same_to_the_last_bit(place: Place) -> None:
    report, said = place.report(), []
    reproduce_cells(report, 1, 0, "cpu", said.append)
    assert report.grade == "reproduced", [p.line() for p in report.problems]
    assert report.reruns[0].identical and report.reruns[0].cell in said[0]
    assert "all 3 measurements are bit-identical" in "\n".join(told(report))


def test_a_forgery_that_fits_together_is_found_by_running_it(place: Place) -> None:
    """Rows, values, intervals, hashes and seal all made anew: nothing but a run knows better."""
    cell = forge(place)
    report = verify_suite(place.suite, None)
    assert report.grade == "consistent", [p.line() for p in report.problems]
    stored = verify_suite(place.suite, place.store, boards=False)
    assert [p.what for p in stored.problems] == ["psnr: the store has another value"]
    reproduce_cells(report, 2, 0, "cpu", lambda line: None)
    assert report.grade == "claimed"
    assert [(p.cell, p.what) for p in report.problems] == [(cell.name, "psnr: run again here it is another")]


def test_a_store_that_holds_another_run_is_told_of_and_is_no_witness(place: Place, tmp_path: Path) -> None:
    """Who runs the cells himself, on another machine above all, has other last bits under the same keys."""
    forge(place)
    how = Settings(tmp_path / "own", tmp_path / "other", "cpu", 1, Tracker(wandb="disabled"))
    assert run_cell(planned(place.model, SignNoise(eps=4.0)), how).status == "ok"
    report = verify_suite(place.suite, tmp_path / "other", boards=False)
    assert report.grade == "consistent", [p.line() for p in report.problems]
    assert "another run of 1 of these cells" in "\n".join(report.notes)
    assert "2 of 3 values came out the same to the last bit" in "\n".join(report.notes)
    assert report.checked["values in the store"] == 0


def forge(place: Place) -> Path:
    """Make one cell's PSNR 9 dB better, with rows, interval, hashes, seal and boards to match."""
    cell = place.cell()
    result = read_result(cell)
    rows = [SampleRow(r.metric, r.sample, r.cluster, r.value + 9, r.reason) if r.metric == "psnr" and r.value else r
            for r in read_rows(cell)]
    better = [m.model_copy(update={"value": m.value + 9, "low": m.low + 9, "high": m.high + 9}) if m.name == "psnr"
              else m for m in result.measurements]
    images = {name.removesuffix(".png"): _pixels(cell / "images" / name) for name in result.images}
    write_result(result.model_copy(update={"measurements": better}), rows, images, cell)
    write_boards(place.suite)
    return cell


def _pixels(file: Path) -> Any:
    from bench.codecs import read_png

    return read_png(file)


def test_a_cell_of_another_version_is_told_and_another_is_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = REGISTRY.facts["defense", "noise"]
    monkeypatch.setitem(REGISTRY.facts, ("defense", "noise"), replace(facts, version=2))
    report = verify_suite(place.suite, None, boards=False)
    reproduce_cells(report, 2, 0, "cpu", lambda line: None)
    assert report.grade == "reproduced" and [r.cell for r in report.reruns] == [place.cell("none").name]
    assert "not run again: defense noise was version 1 and is version 2 here" in "".join(report.notes)
    shutil.rmtree(place.cell("none"))
    (place.suite / "plan.jsonl").unlink()
    report = verify_suite(place.suite, None, boards=False)
    reproduce_cells(report, 2, 0, "cpu", lambda line: None)
    assert [p.what for p in report.problems] == ["holds no cell that this version can run again"]


def test_the_draw_depends_on_seed_and_names_alone(original: Place) -> None:
    result = read_result(original.cell())
    cells = {Path(f"x{i:02d}"): result.model_copy(update={"cell": result.cell.model_copy(update={"id": f"{i:016d}"})})
             for i in range(20)}
    backwards = dict(reversed(cells.items()))
    assert drawn(cells) == drawn(backwards) and set(drawn(cells)) == set(cells)
    assert drawn(cells, 1) != drawn(cells)
    failed = {path: cell.model_copy(update={"status": "n/a"}) for path, cell in cells.items()}
    assert drawn(failed) == []


@pytest.mark.parametrize(("again", "expected"), [
    ({}, "identical"), ({"low": 0.3}, "identical"), ({"value": 0.55}, "within"), ({"value": 0.61}, "outside"),
    ({"protocol_hash": "q"}, "outside"), ({"value": None, "low": None, "high": None}, "outside"), ({"n": 4}, "within"),
])
def test_verdicts_of_values_with_rows(again: dict[str, Any], expected: str) -> None:
    old = MeasurementRecord(name="x", metric="x", value=0.5, low=0.4, high=0.6, n=3, protocol_hash="p")
    rows = [SampleRow("x", "a", "s", 0.5)]
    assert verdict(old, old.model_copy(update=again), rows, rows) == expected
    other_rows = {"identical": "within"}.get(expected, expected)
    assert verdict(old, old.model_copy(update=again), rows, [SampleRow("x", "a", "s", 0.4)]) == other_rows


@pytest.mark.parametrize(("again", "expected"), [
    ({}, "identical"), ({"value": 80.04}, "within"), ({"value": 80.2}, "outside"),
    ({"low": 70.0, "high": 90.0}, "within"),
])
def test_verdicts_of_values_without_rows_and_interval(again: dict[str, Any], expected: str) -> None:
    old = MeasurementRecord(name="fid", metric="fid", value=80.0, n=3, protocol_hash="p")
    assert verdict(old, old.model_copy(update=again), [], []) == expected


def test_the_verb(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(place.suite), "--store", str(place.store)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("small: consistent (2 ok)")
    another_value(place)
    assert cli.run(["verify", str(place.suite), "--store", str(place.store)]) == 1
    assert "problem: " in capsys.readouterr().out
    assert cli.run(["verify", str(place.suite), "--reproduce", "some"]) == 2
    assert "invalid int value" in capsys.readouterr().err


COMMITTED = """
import sys
from pathlib import Path
from bench import discovery
from bench.verify import told, verify_suite
discovery.load()
for suite, boards in (("quickstart", True), ("customization", False)):
    report = verify_suite(Path(sys.argv[1]) / suite, None, boards)
    print("\\n".join(told(report)))
    assert report.grade == "consistent" and len(report.cells) > 20, suite
assert "torch" not in sys.modules
"""


def test_the_committed_results_are_consistent() -> None:
    """Boards of hundreds of cells take longer; the slow test makes those as well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMMITTED, str(REFERENCE)], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_every_committed_board_follows_from_its_cells() -> None:
    discovery.load()
    for report in verify_folder(REFERENCE):
        assert report.grade == "consistent", [p.line() for p in report.problems]


@pytest.mark.slow
def test_three_cells_of_the_quickstart_are_reproduced() -> None:
    discovery.load()
    report = verify_suite(REFERENCE / "quickstart", None, boards=False)
    reproduce_cells(report, 3, 0, "cpu", print)
    assert report.grade == "reproduced", [p.line() for p in report.problems]
    assert len(report.reruns) == 3
