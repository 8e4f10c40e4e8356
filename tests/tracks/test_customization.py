"""Who sees what on the customization track: the surrogate, the attacked model, the mix of photos."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bench.config import Cell
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.plugin import Facts
from bench.protocols import CustomizationProtocol
from bench.records import Budget, ImageSet, Measurement, Row
from bench.results import Result, read_result
from bench.runner import run_cell
from bench.testing.pipelines import save_stable_diffusion
from bench.tracks.customization import mixed, unprotected
from tests.test_runner import customization, settings, stages

PROTOCOL = CustomizationProtocol(per_prompt=1, steps=1)


@dataclass
class Optimiser:
    """Shifts photos by 2 levels and notes which model it was given."""

    met: ClassVar[list[str]] = []
    __plugin__ = Facts("defense", "optimiser", ("customization",), acts_on="images", needs=("text_to_image",))

    def budget(self) -> Budget:
        return Budget(2)

    def protect(self, subjects: Any, model: Any, ctx: Any) -> list[ImageSet]:
        self.met.append(model.digest)
        return [replace(s.published, pixels=s.published.pixels.clamp(max=253) + 2) for s in subjects]


@dataclass
class Watcher:
    """Purifies nothing and notes photos and model."""

    met: ClassVar[list[tuple[str, ImageSet]]] = []
    __plugin__ = Facts("purifier", "watcher", ("customization",))

    def purify(self, photos: ImageSet, model: Any, ctx: Any) -> ImageSet:
        self.met.append((model.digest, photos))
        return photos


@dataclass
class Counted:
    """How many subjects there are."""

    __plugin__ = Facts("metric", "counted", ("customization",))

    def measure(self, evidence: Any, ctx: Any) -> list[Measurement]:
        n = float(len(evidence.subjects))
        return [Measurement("counted", n, 1, "", None, rows=(Row("all", "all", n),))]


@pytest.fixture(autouse=True)
def _forget() -> None:
    Optimiser.met.clear()
    Watcher.met.clear()


@pytest.fixture(scope="module")
def other_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape with other weights."""
    return save_stable_diffusion(tmp_path_factory.mktemp("other") / "sd", seed=1)


def transferred(model: Path, surrogate: Path, **changes: Any) -> Cell:
    known = resolve(str(surrogate))
    return customization(model, Optimiser(), surrogate=str(surrogate), surrogate_digest=known.digest,
                         surrogate_capabilities=known.capabilities, id="d" * 16, **changes)


def test_photos_protected_on_one_model_are_attacked_on_another(
    tiny_sd: Path, other_sd: Path, tmp_path: Path,
) -> None:
    home, away = resolve(str(tiny_sd)).digest, resolve(str(other_sd)).digest
    assert home != away
    white = run_cell(customization(tiny_sd, Optimiser()), settings(tmp_path))
    moved = run_cell(transferred(other_sd, tiny_sd, purifier=Watcher()), settings(tmp_path))
    assert (white.status, moved.status) == ("ok", "ok"), moved.error
    assert stages(moved)["protect"] == [True], "the same protected set serves both"
    assert moved.artefacts["protect"] == white.artefacts["protect"]
    assert Optimiser.met == [home]
    assert {digest for digest, _ in Watcher.met} == {away}
    assert not any(stages(moved)["customise"])
    record = read_result(tmp_path / "results/test" / ("d" * 16)).cell
    assert (record.model.digest, record.surrogate.digest, record.surrogate.name) == (away, home, tiny_sd.name)
    assert white.cell.surrogate is None
    assert moved.measurements[0].protocol_hash != white.measurements[0].protocol_hash


def shared(tiny_sd: Path, folder: Path, share: float) -> Result:
    cell = customization(tiny_sd, Optimiser(), purifier=Watcher(), protocol=replace(PROTOCOL, clean_share=share),
                         id=f"{share:016.2f}")
    return run_cell(cell, settings(folder))


def test_the_attacker_finds_some_originals_and_purifies_the_mix(tiny_sd: Path, tmp_path: Path) -> None:
    none, half = shared(tiny_sd, tmp_path, 0), shared(tiny_sd, tmp_path, 0.5)
    assert half.status == "ok", half.error
    assert (stages(half)["protect"], stages(half)["purify"]) == ([True], [False])
    assert half.cell.protocol["clean_share"] == 0.5
    assert "clean_share" not in none.cell.protocol
    for subject, (_, photos) in zip(MicroSubjects(count=3, size=16).subjects(), Watcher.met[3:], strict=True):
        untouched = (photos.pixels == subject.published.pixels).flatten(1).all(1)
        assert untouched.sum() == 2, "half of four photos"
    linf = [r.measurement("linf") for r in (none, half)]
    assert [m.value for m in linf if m] == [2, 2], "the protected file is judged, not the mix"


def test_without_protection_a_clean_share_changes_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    run_cell(customization(tiny_sd), settings(tmp_path))
    half = replace(customization(tiny_sd), protocol=replace(PROTOCOL, clean_share=0.5), id="h" * 16)
    again = stages(run_cell(half, settings(tmp_path)))
    assert all(again["customise"]) and all(again["generate"])


def test_a_larger_share_holds_a_smaller_one_under_every_defense() -> None:
    subject = MicroSubjects(count=1, size=16, photos_per_set=5).subjects()[0]
    chosen = [set(unprotected(subject, share, 0)) for share in (0, 0.25, 0.5, 0.75)]
    assert [len(of) for of in chosen] == [0, 1, 2, 4]
    assert chosen[0] <= chosen[1] <= chosen[2] <= chosen[3]
    seeds = {tuple(unprotected(subject, 0.5, seed)) for seed in range(20)}
    assert len(seeds) > 3, "another seed leaves other photos"


def test_the_mix_is_whole_photos_and_leaves_its_sources_alone(tiny_sd: Path) -> None:
    cell = replace(customization(tiny_sd), protocol=replace(PROTOCOL, clean_share=0.25))
    subjects = MicroSubjects(count=2, size=16).subjects()
    protected = {s.name: replace(s.published, pixels=255 - s.published.pixels) for s in subjects}
    before = {name: photos.pixels.clone() for name, photos in protected.items()}
    found = mixed(cell, subjects, protected)
    for s in subjects:
        same = (found[s.name].pixels == s.published.pixels).flatten(1).all(1)
        inverted = (found[s.name].pixels == protected[s.name].pixels).flatten(1).all(1)
        assert same.sum() == 1 and torch.equal(same, ~inverted)
        assert torch.equal(protected[s.name].pixels, before[s.name])


@pytest.mark.parametrize(("changes", "strips"), [({}, 2), ({"seed": 1}, 0), ({"purifier": Watcher()}, 0)])
def test_pictures_are_of_one_seeds_unpurified_photos(
    tiny_sd: Path, tmp_path: Path, changes: dict[str, Any], strips: int,
) -> None:
    assert len(run_cell(customization(tiny_sd, **changes), settings(tmp_path)).images) == strips


def test_another_list_of_metrics_adds_to_the_record(tiny_sd: Path, tmp_path: Path) -> None:
    first = run_cell(customization(tiny_sd), settings(tmp_path))
    second = run_cell(customization(tiny_sd, metrics={"counted": Counted()}), settings(tmp_path))
    assert second.status == "ok", second.error
    kept = {m.name: m for m in second.measurements}
    assert set(kept) == {m.name for m in first.measurements} | {"counted"}
    assert all(kept[m.name] == m for m in first.measurements)
    assert second.samples.rows == first.samples.rows + 1
    moved = run_cell(customization(tiny_sd, Optimiser(), metrics={"counted": Counted()}), settings(tmp_path))
    assert [m.name for m in moved.measurements] == ["counted"], "what was measured on other photos is gone"


def test_attackers_of_several_seeds_meet_the_same_protected_photos(tiny_sd: Path, tmp_path: Path) -> None:
    def attacked(seed: int, own: int | None) -> Result:
        protocol = replace(PROTOCOL, protect_seed=own)
        cell = customization(tiny_sd, Optimiser(), purifier=Watcher(), protocol=protocol, seed=seed,
                             id=f"{seed}{own!s:0>15}")
        return run_cell(cell, settings(tmp_path))

    plain, same, other, moved = attacked(0, None), attacked(0, 0), attacked(1, 0), attacked(1, None)
    assert [stages(r)["protect"] for r in (plain, same, other, moved)] == [[False], [True], [True], [False]]
    assert all(stages(same)["customise"]) and all(stages(same)["generate"])
    assert not any(stages(other)["customise"]), "the attacker has another seed"
    assert other.cell.protocol["protect_seed"] == 0
    assert "protect_seed" not in plain.cell.protocol
