"""Who sees what on the editing track: the defender, told or not; the editor; and what the edits are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from attacks.inpaint import Inpaint
from attacks.instruct_pix2pix import InstructPix2Pix
from attacks.purifier_none import NoPurifier
from attacks.sdedit import SDEdit
from bench.codecs import read_png
from bench.config import Cell
from bench.data.micro_edits import MicroEdits
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.plugin import Facts
from bench.protocols import EditingProtocol
from bench.records import Budget, EditingEvidence, EditTask, ImageSet, Measurement, Row, Subject
from bench.results import Result
from bench.runner import run_cell
from bench.testing.pipelines import save_stable_diffusion
from defenses.noise import SignNoise as Noise
from defenses.none import NoDefense
from tests.test_runner import settings, stages

PROTOCOL = EditingProtocol(seeds=2, steps=2)
DATA = MicroEdits(count=3, size=16, photos=1)


@dataclass
class Shift:
    """Shifts photos by some levels, and notes what it was told and which model it was given."""

    by: int = 2
    promised: int = 2
    met: ClassVar[list[tuple[tuple[Subject, ...], str]]] = []
    __plugin__ = Facts("defense", "shift", ("editing",), acts_on="images", needs=("text_to_image",))

    def budget(self) -> Budget:
        return Budget(self.promised)

    def protect(self, subjects: Any, model: Any, ctx: Any) -> list[ImageSet]:
        self.met.append((tuple(subjects), model.digest))
        return [replace(s.published, pixels=s.published.pixels.clamp(max=255 - self.by) + self.by) for s in subjects]


@dataclass
class Negative:
    """Purifies photos into their negatives."""

    __plugin__ = Facts("purifier", "negative", ("editing",))

    def purify(self, photos: ImageSet, model: Any, ctx: Any) -> ImageSet:
        return replace(photos, pixels=255 - photos.pixels)


@dataclass
class Spy:
    """Keeps the evidence."""

    met: ClassVar[list[EditingEvidence]] = []
    __plugin__ = Facts("metric", "spy", ("editing",))

    def measure(self, evidence: Any, ctx: Any) -> list[Measurement]:
        self.met.append(evidence)
        rows = tuple(Row(task.subject.name, task.subject.name, 1.0) for task in evidence.tasks)
        return [Measurement("spied", 1.0, len(rows), "", None, rows=rows)]


@dataclass
class Maskless:
    """The drawn tasks without masks, or whatever else is wrong with them."""

    trouble: str = "mask"
    inner: MicroEdits = field(default_factory=lambda: DATA)
    __plugin__ = Facts("data", "maskless", ("editing",))

    def edits(self) -> list[EditTask]:
        if self.trouble == "mask":
            return [replace(task, edit=replace(task.edit, mask=None)) for task in self.inner.edits()]
        [two] = MicroSubjects(count=1, size=16, photos_per_set=2).subjects()
        return [replace(self.inner.edits()[0], subject=two)]

    def digest(self) -> str:
        return f"maskless-{self.trouble}"


@pytest.fixture(autouse=True)
def _forget() -> None:
    Shift.met.clear()
    Spy.met.clear()


def editing(model: Path, defense: Any = None, **changes: Any) -> Cell:
    known = resolve(str(model))
    cell = Cell(
        id="e" * 16, suite="test", track="editing", model=str(model), model_digest=known.digest,
        capabilities=known.capabilities, allow_pickle=False, seed=0, data=DATA, defense=defense or NoDefense(),
        purifier=NoPurifier(), attack=SDEdit(), protocol=PROTOCOL, metrics={"spy": Spy()},
    )
    return replace(cell, **changes)


def run(cell: Cell, folder: Path) -> tuple[Result, EditingEvidence]:
    result = run_cell(cell, settings(folder))
    assert result.status == "ok", result.error
    return result, Spy.met[-1]


@pytest.mark.parametrize(("attack", "name"), [
    (SDEdit(), "sd"), (Inpaint(), "sd"), (Inpaint(), "inpaint"), (InstructPix2Pix(), "ip2p"),
])
def test_a_cell_runs_to_a_record_and_a_sheet(
    attack: Any, name: str, tiny_sd: Path, tiny_inpaint: Path, tiny_ip2p: Path, tmp_path: Path,
) -> None:
    model = {"sd": tiny_sd, "inpaint": tiny_inpaint, "ip2p": tiny_ip2p}[name]
    result, evidence = run(editing(model, Noise(eps=4), attack=attack), tmp_path)
    assert stages(result) == {"protect": [False], "purify": [False], "edit": [False, False], "measure": [False]}
    assert evidence.budget == Budget(4) and evidence.seeds == 2
    assert len(evidence.edited.images) == len(evidence.benign.images) == 6
    assert not torch.equal(evidence.edited.images.pixels, evidence.benign.images.pixels)
    change = evidence.protected.pixels.int() - torch.cat([t.subject.published.pixels for t in evidence.tasks]).int()
    assert change.abs().max() == 4
    [sheet] = (tmp_path / "results/test" / ("e" * 16) / "images").glob("*.png")
    drawn = read_png(sheet)
    assert drawn.shape == (3, 5 * 16, 3 * 16)
    assert torch.equal(drawn[:, :16, 16:32], evidence.tasks[1].subject.published.pixels[0])
    assert torch.equal(drawn[:, -16:, 32:], evidence.edited.images.pixels[4])


def test_without_a_defense_the_edit_is_the_benign_one(tiny_sd: Path, tmp_path: Path) -> None:
    result, evidence = run(editing(tiny_sd), tmp_path)
    assert stages(result)["edit"] == [False, True], "drawn once"
    assert torch.equal(evidence.benign.images.pixels, evidence.edited.images.pixels)
    harmless, _ = run(editing(tiny_sd, Noise(eps=0), id="d" * 16), tmp_path)
    assert stages(harmless)["edit"] == [True, True]


def test_photos_under_every_defense_are_edited_from_the_same_seeds(tiny_sd: Path, tmp_path: Path) -> None:
    _, weak = run(editing(tiny_sd, Noise(eps=2)), tmp_path)
    result, strong = run(editing(tiny_sd, Noise(eps=8), id="d" * 16), tmp_path)
    assert stages(result)["edit"] == [True, False], "the benign edit serves every defense"
    for one in (weak, strong):
        assert one.edited.seeds == one.benign.seeds == weak.benign.seeds
        assert one.edited.images.names == one.benign.images.names
    assert len(set(weak.edited.seeds)) == 6
    names = [task.subject.name for task in weak.tasks]
    assert weak.edited.images.names == tuple(f"{name}_{place}" for name in names for place in (0, 1))
    assert weak.edited.prompts == tuple(t.edit.instruction for t in weak.tasks for _ in range(2))
    _, other = run(editing(tiny_sd, Noise(eps=2), seed=1), tmp_path)
    assert not set(other.edited.seeds) & set(weak.edited.seeds)


def test_a_photo_is_edited_alike_in_any_company(tiny_sd: Path, tmp_path: Path) -> None:
    _, three = run(editing(tiny_sd, Noise(eps=4)), tmp_path)
    _, one = run(editing(tiny_sd, Noise(eps=4), data=replace(DATA, count=1)), tmp_path)
    assert one.edited.seeds == three.edited.seeds[:2]
    assert (one.benign.images.pixels.int() - three.benign.images.pixels[:2].int()).abs().max() <= 1


def test_the_editor_works_on_purified_photos_and_is_compared_with_the_original(tiny_sd: Path, tmp_path: Path) -> None:
    _, plain = run(editing(tiny_sd), tmp_path)
    _, washed = run(editing(tiny_sd, Shift(), purifier=Negative(), id="d" * 16), tmp_path)
    assert torch.equal(washed.purified.pixels, 255 - washed.protected.pixels)
    assert torch.equal(washed.benign.images.pixels, plain.benign.images.pixels)
    assert not torch.equal(washed.edited.images.pixels, plain.edited.images.pixels)


def test_a_defender_is_told_the_edits_or_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    knowing, evidence = run(editing(tiny_sd, Shift()), tmp_path)
    blind, _ = run(editing(tiny_sd, Shift(), protocol=replace(PROTOCOL, told=False), id="d" * 16), tmp_path)
    (told, _), (untold, _) = Shift.met
    assert [s.edits for s in told] == [(task.edit,) for task in evidence.tasks]
    assert [s.edits for s in untold] == [(), (), ()]
    assert knowing.artefacts["protect"] != blind.artefacts["protect"]
    assert stages(blind)["edit"] == [True, True], "the attacker does the same to the same photos"


def test_photos_protected_on_one_model_are_edited_with_another(
    tiny_sd: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
) -> None:
    other = save_stable_diffusion(tmp_path_factory.mktemp("other") / "sd", seed=1)
    home, away = resolve(str(tiny_sd)), resolve(str(other))
    white, near = run(editing(tiny_sd, Shift()), tmp_path)
    moved, far = run(editing(other, Shift(), surrogate=str(tiny_sd), surrogate_digest=home.digest,
                             surrogate_capabilities=home.capabilities, id="d" * 16), tmp_path)
    assert home.digest != away.digest and [digest for _, digest in Shift.met] == [home.digest]
    assert moved.artefacts["protect"] == white.artefacts["protect"]
    assert not torch.equal(near.benign.images.pixels, far.benign.images.pixels)
    assert near.benign.seeds == far.benign.seeds


def test_photos_over_their_budget_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    result = run_cell(editing(tiny_sd, Shift(by=3)), settings(tmp_path))
    assert result.status == "failed" and "over their budget of 2" in result.error.message
    assert not list((tmp_path / "store").glob("protect/[0-9a-f]*")), "nothing invalid is stored"


def test_what_an_editor_cannot_do_is_said_before_anything_is_protected(tiny_sd: Path, tmp_path: Path) -> None:
    result = run_cell(editing(tiny_sd, Shift(), data=Maskless(), attack=Inpaint()), settings(tmp_path))
    assert (result.status, Shift.met) == ("n/a", [])
    assert "inpaint needs a mask for every edit" in result.reason
    steps = run_cell(editing(tiny_sd, Shift(), attack=SDEdit(strength=0.1)), settings(tmp_path))
    assert (steps.status, Shift.met) == ("failed", [])
    assert "less than one step" in steps.error.message


def test_a_subject_with_two_published_photos_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    result = run_cell(editing(tiny_sd, data=Maskless(trouble="two")), settings(tmp_path))
    assert result.status == "failed" and "publishes 2 photos" in result.error.message


def test_only_the_first_seed_keeps_a_sheet(tiny_sd: Path, tmp_path: Path) -> None:
    result, _ = run(editing(tiny_sd, seed=1), tmp_path)
    assert not result.images
