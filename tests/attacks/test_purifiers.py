"""Purifiers: each does what its options say, to every photo alone, and refuses options that mean nothing."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from attacks.bit_depth import BitDepth
from attacks.blur import Blur
from attacks.diffpure import DiffPure
from attacks.gaussian_noise import GaussianNoise
from attacks.gridpure import GridPure, in_windows, starts
from attacks.jpeg import Jpeg
from attacks.resize import Resize
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_modules
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model

NOWHERE = Model(Path("nowhere"), "", frozenset())
PLAIN = (Jpeg(), Resize(), Blur(), GaussianNoise(), BitDepth())
LATENT = (DiffPure(strength=0.3, steps=10), GridPure(window=16, stride=12, strength=0.2, steps=10, iterations=2))
ALL = pytest.mark.parametrize("purifier", [*PLAIN, *LATENT], ids=lambda p: facts_of(p).name)


def photos(size: int = 32, count: int = 3, seed: int = 0) -> ImageSet:
    """Noise over a smooth ramp, so that there is something to keep and something to lose."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(40, 200, size).expand(count, 3, size, size)
    pixels = (ramp + 12 * torch.randn(ramp.shape, generator=generator)).round().clamp(0, 255).to(torch.uint8)
    names = tuple("abcdefgh"[:count])
    return ImageSet(pixels, names, tuple(f"photo {name}" for name in names))


def picked(given: ImageSet, places: list[int]) -> ImageSet:
    names, captions = (tuple(words[p] for p in places) for words in (given.names, given.captions))
    return ImageSet(given.pixels[places], names, captions)


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def distance(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).square().mean().sqrt().item()


def roughness(pixels: Tensor) -> float:
    """Energy of the highest frequencies: second differences along rows and columns."""
    x = pixels.double()
    corner = x[..., 1:, 1:] - x[..., 1:, :-1] - x[..., :-1, 1:] + x[..., :-1, :-1]
    return corner.square().mean().item()


@ALL
@pytest.mark.parametrize("size", [16, 64])
def test_size_names_and_captions_stay_and_pixels_change(purifier: Any, size: int, model: Model, ctx: Context) -> None:
    given = photos(size)
    before = given.pixels.clone()
    found = purifier.purify(given, model, ctx)
    assert (found.names, found.captions) == (given.names, given.captions)
    assert found.pixels.shape == given.pixels.shape and found.pixels.dtype == torch.uint8
    assert distance(found.pixels, given.pixels) > 1
    assert torch.equal(given.pixels, before)


@ALL
def test_a_photo_does_not_depend_on_its_company(purifier: Any, model: Model, ctx: Context) -> None:
    given = photos(24)
    whole = purifier.purify(given, model, ctx).pixels
    backward = purifier.purify(picked(given, [2, 1, 0]), model, ctx).pixels.flip(0)
    alone = purifier.purify(picked(given, [1]), model, ctx).pixels[0]
    # Networks round differently in another batch, which may tip one level.
    room = 1 if purifier in LATENT else 0
    assert (whole.int() - backward.int()).abs().max() <= room
    assert (whole[1].int() - alone.int()).abs().max() <= room


@ALL
def test_the_same_key_repeats(purifier: Any, model: Model, ctx: Context) -> None:
    first, second = (purifier.purify(photos(16), model, ctx).pixels for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("purifier", [p for p in (*PLAIN, *LATENT) if facts_of(p).name in
                                      ("gaussian_noise", "diffpure", "gridpure")], ids=lambda p: facts_of(p).name)
def test_noise_follows_key_and_name(purifier: Any, model: Model, ctx: Context) -> None:
    twins = photos(16, count=2)
    twins = replace(twins, pixels=twins.pixels[:1].repeat(2, 1, 1, 1))
    found = purifier.purify(twins, model, ctx).pixels
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found, purifier.purify(twins, model, replace(ctx, key="other")).pixels)


def test_jpeg_equals_the_file_that_pillow_writes(ctx: Context) -> None:
    given = photos()
    found = Jpeg(60).purify(given, NOWHERE, ctx).pixels
    for before, after in zip(given.pixels, found):
        file = BytesIO()
        Image.fromarray(before.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=60)
        assert np.array_equal(np.asarray(Image.open(file)), after.permute(1, 2, 0).numpy())


def test_jpeg_removes_high_frequencies_and_keeps_the_picture(ctx: Context) -> None:
    clean = torch.linspace(40, 200, 64).expand(1, 3, 64, 64).round().to(torch.uint8)
    coin = torch.randint(2, clean.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = ImageSet((clean + 8 * coin).to(torch.uint8), ("a",))
    strong, weak = (Jpeg(quality).purify(noisy, NOWHERE, ctx).pixels for quality in (20, 90))
    assert roughness(strong) < 0.1 * roughness(noisy.pixels)
    assert roughness(strong) < roughness(weak) < roughness(noisy.pixels)
    assert distance(strong, clean) < 0.5 * distance(noisy.pixels, clean)


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.7])
def test_resize_agrees_with_pillow(factor: float, ctx: Context) -> None:
    given = photos()
    found = Resize(factor).purify(given, NOWHERE, ctx).pixels
    small = round(32 * factor)
    for before, after in zip(given.pixels, found):
        picture = Image.fromarray(before.permute(1, 2, 0).numpy())
        there = picture.resize((small, small), Image.Resampling.BICUBIC)
        back = np.asarray(there.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(back - after.permute(1, 2, 0).numpy().astype(int)).max() <= 2


def test_resize_by_one_changes_nothing_and_tiny_factors_leave_a_pixel(ctx: Context) -> None:
    given = photos()
    assert torch.equal(Resize(1.0).purify(given, NOWHERE, ctx).pixels, given.pixels)
    assert Resize(1e-6).purify(given, NOWHERE, ctx).pixels.float().flatten(2).std(2).max() == 0


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 12.0])
def test_blur_is_a_gaussian_of_that_sigma(sigma: float, ctx: Context) -> None:
    given = photos()
    found = Blur(sigma).purify(given, NOWHERE, ctx).pixels.double().numpy()
    exact = gaussian_filter(given.pixels.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    assert np.abs(found - exact).max() <= 0.51


def test_a_point_spreads_by_sigma_pixels(ctx: Context) -> None:
    point = torch.zeros(1, 3, 65, 65, dtype=torch.uint8)
    point[..., 31:34, 31:34] = 255
    found = Blur(3.0).purify(ImageSet(point, ("a",)), NOWHERE, ctx).pixels[0, 0].double()
    places = torch.arange(65).double() - 32
    variance = (found.sum(0) * places.square()).sum() / found.sum()
    assert variance.sqrt().item() == pytest.approx((3.0**2 + 2 / 3) ** 0.5, rel=0.05)


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_noise_has_its_standard_deviation_and_no_mean(sigma: float, ctx: Context) -> None:
    grey = ImageSet(torch.full((2, 3, 64, 64), 128, dtype=torch.uint8), ("a", "b"))
    change = GaussianNoise(sigma).purify(grey, NOWHERE, ctx).pixels.float() - 128
    assert change.std().item() == pytest.approx(255 * sigma, rel=0.03)
    assert abs(change.mean().item()) < 255 * sigma * 0.05
    assert abs(torch.corrcoef(change.flatten(1))[0, 1].item()) < 0.05


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_depth_leaves_exactly_its_levels(bits: int, ctx: Context) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    found = BitDepth(bits).purify(ImageSet(every, ("a",)), NOWHERE, ctx).pixels
    levels = found.unique()
    assert len(levels) == 2**bits and levels[0] == 0 and levels[-1] == 255
    assert (found.int() - every.int()).abs().max() <= 0.5 * 255 / (2**bits - 1) + 0.5


def round_trip(model: Model, given: ImageSet) -> Tensor:
    vae = load_modules(model)["vae"]
    with torch.no_grad():
        x = vae.decode(vae.encode(given.pixels / 127.5 - 1).latent_dist.mean).sample
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def test_diffpure_without_noise_is_the_autoencoder(model: Model, ctx: Context) -> None:
    found = DiffPure(strength=0.0).purify(photos(), model, ctx).pixels
    assert (found.int() - round_trip(model, photos()).int()).abs().max() <= 1


def test_diffpure_moves_further_the_stronger_it_is(model: Model, ctx: Context) -> None:
    still = DiffPure(strength=0.0).purify(photos(16), model, ctx).pixels
    moved = [distance(DiffPure(s, steps=10).purify(photos(16), model, ctx).pixels, still) for s in (0.01, 0.2, 0.8)]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_diffpure_follows_prompt_and_guidance(model: Model, ctx: Context) -> None:
    one, other, guided, plain = (
        DiffPure(0.9, 4, prompt, guidance).purify(photos(16), model, ctx).pixels
        for prompt, guidance in (("a", 1.0), ("zzz", 1.0), ("a", 9.0), ("", 1.0))
    )
    assert not torch.equal(one, other) and not torch.equal(one, guided) and not torch.equal(one, plain)


def test_windows_average_where_they_overlap() -> None:
    """Every window is painted with its own place; 6 pixels, windows of 4, stride 2, then the collage of corners."""
    def paint(cut: Tensor) -> Tensor:
        return torch.arange(1.0, cut.shape[1] + 1).view(1, -1, 1, 1, 1).expand_as(cut)

    found = in_windows(torch.zeros(2, 3, 6, 6), 4, 2, paint)[0, 0]
    assert found[0, 0] == pytest.approx((1 + 5) / 2)      # the first window and the collage
    assert found[0, 2] == pytest.approx((1 + 2) / 2)      # both windows of the top row, no corner
    assert found[3, 3] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert found[5, 5] == pytest.approx((4 + 5) / 2)


def test_windows_that_change_nothing_give_the_photo_back() -> None:
    x = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    for side, stride in ((8, 3), (20, 8), (12, 12)):
        assert torch.allclose(in_windows(x, side, stride, lambda cut: cut), x, atol=1e-6)


def test_the_collage_shows_the_four_corners() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(1, 3, 1, 1)
    seen = []
    in_windows(x, 4, 4, lambda cut: seen.append(cut[0, -1, 0]) or cut)
    assert seen[0].tolist() == [[0, 1, 6, 7], [8, 9, 14, 15], [48, 49, 54, 55], [56, 57, 62, 63]]


@pytest.mark.parametrize(("length", "side", "stride", "expected"), [
    (64, 32, 16, [0, 16, 32]), (16, 16, 8, [0]), (50, 32, 16, [0, 16, 18]), (64, 32, 32, [0, 32]),
])
def test_windows_reach_the_border(length: int, side: int, stride: int, expected: list[int]) -> None:
    assert starts(length, side, stride) == expected


def test_gridpure_that_keeps_everything_changes_nothing(model: Model, ctx: Context) -> None:
    found = GridPure(window=16, stride=8, steps=10, iterations=2, gamma=1.0).purify(photos(), model, ctx)
    assert torch.equal(found.pixels, photos().pixels)


def test_gridpure_over_one_window_without_noise_is_the_autoencoder(model: Model, ctx: Context) -> None:
    """A window as large as the photo, whose collage is the photo: one iteration is the plain round trip."""
    once = GridPure(window=256, strength=0.0, iterations=1, gamma=0.0).purify(photos(), model, ctx).pixels
    assert (once.int() - round_trip(model, photos()).int()).abs().max() <= 1
    half = GridPure(window=256, strength=0.0, iterations=1, gamma=0.5).purify(photos(), model, ctx).pixels
    between = (photos().pixels.float() + round_trip(model, photos()).float()) / 2
    assert (half.float() - between).abs().max() <= 1.01


def test_gridpure_goes_on_from_what_it_had(model: Model, ctx: Context) -> None:
    runs = [GridPure(window=16, stride=8, steps=10, iterations=n).purify(photos(), model, ctx).pixels for n in (1, 3)]
    assert not torch.equal(*runs)


@pytest.mark.parametrize("purifier", LATENT, ids=lambda p: facts_of(p).name)
def test_photos_that_a_latent_model_cannot_take_are_refused(purifier: Any, model: Model, ctx: Context) -> None:
    with pytest.raises(BenchError, match="photos are 15x15 pixels"):
        purifier.purify(photos(15), model, ctx)


@ALL
def test_facts(purifier: Any) -> None:
    facts = facts_of(purifier)
    assert facts.kind == "purifier" and facts.track == ("customization", "editing")
    assert facts.needs == (("text_to_image", "text_encoder") if purifier in LATENT else ())


@pytest.mark.parametrize(("purifier", "field", "value"), [
    (Jpeg, "quality", 0), (Jpeg, "quality", 96), (Resize, "factor", 0.0), (Resize, "factor", 1.5), (Blur, "sigma", 0.0),
    (Blur, "sigma", -1.0), (Blur, "sigma", float("nan")), (GaussianNoise, "sigma", 0.0),
    (GaussianNoise, "sigma", 12.75), (BitDepth, "bits", 0), (BitDepth, "bits", 9), (DiffPure, "strength", 1.1),
    (DiffPure, "strength", -0.1), (DiffPure, "steps", 0), (DiffPure, "guidance", 0.5), (GridPure, "window", 0),
    (GridPure, "window", 30), (GridPure, "stride", 0), (GridPure, "stride", 257), (GridPure, "strength", 2.0),
    (GridPure, "steps", 0), (GridPure, "iterations", 0), (GridPure, "gamma", 1.1),
])
def test_bad_options_are_refused(purifier: Any, field: str, value: float) -> None:
    with pytest.raises(BenchError, match=rf"purifier\.{field}={value}.*give"):
        purifier(**{field: value})


@pytest.mark.parametrize("name", [
    "jpeg", "resize", "blur", "gaussian_noise", "bit_depth", "diffpure", "gridpure", "diffpure_micro", "gridpure_micro",
])
def test_the_config_finds_it(name: str, compose: Any) -> None:
    from omegaconf import OmegaConf

    made = OmegaConf.to_object(compose([f"purifier={name}"]).purifier)
    assert facts_of(made).name == name.removesuffix("_micro")
