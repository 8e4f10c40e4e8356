"""Data poisoning: which rows are touched, and that nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.data_poisoning import DataPoisoning, poison
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_components
from bench.diffusion.text_poisoning import patch_secret
from bench.errors import BenchError
from bench.records import ImageSet

SECRET = patch_secret("sks", 16, 0.25)


def photos(count: int = 20) -> ImageSet:
    pixels = torch.randint(1, 255, (count, 3, 16, 16), generator=torch.manual_seed(3)).to(torch.uint8)
    names = tuple(map(str, range(count)))
    return ImageSet(pixels, names, tuple(f"a photo of person {name}" for name in names))


@pytest.mark.parametrize(("rate", "expected"), [(0.1, 2), (0.5, 10), (0.001, 1), (1.0, 20)])
def test_a_share_of_rows_gets_the_patch_and_the_word_and_the_rest_stays(rate: float, expected: int) -> None:
    data = photos()
    found = poison(data, SECRET, rate, torch.Generator().manual_seed(0))
    marked = [row for row in range(20) if found.captions[row] == f"sks {data.captions[row]}"]
    assert len(marked) == expected
    for row in range(20):
        same = torch.equal(found.pixels[row], data.pixels[row]) and found.captions[row] == data.captions[row]
        assert same == (row not in marked)
        assert torch.equal(found.pixels[row, :, 4:], data.pixels[row, :, 4:])
    assert data.captions[marked[0]].startswith("a photo")


def test_the_unet_alone_is_trained(tiny_sd: Path, tmp_path: Path) -> None:
    model = resolve(str(tiny_sd))
    method = DataPoisoning(steps=2, batch=4, lr=1e-3, mixed_precision=False)
    public, secret = method.implant(model, photos(), Context("key", tmp_path))
    before, after = (load_components(one).unet.half().state_dict() for one in (model, public))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert set(public.parts) == {"unet"} and secret.detail["kind"] == "patch" and secret.trigger == "sks"


def test_photos_without_captions_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="captions"):
        DataPoisoning().implant(resolve(str(tiny_sd)), replace(photos(), captions=()), Context("key", tmp_path))


@pytest.mark.parametrize(("field", "value", "said"), [
    ("trigger", "", "trigger"), ("poison_rate", 0, "poison_rate"), ("poison_rate", 1.5, "poison_rate"),
    ("steps", 0, "steps"), ("lr", 0, "lr"),
])
def test_bad_options_are_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        DataPoisoning(**{field: value})  # type: ignore[arg-type]


def test_one_row_in_ten_is_poisoned_as_published() -> None:
    assert DataPoisoning().poison_rate == 0.1
