"""Editors: each does what its formula says, to every photo alone, and refuses what means nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks.inpaint import Inpaint
from attacks.instruct_pix2pix import InstructPix2Pix
from attacks.sdedit import SDEdit
from bench.context import Context
from bench.data.micro_edits import MicroEdits
from bench.diffusion import editing
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float, to_uint8
from bench.diffusion.loading import load_modules
from bench.diffusion.losses import encode_prompts
from bench.errors import BenchError, Incompatible
from bench.plugin import facts_of
from bench.protocols import EditingProtocol
from bench.records import Edit, ImageSet, Model

Models = Callable[[str], Model]
PROTOCOL = EditingProtocol(steps=4, guidance=20.0)
CASES = pytest.mark.parametrize(("attack", "name"), [
    (SDEdit(), "sd"), (Inpaint(), "sd"), (Inpaint(strength=0.7), "inpaint"), (Inpaint(mask="unseen"), "inpaint"),
    (InstructPix2Pix(), "ip2p"),
], ids=["sdedit", "inpaint-4", "inpaint-9", "inpaint-unseen", "instruct_pix2pix"])


@dataclass(frozen=True)
class Asked:
    """Photos, what is asked of each, and seeds."""

    photos: ImageSet
    edits: tuple[Edit, ...]
    seeds: tuple[int, ...]

    def pick(self, places: Sequence[int]) -> Asked:
        names = tuple(self.photos.names[p] for p in places)
        return Asked(ImageSet(self.photos.pixels[list(places)], names), tuple(self.edits[p] for p in places),
                     tuple(self.seeds[p] for p in places))


@pytest.fixture
def asked() -> Asked:
    """Three 16-pixel photos with short words, as the tiny models read no long ones."""
    tasks = MicroEdits(count=3, size=16, photos=1).edits()
    photos = ImageSet(torch.cat([t.subject.published.pixels for t in tasks]), ("a", "b", "c"))
    words = [("make it red", "red"), ("put a hat on", "hat"), ("turn it", "blue")]
    edits = [replace(t.edit, instruction=order, target=target) for t, (order, target) in zip(tasks, words, strict=True)]
    return Asked(photos, tuple(edits), (3, 4, 5))


@pytest.fixture
def models(tiny_sd: Path, tiny_ip2p: Path, tiny_inpaint: Path) -> Models:
    folders = {"sd": tiny_sd, "ip2p": tiny_ip2p, "inpaint": tiny_inpaint}
    return lambda name: resolve(str(folders[name]))


@pytest.fixture
def draw(tmp_path: Path, models: Models) -> Callable[..., Tensor]:
    """``draw(attack, model name, asked, protocol)``: pictures."""
    def drawn(attack: Any, name: str, asked: Asked, protocol: EditingProtocol = PROTOCOL) -> Tensor:
        ctx = Context("key", tmp_path)
        found: Tensor = attack.edit(asked.photos, asked.edits, asked.seeds, models(name), protocol, ctx)
        return found

    return drawn


def distance(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).square().mean().sqrt().item()


Draw = Callable[..., Tensor]


@CASES
def test_a_picture_depends_on_its_own_photo_edit_and_seed_only(
    attack: Any, name: str, asked: Asked, draw: Draw, monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = asked.photos.pixels.clone()
    together = draw(attack, name, asked)
    assert together.dtype == torch.uint8 and together.shape == (3, 3, 16, 16)
    assert torch.equal(asked.photos.pixels, before)
    assert torch.equal(draw(attack, name, asked), together), "the same seeds repeat"
    monkeypatch.setattr(editing, "BATCH", 2)
    backwards = draw(attack, name, asked.pick([2, 1, 0])).flip(0)
    assert (backwards.int() - together.int()).abs().max() <= 1
    changed = replace(asked, seeds=(3, 4, 6))
    other = draw(attack, name, changed)
    assert (other[:2].int() - together[:2].int()).abs().max() <= 1
    assert (other[2].int() - together[2].int()).abs().max() > 1


@CASES
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_protocol_decides_on_sampler_steps_and_guidance(
    attack: Any, name: str, sampler: str, asked: Asked, draw: Draw,
) -> None:
    one = asked.pick([0])
    protocols = [replace(PROTOCOL, sampler=sampler), replace(PROTOCOL, sampler=sampler, steps=8),
                 replace(PROTOCOL, sampler=sampler, guidance=2.0)]
    pictures = [draw(attack, name, one, protocol) for protocol in protocols]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


@CASES
def test_words_that_the_editor_reads_matter_and_others_do_not(
    attack: Any, name: str, asked: Asked, draw: Draw,
) -> None:
    one = asked.pick([0])
    [edit] = one.edits
    plain = draw(attack, name, one)
    ordered, described = (draw(attack, name, replace(one, edits=(changed,)))
                          for changed in (replace(edit, instruction="a dog"), replace(edit, target="a dog")))
    follows_orders = isinstance(attack, InstructPix2Pix)
    assert torch.equal(plain, ordered) != follows_orders
    assert torch.equal(plain, described) == follows_orders


@CASES
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_latents_are_never_cut_to_the_range_of_pixels(
    attack: Any, name: str, sampler: str, asked: Asked, models: Models, tmp_path: Path,
) -> None:
    """Schedules of older checkpoints say nothing of clipping, and the samplers' own default is to clip."""
    folder = Path(shutil.copytree(models(name).base, tmp_path / "silent"))
    file = folder / "scheduler/scheduler_config.json"
    said = json.loads(file.read_text())
    assert said.pop("clip_sample") is False
    file.write_text(json.dumps(said))
    one, protocol = asked.pick([0]), replace(PROTOCOL, sampler=sampler)
    pictures = [attack.edit(one.photos, one.edits, one.seeds, model, protocol, Context("key", tmp_path))
                for model in (models(name), resolve(str(folder)))]
    assert torch.equal(*pictures)


# Each formula by hand. DDIM without noise, "leading" timesteps with an offset of 1, as the tiny models' schedules say.


def timesteps(steps: int, strength: float = 1.0) -> list[int]:
    every = [place * (1000 // steps) + 1 for place in reversed(range(steps))]
    return every[steps - int(steps * strength):]


def abar() -> Tensor:
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    return torch.cumprod(1 - betas, 0)


def ddim(z: Tensor, noise: Tensor, t: int, before: int) -> Tensor:
    kept, next_kept = abar()[t], abar()[max(before, 0)]
    clean = (z - (1 - kept).sqrt() * noise) / kept.sqrt()
    return next_kept.sqrt() * clean + (1 - next_kept).sqrt() * noise


@torch.no_grad()
def test_sdedit_by_hand(asked: Asked, models: Models, draw: Draw) -> None:
    one, steps, strength = asked.pick([1]), 4, 0.75
    m = load_modules(models("sd"))
    states = encode_prompts(m["tokenizer"], m["text_encoder"], ["", "hat"])
    generator = torch.Generator().manual_seed(4)
    z = m["vae"].encode(to_float(one.photos.pixels)).latent_dist.sample(generator) * m["vae"].config.scaling_factor
    noise = torch.randn(z.shape, generator=generator)
    first, *_ = walk = timesteps(steps, strength)
    assert walk == [501, 251, 1]
    z = abar()[first].sqrt() * z + (1 - abar()[first]).sqrt() * noise
    for t in walk:
        plain, asked_for = m["unet"](z.repeat(2, 1, 1, 1), t, states).sample.chunk(2)
        z = ddim(z, plain + 20.0 * (asked_for - plain), t, t - 250)
    expected = to_uint8(m["vae"].decode(z / m["vae"].config.scaling_factor).sample)
    assert (draw(SDEdit(strength), "sd", one).int() - expected.int()).abs().max() <= 1


@torch.no_grad()
def test_instruct_pix2pix_by_hand(asked: Asked, models: Models, draw: Draw) -> None:
    one = asked.pick([1])
    m = load_modules(models("ip2p"))
    none, order = encode_prompts(m["tokenizer"], m["text_encoder"], ["", "put a hat on"]).split(1)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    seen = m["vae"].encode(to_float(one.photos.pixels)).latent_dist.mean

    def e(photo: Tensor, text: Tensor) -> Tensor:
        said: Tensor = m["unet"](torch.cat([z, photo], 1), t, text).sample
        return said

    for t in timesteps(4):
        blind, kept, told = e(0 * seen, none), e(seen, none), e(seen, order)
        z = ddim(z, blind + 1.7 * (kept - blind) + 3.0 * (told - kept), t, t - 250)
    expected = to_uint8(m["vae"].decode(z / m["vae"].config.scaling_factor).sample)
    found = draw(InstructPix2Pix(1.7), "ip2p", one, replace(PROTOCOL, guidance=3.0))
    assert (found.int() - expected.int()).abs().max() <= 1


@torch.no_grad()
def test_blending_by_hand(asked: Asked, models: Models, draw: Draw) -> None:
    """A model of four channels: after each step what lies outside is the photo's, at the next step's noise."""
    [edit] = asked.edits[1:2]
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:9, 3:12] = True
    one = replace(asked.pick([1]), edits=(replace(edit, mask=mask),))
    m = load_modules(models("sd"))
    states = encode_prompts(m["tokenizer"], m["text_encoder"], ["", "hat"])
    generator = torch.Generator().manual_seed(4)
    photo = m["vae"].encode(to_float(one.photos.pixels)).latent_dist.sample(generator) * m["vae"].config.scaling_factor
    noise = torch.randn(photo.shape, generator=generator)
    inside = torch.zeros(1, 1, 8, 8)
    inside[:, :, 2:5, 1:6] = 1
    z, walk = noise, timesteps(4)
    for t, following in zip(walk, [*walk[1:], None], strict=True):
        plain, asked_for = m["unet"](z.repeat(2, 1, 1, 1), t, states).sample.chunk(2)
        z = ddim(z, plain + 20.0 * (asked_for - plain), t, t - 250)
        known = photo if following is None else (
            abar()[following].sqrt() * photo + (1 - abar()[following]).sqrt() * noise)
        z = inside * z + (1 - inside) * known
    decoded = to_uint8(m["vae"].decode(z / m["vae"].config.scaling_factor).sample)
    expected = torch.where(mask, decoded, one.photos.pixels)
    assert (draw(Inpaint(), "sd", one).int() - expected.int()).abs().max() <= 1


# Inpainting: what is painted, and what is not


@pytest.mark.parametrize("name", ["sd", "inpaint"])
def test_outside_the_region_every_pixel_stays(name: str, asked: Asked, draw: Draw) -> None:
    painted = draw(Inpaint(), name, asked)
    unseen = draw(Inpaint(mask="unseen"), name, asked)
    for photo, edit, seen, other in zip(asked.photos.pixels, asked.edits, painted, unseen, strict=True):
        assert torch.equal(seen[:, ~edit.mask], photo[:, ~edit.mask])
        assert distance(seen[:, edit.mask], photo[:, edit.mask]) > 1
        wider = Inpaint(mask="unseen").region(edit)
        assert torch.equal(other[:, ~wider], photo[:, ~wider])
        assert distance(other[:, wider & ~edit.mask], photo[:, wider & ~edit.mask]) > 1


def test_the_unseen_region_is_another_that_holds_the_seen_one(asked: Asked) -> None:
    for edit in (*asked.edits, *(task.edit for task in MicroEdits(count=6, photos=1).edits())):
        seen, unseen = (Inpaint(mask=mask).region(edit) for mask in ("seen", "unseen"))
        assert torch.equal(seen, edit.mask) and bool(unseen[seen].all())
        assert unseen.sum() > seen.sum()


def test_an_inpainting_model_sees_nothing_of_what_is_painted_over(asked: Asked, draw: Draw) -> None:
    one = asked.pick([0])
    [mask] = [edit.mask for edit in one.edits]
    plain = draw(Inpaint(), "inpaint", one)
    for region, matters in ((mask, False), (~mask, True)):
        changed = one.photos.pixels.clone()
        changed[:, :, region] = 255 - changed[:, :, region]
        found = draw(Inpaint(), "inpaint", replace(one, photos=replace(one.photos, pixels=changed)))
        assert torch.equal(found[:, :, mask], plain[:, :, mask]) != matters


# On the embedded models, a few steps


@pytest.fixture(scope="module")
def real() -> Asked:
    tasks = MicroEdits(count=2, photos=1).edits()
    photos = ImageSet(torch.cat([t.subject.published.pixels for t in tasks]), ("a", "b"))
    return Asked(photos, tuple(t.edit for t in tasks), (3, 4))


def test_a_small_strength_stays_close_to_the_photo(real: Asked, tmp_path: Path) -> None:
    model, protocol = resolve("micro-sd-a"), EditingProtocol(steps=10, guidance=3.0)
    near, far = (
        distance(SDEdit(strength).edit(real.photos, real.edits, real.seeds, model, protocol, Context("", tmp_path)),
                 real.photos.pixels) for strength in (0.1, 0.8)
    )
    assert near < 15 < 25 < far, (near, far)


def test_image_guidance_keeps_more_of_the_photo(real: Asked, tmp_path: Path) -> None:
    model, protocol = resolve("micro-ip2p"), EditingProtocol(steps=8, guidance=3.0)
    loose, tight = (
        distance(InstructPix2Pix(scale).edit(real.photos, real.edits, real.seeds, model, protocol,
                                             Context("", tmp_path)), real.photos.pixels) for scale in (1.0, 2.5)
    )
    assert tight < loose, (tight, loose)


# What is refused


def test_an_edit_without_a_mask_cannot_be_painted(asked: Asked, draw: Draw) -> None:
    for mask in (None, torch.zeros(16, 16, dtype=torch.bool)):
        edits = (*asked.edits[:2], replace(asked.edits[2], mask=mask))
        with pytest.raises(Incompatible, match="inpaint needs a mask for every edit; 'turn it' has none"):
            draw(Inpaint(), "sd", replace(asked, edits=edits))


@pytest.mark.parametrize(("attack", "name"), [(SDEdit(strength=0.2), "sd"), (Inpaint(strength=0.2), "inpaint")])
def test_a_strength_that_leaves_no_step_is_refused(attack: Any, name: str, asked: Asked, draw: Draw) -> None:
    with pytest.raises(BenchError, match=r"strength=0.2 of editing.steps=4 is less than one step; give .* 0.25"):
        draw(attack, name, asked)


def test_image_guidance_that_would_be_ignored_is_refused(asked: Asked, draw: Draw) -> None:
    with pytest.raises(BenchError, match=r"image_guidance=1.5 does nothing at editing.guidance=1"):
        draw(InstructPix2Pix(), "ip2p", asked, replace(PROTOCOL, guidance=1.0))
    assert draw(InstructPix2Pix(1.0), "ip2p", asked, replace(PROTOCOL, guidance=1.0)).shape == (3, 3, 16, 16)


@CASES
def test_photos_that_a_latent_model_cannot_take_are_refused(attack: Any, name: str, asked: Asked, draw: Draw) -> None:
    cut = replace(asked.photos, pixels=asked.photos.pixels[..., :15])
    with pytest.raises(BenchError, match="photos are 15x16 pixels"):
        draw(attack, name, replace(asked, photos=cut))


def test_one_edit_and_one_seed_per_photo(asked: Asked, draw: Draw) -> None:
    with pytest.raises(BenchError, match="3 photos, 3 edits and 2 seeds"):
        draw(SDEdit(), "sd", replace(asked, seeds=(1, 2)))


@pytest.mark.parametrize(("attack", "field", "value"), [
    (SDEdit, "strength", 0.0), (SDEdit, "strength", 1.1), (Inpaint, "strength", 0.0), (Inpaint, "strength", 2.0),
    (InstructPix2Pix, "image_guidance", 0.9), (InstructPix2Pix, "image_guidance", 101.0),
])
def test_bad_options_are_refused(attack: Any, field: str, value: float) -> None:
    with pytest.raises(BenchError, match=rf"attack\.{field}={value} is out of range; give"):
        attack(**{field: value})


def test_an_unknown_mask_names_the_valid_ones() -> None:
    with pytest.raises(BenchError, match=r"attack.mask: unknown mask 'unsen'\. Did you mean unseen.*seen, unseen"):
        Inpaint(mask="unsen")


@CASES
def test_the_model_offers_what_the_editor_needs(attack: Any, name: str, models: Models) -> None:
    facts = facts_of(attack)
    assert facts.kind == "attack" and facts.track == ("editing",) and facts.paper and facts.official_code
    assert set(facts.needs) <= models(name).capabilities
    others = {"sd", "ip2p", "inpaint"} - {name} - ({"sd", "inpaint"} if isinstance(attack, Inpaint) else set())
    assert not any(set(facts.needs) <= models(other).capabilities for other in others)
