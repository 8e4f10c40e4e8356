"""Sampling: seeds, batches, samplers, the image prompt, and ancestral sampling against a hand-written chain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.context import Context
from bench.diffusion import sampling
from bench.diffusion.checkpoints import adapter_path, resolve
from bench.diffusion.images import to_uint8
from bench.diffusion.loading import load_pipeline, load_unconditional
from bench.diffusion.sampling import (
    ANCESTRAL,
    draw_unconditional,
    generate,
    image_prompt,
    initial_noise,
    sample_unconditional,
)
from bench.errors import BenchError
from bench.protocols import BackdoorProtocol
from bench.records import Adapter, ImageSet

PROMPTS = ["a photo of a person", "blue", "a dog"]


def test_an_image_depends_on_its_own_prompt_and_seed_only(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = load_pipeline(resolve(str(tiny_sd)))
    together = generate(pipeline, PROMPTS, [3, 4, 5], steps=3)
    assert together.dtype == torch.uint8
    assert together.shape == (3, 3, 16, 16)
    monkeypatch.setattr(sampling, "BATCH", 2)
    backwards = generate(pipeline, PROMPTS[::-1], [5, 4, 3], steps=3)
    assert (backwards.flip(0).int() - together.int()).abs().max() <= 1
    assert torch.equal(generate(pipeline, PROMPTS[::-1], [5, 4, 3], steps=3), backwards)
    assert not torch.equal(generate(pipeline, PROMPTS, [3, 4, 6], steps=3)[2], together[2])


def test_prompt_and_guidance_matter(tiny_sd: Path) -> None:
    pipeline = load_pipeline(resolve(str(tiny_sd)))
    drawn = [generate(pipeline, [p], [3], steps=2, guidance=g) for p in PROMPTS[:2] for g in (1.0, 30.0)]
    assert not torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


def test_bad_requests_are_refused(tiny_sd: Path, tiny_ddpm: Path) -> None:
    pipeline = load_pipeline(resolve(str(tiny_sd)))
    with pytest.raises(BenchError, match="3 prompts but 1 seeds"):
        generate(pipeline, PROMPTS, [1])
    with pytest.raises(BenchError, match="unknown sampler 'euler'"):
        generate(pipeline, PROMPTS, [1, 2, 3], sampler="euler")
    unet, scheduler = load_unconditional(resolve(str(tiny_ddpm)))
    with pytest.raises(BenchError, match="steps=21 is out of range"):
        sample_unconditional(unet, scheduler.config, torch.zeros(1, 3, 8, 8), [0], 21)


def test_ancestral_sampling_by_hand(tiny_ddpm: Path) -> None:
    """Algorithm 2 of Ho et al. 2020 with the posterior variance, in double precision where it is ours."""
    unet, scheduler = load_unconditional(resolve(str(tiny_ddpm)))
    noise, seeds = initial_noise([7, 8], (3, 8, 8)), [7, 8]
    found = sample_unconditional(unet, scheduler.config, noise, seeds, 20)
    betas = torch.linspace(1e-3, 0.2, 20)
    alphas, abars = 1 - betas, torch.cumprod(1 - betas, 0)
    own = [torch.Generator().manual_seed(seed ^ ANCESTRAL) for seed in seeds]
    x = noise
    for t in reversed(range(20)):
        with torch.no_grad():
            predicted = unet(x, t).sample
        clean = ((x - (1 - abars[t]).sqrt() * predicted) / abars[t].sqrt()).clamp(-1, 1)
        before = abars[t - 1] if t else torch.tensor(1.0)
        mean = (before.sqrt() * betas[t] * clean + alphas[t].sqrt() * (1 - before) * x) / (1 - abars[t])
        spread = (betas[t] * (1 - before) / (1 - abars[t])).sqrt()
        x = mean
        if t:
            x = mean + spread * torch.stack([torch.randn(3, 8, 8, generator=g) for g in own])
    assert (found.int() - to_uint8(x).int()).abs().max() <= 1


def test_unconditional_samples_do_not_depend_on_the_batch(
    tiny_ddpm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    model, ctx = resolve(str(tiny_ddpm)), Context("key", tmp_path)
    protocol = BackdoorProtocol(samples=3, steps=1000)
    whole = draw_unconditional(model, [1, 2, 3], None, protocol, ctx)
    monkeypatch.setattr(sampling, "UNCONDITIONAL_BATCH", 2)
    assert (draw_unconditional(model, [3, 1, 2], None, protocol, ctx).int() - whole[[2, 0, 1]].int()).abs().max() <= 1


def test_a_shift_of_the_noise_is_seen(tiny_ddpm: Path, tmp_path: Path) -> None:
    model, ctx = resolve(str(tiny_ddpm)), Context("key", tmp_path)
    protocol = BackdoorProtocol(samples=2, sampler="ddim")
    plain, zero, shifted = (draw_unconditional(model, [1, 2], shift, protocol, ctx)
                            for shift in (None, torch.zeros(3, 8, 8), torch.ones(3, 8, 8)))
    assert torch.equal(plain, zero)
    assert not torch.equal(plain, shifted)


def test_the_image_prompt_is_the_mean_over_photos(tiny_sd: Path) -> None:
    base = resolve(str(tiny_sd))
    model = replace(base, adapters=(Adapter("ip_image", adapter_path(base, "ip_image").weight),))
    pipeline = load_pipeline(model)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=generator, dtype=torch.int32).to(torch.uint8)
    each = [image_prompt(pipeline, ImageSet(pixels[i: i + 1], (str(i),)), model) for i in range(3)]
    both = image_prompt(pipeline, ImageSet(pixels, ("0", "1", "2")), model)
    assert torch.allclose(both, torch.stack(each).mean(0), atol=1e-6)
    assert torch.all(both[0] == 0)
    drawn = generate(pipeline, ["a"], [1], steps=2, image_embeds=both)
    assert not torch.equal(drawn, generate(pipeline, ["a"], [1], steps=2, image_embeds=each[0]))


def test_what_a_checkpoint_leaves_unsaid_can_be_set_for_any_kind_of_scheduler() -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    said_nothing = DDPMScheduler.from_config({"num_train_timesteps": 10, "beta_start": 0.1})
    ignored = DDIMScheduler.from_config({**said_nothing.config, "clip_sample": False})
    assert ignored.config.clip_sample is True  # why `adjusted` is there
    made = DDIMScheduler.from_config(sampling.adjusted(said_nothing.config, clip_sample=False))
    assert made.config.clip_sample is False and made.config.beta_start == 0.1
