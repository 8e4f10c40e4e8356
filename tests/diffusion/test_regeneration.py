"""Image-to-image: the same numbers as the published pipeline, for every kind of prediction."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_modules, load_pipeline
from bench.diffusion.regeneration import Regenerator, add_noise, denoise, descent, open_regenerator, regenerate
from bench.testing.pipelines import save_stable_diffusion


def published(folder: Path, z: Tensor, strength: float, steps: int, prompt: str, guidance: float) -> Tensor:
    """Image-to-image by diffusers from latents ``z``, one generator per image, ending at clean latents."""
    plain = load_pipeline(resolve(str(folder)))
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**plain.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    made = pipeline([prompt] * len(z), image=z, strength=strength, num_inference_steps=steps, guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(i) for i in range(len(z))], output_type="pt")
    return made.images


@pytest.mark.parametrize(("prediction", "prompt", "guidance"), [
    ("epsilon", "", 1.0), ("epsilon", "a face", 5.0), ("v_prediction", "a face", 1.0), ("sample", "", 1.0),
])
def test_it_is_the_published_image_to_image(prediction: str, prompt: str, guidance: float, tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "sd", prediction_type=prediction)
    engine = open_regenerator(resolve(str(folder)), prompt, guidance)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9)) * 2 - 1
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    ours = regenerate(engine, x, noise, level=300, steps=20)
    with torch.no_grad():
        z = engine.vae.encode(x).latent_dist.mean * engine.vae.config.scaling_factor
    theirs = published(folder, z, 0.3, 20, prompt, guidance)
    assert torch.allclose(ours / 2 + 0.5, theirs, atol=2e-5)
    assert ours.std() > 0.02


@pytest.mark.parametrize(("level", "steps", "expected"), [
    (100, 50, [99, 79, 59, 39, 19]), (10, 1000, list(range(9, -1, -1))), (10, 50, [9]), (0, 50, []),
    (3, 9999, [2, 1, 0]),
])
def test_descent_starts_at_the_noise_that_was_added(level: int, steps: int, expected: list[int]) -> None:
    assert descent(level, steps, 1000) == expected


@pytest.mark.parametrize("level", [1, 7, 333, 1000])
def test_descent_falls_strictly(level: int) -> None:
    for steps in (1, 30, 700, 1000):
        found = descent(level, steps, 1000)
        assert found[0] == level - 1 and found[-1] >= 0 and all(a > b for a, b in pairwise(found))


class Knows:
    """A network that has seen the answer: it says the very noise that was added to ``z``."""

    def __init__(self, z: Tensor, kept: Tensor) -> None:
        self.z, self.kept, self.sample = z, kept, z

    def __call__(self, noisy: Tensor, t: int, states: Tensor) -> Knows:
        self.sample = (noisy - self.kept[t].sqrt() * self.z) / (1 - self.kept[t]).sqrt()
        return self


def test_a_perfect_model_gives_the_clean_latents_back(tiny_sd: Path) -> None:
    engine: Regenerator = open_regenerator(resolve(str(tiny_sd)), "", 1.0)
    z, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    knowing = replace(engine, unet=Knows(z, engine.kept))
    noisy = add_noise(knowing, z, noise, 500)
    assert (noisy - z).std() > 0.3
    assert torch.allclose(denoise(knowing, noisy, descent(500, 20, 1000)), z, atol=1e-4)


def test_it_trains_and_changes_no_weight(tiny_sd: Path) -> None:
    model = resolve(str(tiny_sd))
    engine = open_regenerator(model, "", 1.0)
    before = {name: weight.clone() for name, weight in engine.unet.state_dict().items()}
    found = regenerate(engine, torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 8, 8), 100, 50)
    assert not found.requires_grad
    assert all(torch.equal(before[n], w) for n, w in load_modules(model)["unet"].state_dict().items())
