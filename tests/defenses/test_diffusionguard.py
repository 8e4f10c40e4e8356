"""DiffusionGuard: the first prediction grows, only kept pixels move, and masks shrink."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.editors import ask, open_editor
from bench.diffusion.images import to_float
from bench.diffusion.surrogate_free import crowd_of
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.diffusionguard import DiffusionGuard, depth, first_timestep, norms, shrunk
from defenses.noise import SignNoise
from tests.defenses.drawn import subject
from tests.defenses.edits import told

SHORT = DiffusionGuard(eps=32, alpha_255=4, steps=16)


@pytest.fixture(params=["text", "instruct", "inpaint"])
def model(request: Any, tiny_sd: Path, tiny_ip2p: Path, tiny_inpaint: Path) -> Model:
    return resolve(str({"text": tiny_sd, "instruct": tiny_ip2p, "inpaint": tiny_inpaint}[request.param]))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def norm(model: Model, photos: ImageSet, ctx: Context) -> Tensor:
    """|| eps_theta(z_T, T; x) ||_2 of each whole photo over held-out noise."""
    editor, crowd = open_editor(model, ctx), crowd_of([subject("ada")], Context("held out", ctx.folder))
    request, x, total = ask(editor, crowd, ""), to_float(photos.pixels), torch.zeros(len(photos))
    with torch.no_grad():
        for _ in range(8):
            draws = replace(crowd.draw(editor.vae, editor.scheduler), timesteps=torch.full((3,), 751))
            total += norms(editor, request, draws, torch.ones(3, 1, 16, 16))(x, slice(0, 3))
    return total


def test_the_prediction_grows_more_than_under_noise(model: Model, ctx: Context) -> None:
    found, noisy, clean = (norm(model, photos, ctx).sum() for photos in (
        SHORT.protect([subject("ada")], model, ctx)[0], SignNoise(32).protect([subject("ada")], model, ctx)[0],
        subject("ada").published))
    assert found > noisy and found > clean


def test_the_loss_by_hand(model: Model, ctx: Context) -> None:
    """The network's own norm at pure noise where it is shown the photo, at the noised photo where not."""
    editor, crowd = open_editor(model, ctx), crowd_of([told(subject("ada"), masked=True)], ctx)
    request = ask(editor, crowd, "")
    draws = replace(crowd.draw(editor.vae, editor.scheduler), timesteps=torch.full((3,), 751))
    seen = 1 - request.painted
    scale = editor.vae.config.scaling_factor
    with torch.no_grad():
        found = norms(editor, request, draws, seen)(crowd.x, slice(0, 3))
        posterior = editor.vae.encode(crowd.x * seen).latent_dist
        if editor.kind == "text":
            z = (posterior.mean + posterior.std * draws.posterior) * scale
            shown = editor.scheduler.add_noise(z, draws.noise, draws.timesteps)
        elif editor.kind == "instruct":
            shown = torch.cat([draws.noise, posterior.mean], 1)
        else:
            shown = torch.cat([draws.noise, request.painted[:, :, ::2, ::2], posterior.mean * scale], 1)
        output = editor.unet(shown, 751, editor.states([""]).expand(3, -1, -1)).sample
    assert torch.allclose(found, output.flatten(1).norm(dim=1), rtol=1e-4)


def test_only_what_an_attacker_keeps_is_perturbed_if_the_mask_is_told(model: Model, ctx: Context) -> None:
    masked, plain = told(subject("ada"), masked=True), subject("ada")

    def change(method: DiffusionGuard, person: Any) -> Tensor:
        found = method.protect([person], model, ctx)[0].pixels.int()
        return (found - plain.published.pixels.int()).abs()

    hidden = change(SHORT, masked)
    assert hidden[:, :, :8, :8].max() == 0 and hidden[:, :, 8:].max() > 0
    assert change(SHORT, plain)[:, :, :8, :8].max() > 0
    assert torch.equal(change(replace(SHORT, masks=False), masked), change(SHORT, plain))


def test_shrinking_matters(tiny_inpaint: Path, ctx: Context) -> None:
    model, person = resolve(str(tiny_inpaint)), told(subject("ada"), masked=True)
    one, other = (replace(SHORT, shrink=share).protect([person], model, ctx)[0].pixels for share in (0.0, 0.5))
    assert not torch.equal(one, other)


def test_masks_shrink_from_what_is_painted_and_never_grow() -> None:
    kept = torch.ones(2, 1, 64, 64)
    kept[:, :, 20:40, 20:40] = 0
    dice = torch.ones(2, 1, 5, 4) * 0.999
    dice[1, :, 0] = 0
    found = shrunk(kept, dice, 0.25)
    assert ((found == 0) | (found == 1)).all() and (found <= kept).all()
    assert torch.equal(found[1], kept[1])
    wanted = 0.25 * (kept[0].sum() / torch.pi).sqrt() * 0.999 ** 2
    ring = int(wanted.ceil()) - 1
    assert found[0, 0, 20 - ring:40 + ring, 20 - ring:40 + ring].sum() == 0
    assert found[0, 0, 0].all() and found[0, 0, 19 - ring - 1, 30] == 1
    whole = torch.ones(1, 1, 64, 64)
    assert torch.equal(shrunk(whole, dice[:1], 0.25), whole)


def test_depth_counts_pixels_to_the_painted_region() -> None:
    kept = torch.ones(1, 1, 8, 8)
    kept[:, :, :, :3] = 0
    assert depth(kept, 3)[0, 0, 4].tolist() == [0, 0, 0, 0, 1, 2, 3, 3]


def test_the_boundary_varies_along_the_mask() -> None:
    kept = torch.ones(1, 1, 64, 64)
    kept[:, :, 24:40, 24:40] = 0
    found = shrunk(kept, torch.rand(1, 1, 5, 4, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.5, 0.4)
    reach = [int((found[0, 0, row, 40:] == 0).sum()) for row in range(24, 40)]
    assert len(set(reach)) > 1


def test_the_first_step_of_a_sampler_of_four_is_751(model: Model, ctx: Context) -> None:
    editor = open_editor(model, ctx)
    editor.scheduler.set_timesteps(4)
    assert first_timestep(DiffusionGuard(), editor) == 751
    assert first_timestep(DiffusionGuard(sampler_steps=50), editor) == 981
    assert first_timestep(DiffusionGuard(sampler_steps=1000), editor) == 999


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("alpha_255", 0), ("steps", -1), ("sampler_steps", 0), ("shrink", -0.1), ("shrink", 1.1),
    ("pgd_batch", 0),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        DiffusionGuard(**{field: value})


def test_released_defaults() -> None:
    """16/255 and 1/255 on images in [-1, 1] are 8 and half a level."""
    method = DiffusionGuard()
    assert (method.eps, method.alpha_255, method.steps, method.sampler_steps) == (8, 0.5, 800, 4)
