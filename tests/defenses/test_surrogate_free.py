"""What every protection without a surrogate keeps: the budget on the file, and results that company cannot change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.surrogate_free import gather
from bench.errors import BenchError
from bench.records import Model
from defenses.advdm import AdvDm
from defenses.encoder_ensemble import EncoderEnsemble
from defenses.mist import Mist
from defenses.photoguard import PhotoGuard
from defenses.sds import Sds
from tests.defenses.drawn import subject

METHODS = [AdvDm(steps=2), PhotoGuard(steps=2), Mist(steps=2), Sds(steps=2, random_start=True),
           EncoderEnsemble(steps=2)]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


@pytest.mark.parametrize(("eps", "size"), [(0, 16), (1, 32), (6.375, 16), (16, 32), (255, 16)])
@each_method
def test_the_saved_files_are_within_the_budget(
    method: Any, eps: float, size: int, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", size)
    found = replace(method, eps=eps, alpha_255=max(eps, 1)).protect([ada], model, ctx)[0]
    assert found.names == ada.published.names
    assert eps < 1 or not torch.equal(found.pixels, ada.published.pixels)
    for before, after in zip(ada.published.pixels, found.pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps


@each_method
def test_neither_order_company_nor_batch_matters(method: Any, model: Model, ctx: Context) -> None:
    """Beyond rounding, which may turn the sign of a gradient that is almost zero."""
    wide = replace(method, eps=16, pgd_batch=8)
    people = [subject("ada"), subject("bobby", photos=2), subject("cleo", 32)]
    together = [photos.pixels for photos in wide.protect(people, model, ctx)]
    swapped = [photos.pixels for photos in wide.protect(people[::-1], model, ctx)][::-1]
    alone = [replace(wide, pgd_batch=1).protect([person], model, ctx)[0].pixels for person in people]
    for found, other, single in zip(together, swapped, alone):
        assert (found != other).float().mean() < 0.01
        assert (found != single).float().mean() < 0.01


@each_method
def test_the_same_key_gives_the_same_bits(method: Any, model: Model, ctx: Context) -> None:
    first, again = (method.protect([subject("ada")], model, ctx)[0].pixels for _ in range(2))
    assert torch.equal(first, again)


@each_method
def test_another_key_or_name_draws_other_numbers(method: Any, model: Model, ctx: Context, tmp_path: Path) -> None:
    ada = subject("ada")
    first = method.protect([ada], model, ctx)[0].pixels
    for people, place in (([ada], Context("other", tmp_path)), ([replace(ada, name="eve")], ctx)):
        assert not torch.equal(first, method.protect(people, model, place)[0].pixels)


def test_neighbours_of_one_size_share_a_batch() -> None:
    people = [subject("a"), subject("b"), subject("c"), subject("d", 32), subject("e", 32)]
    assert [[s.name for s in group] for group in gather(people, 6)] == [["a", "b"], ["c"], ["d", "e"]]
    assert [len(group) for group in gather(people, 1)] == [1] * 5
    assert list(gather([], 4)) == []


def test_photos_that_the_model_cannot_encode_are_refused(model: Model, ctx: Context) -> None:
    with pytest.raises(BenchError, match="advdm, ada"):
        AdvDm().protect([subject("ada", 12)], model, ctx)
