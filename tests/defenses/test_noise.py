"""The controls: photos as they are, and sign noise at exactly the budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.context import Context
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model, Subject
from defenses.noise import SignNoise
from defenses.none import NoDefense

NOWHERE = Model(Path("nowhere"), "", frozenset())


def subject(name: str, size: int = 32, level: int | None = None) -> Subject:
    generator = torch.Generator().manual_seed(len(name))
    pixels = torch.randint(0, 256, (4, 3, size, size), generator=generator, dtype=torch.int32).to(torch.uint8)
    if level is not None:
        pixels = torch.full_like(pixels, level)
    photos = ImageSet(pixels, ("a", "b", "c", "d"), ("one", "two", "three", "four"))
    return Subject(name, photos, photos, photos)


def test_no_defense_changes_nothing(tmp_path: Path) -> None:
    ada = subject("ada")
    assert NoDefense().protect([ada], NOWHERE, Context("key", tmp_path))[0] is ada.published
    assert NoDefense().repair(NOWHERE, ada.clean, None, Context("key", tmp_path)) is NOWHERE
    assert NoDefense().budget().eps == 0
    assert facts_of(NoDefense).control


@pytest.mark.parametrize("eps", [0, 1, 6.375, 16, 255])
@pytest.mark.parametrize("size", [32, 64, 65])
def test_the_saved_files_are_within_the_budget(eps: float, size: int, tmp_path: Path) -> None:
    ada = subject("ada", size)
    noisy = SignNoise(eps).protect([ada], NOWHERE, Context("key", tmp_path))[0]
    for before, after in zip(ada.published.pixels, noisy.pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps
    assert noisy.names == ada.published.names
    assert noisy.captions == ada.published.captions


def test_away_from_the_ends_every_value_moves_by_the_whole_budget(tmp_path: Path) -> None:
    grey = subject("grey", 64, level=128)
    change = SignNoise(6.375).protect([grey], NOWHERE, Context("key", tmp_path))[0].pixels.int() - 128
    assert set(change.unique().tolist()) == {-6, 6}
    assert abs(change.float().mean().item()) < 0.2


def test_each_subject_has_noise_of_its_own_in_any_order(tmp_path: Path) -> None:
    people, ctx = [subject("ada"), subject("bob"), subject("cyd")], Context("key", tmp_path)
    forward = SignNoise().protect(people, NOWHERE, ctx)
    backward = SignNoise().protect(people[::-1], NOWHERE, ctx)
    alone = SignNoise().protect(people[1:2], NOWHERE, ctx)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(forward, backward[::-1]))
    assert torch.equal(forward[1].pixels, alone[0].pixels)
    assert not torch.equal(forward[0].pixels, forward[1].pixels)


def test_a_budget_out_of_range_is_refused() -> None:
    with pytest.raises(BenchError, match="eps=300 is out of range"):
        SignNoise(300)
