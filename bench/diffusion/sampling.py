"""Draw images. Image i depends on its own prompt and seed only, to rounding: not on the batch it is drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.models.embeddings import ImageProjection
from torch import Tensor

from bench.diffusion.images import to_uint8, to_unit
from bench.diffusion.loading import load_modules, load_pipeline, load_unconditional
from bench.errors import BenchError, unknown

if TYPE_CHECKING:
    from bench.context import Context
    from bench.protocols import BackdoorProtocol, CustomizationProtocol
    from bench.records import Customised, ImageSet, Model

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm": DPMSolverMultistepScheduler}
UNCONDITIONAL_SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
BATCH = 8
UNCONDITIONAL_BATCH = 64
ANCESTRAL = 0x9E3779B9
"""Turns a seed into that of the noise added while sampling, which must not repeat the initial noise."""


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def chunks(total: int, size: int) -> list[slice]:
    """Consecutive slices of at most ``size``."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def with_sampler(config: Mapping[str, Any], name: str, table: Mapping[str, Any]) -> Any:
    """A scheduler of the wanted kind with the model's own noise schedule."""
    if name not in table:
        raise unknown("sampler", name, "sampling", table)
    return table[name].from_config(config)


def adjusted(config: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """A scheduler's config with other settings, for a scheduler of any kind. diffusers marks what a checkpoint leaves
    unsaid and gives it each kind's default again, whatever the config holds: what is set here is marked no longer."""
    unsaid = [name for name in config.get("_use_default_values", ()) if name not in settings]
    return {**config, **settings, "_use_default_values": unsaid}


@torch.no_grad()
def generate(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = 25, guidance: float = 7.5,
    sampler: str = "ddim", image_embeds: Tensor | None = None, size: int | None = None,
) -> Tensor:
    """One image per prompt and seed: uint8 [n, 3, size, size].

    ``guidance``: classifier-free guidance scale. ``image_embeds``: what an image-prompt adapter sees, [2, 1, ...]
    (unconditional, conditional), from :func:`image_prompt`. ``size`` in pixels: the model's own when None.
    """
    if len(prompts) != len(seeds):
        raise BenchError(f"sampling: {len(prompts)} prompts but {len(seeds)} seeds; give one seed per image.")
    pipeline.scheduler = with_sampler(pipeline.scheduler.config, sampler, SAMPLERS)
    shared = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
    drawn = [
        _draw(pipeline, list(prompts[part]), seeds[part], image_embeds, guidance, shared)
        for part in chunks(len(prompts), BATCH)
    ]
    return torch.cat(drawn)


def draw_prompts(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], protocol: BackdoorProtocol, ctx: Context,
) -> Tensor:
    """What the ordinary sampler draws from ``model``, whether or not it is guarded: uint8 [n, 3, h, w]."""
    pipeline = load_pipeline(model, ctx.device)
    parts = chunks(len(prompts), BATCH)
    return torch.cat([
        generate(pipeline, prompts[part], seeds[part], steps=protocol.steps, guidance=protocol.guidance,
                 sampler=protocol.sampler)
        for part in ctx.track(parts, "sampling", len(parts))
    ])


@torch.no_grad()
def generate_latents(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, sampler: str = "ddim",
) -> Tensor:
    """The final latents before they are decoded, [n, c, h, w], from the same noise as :func:`generate`."""
    pipeline.scheduler = with_sampler(pipeline.scheduler.config, sampler, SAMPLERS)
    parts = chunks(len(prompts), BATCH)
    return torch.cat([
        pipeline(list(prompts[part]), generator=generators(seeds[part]), num_inference_steps=steps,
                 guidance_scale=guidance, output_type="latent").images
        for part in parts
    ])


@torch.no_grad()
def decode_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Pictures uint8 [n, 3, h, w] of final latents, as the pipeline decodes them."""
    vae = pipeline.vae
    parts = [vae.decode(latents[part] / vae.config.scaling_factor).sample for part in chunks(len(latents), BATCH)]
    return to_uint8(torch.cat(parts))


def _draw(
    pipeline: Any, prompts: list[str], seeds: Sequence[int], embeds: Tensor | None, guidance: float,
    shared: Mapping[str, Any],
) -> Tensor:
    given = {}
    if embeds is not None:
        given["ip_adapter_image_embeds"] = [embeds if guidance > 1 else embeds[1:]]
    images = pipeline(prompts, generator=generators(seeds), output_type="pt", **given, **shared).images
    return to_uint8(images * 2 - 1)


def draw_customised(
    customised: Customised, prompts: Sequence[str], seeds: Sequence[int], protocol: CustomizationProtocol, ctx: Context,
) -> Tensor:
    """What the attacker draws: uint8 [n, 3, h, w] from the customised model, with its image prompt if it has one."""
    pipeline = load_pipeline(customised.model, ctx.device)
    embeds = None
    if customised.conditioning is not None:
        embeds = image_prompt(pipeline, customised.conditioning, customised.model, ctx.device)
    drawn = [
        generate(pipeline, prompts[part], seeds[part], steps=protocol.steps, guidance=protocol.guidance,
                 sampler=protocol.sampler, image_embeds=embeds)
        for part in ctx.track(chunks(len(prompts), BATCH), "sampling", -(-len(prompts) // BATCH))
    ]
    return torch.cat(drawn)


@torch.no_grad()
def image_prompt(pipeline: Any, photos: ImageSet, model: Model, device: str = "cpu") -> Tensor:
    """What an image-prompt adapter is given for a set of photos: the mean of their embeddings.

    Returns [2, 1, ...]: the unconditional and the conditional embedding. For ``ip_face`` only photos in which a
    face was found count; if there is none, the person is unknown to the attacker and both halves are zero.
    """
    kinds = {adapter.kind for adapter in model.adapters}
    if "ip_face" in kinds:
        positive = face_prompt(photos, model)
        return torch.stack([torch.zeros_like(positive), positive])[:, None].to(device)
    layer = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    pictures = [_picture(p) for p in photos.pixels]
    positive, negative = pipeline.encode_image(pictures, device, 1, not isinstance(layer, ImageProjection))
    return torch.stack([negative.mean(0), positive.mean(0)])[:, None]


def face_prompt(photos: ImageSet, model: Model) -> Tensor:
    """The mean unit embedding of the faces that are found, [d]."""
    from bench.diffusion.checkpoints import adapter_path
    from bench.faces import recogniser

    name = adapter_path(model, "ip_face").recogniser
    embeddings, found = recogniser(name).embed(to_unit(photos.pixels))
    kept = embeddings * found[:, None]
    mean: Tensor = kept.sum(0) / found.sum().clamp(min=1)
    return mean


def _picture(pixels: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [n, *shape], image i from seed i alone."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators(seeds)])


@torch.no_grad()
def sample_unconditional(
    unet: Any, scheduler_config: Mapping[str, Any], noise: Tensor, seeds: Sequence[int], steps: int,
    sampler: str = "ddpm",
) -> Tensor:
    """Images uint8 [n, 3, h, w] from initial ``noise`` [n, 3, h, w].

    ``ddpm``: ancestral sampling (Ho et al. 2020, algorithm 2), the noise of image i from seed i; ``ddim``: eta = 0.
    ``steps``: at most the schedule's length, which is the full chain.
    """
    scheduler = with_sampler(scheduler_config, sampler, UNCONDITIONAL_SAMPLERS)
    longest = scheduler.config.num_train_timesteps
    if not 1 <= steps <= longest:
        raise BenchError(f"sampling: steps={steps} is out of range; this model's schedule takes 1 to {longest}.")
    scheduler.set_timesteps(steps)
    parts = chunks(len(noise), UNCONDITIONAL_BATCH)
    return torch.cat([_denoise(unet, scheduler, noise[part], seeds[part]) for part in parts])


def _denoise(unet: Any, scheduler: Any, noise: Tensor, seeds: Sequence[int]) -> Tensor:
    own = generators([seed ^ ANCESTRAL for seed in seeds])
    x = noise.to(unet.device)
    for t in scheduler.timesteps:
        predicted = unet(x, t).sample
        x = scheduler.step(predicted, t, x, generator=own).prev_sample
    return to_uint8(x)


def draw_unconditional(
    model: Model, seeds: Sequence[int], shift: Tensor | None, protocol: BackdoorProtocol, ctx: Context,
) -> Tensor:
    """Samples of an unconditional model: uint8 [n, 3, h, w]. ``shift``: a trigger [3, h, w], added to the noise."""
    return draw_from_noise(model, starting_noise(model, seeds, shift), seeds, protocol, ctx)


def starting_noise(model: Model, seeds: Sequence[int], shift: Tensor | None) -> Tensor:
    """Initial noise [n, 3, h, w] for an unconditional model, with ``shift`` [3, h, w] added."""
    config = load_modules(replace(model, parts={}))["unet"].config  # parts have the base's input
    noise = initial_noise(seeds, (config.in_channels, config.sample_size, config.sample_size))
    return noise if shift is None else noise + shift


def draw_from_noise(
    model: Model, noise: Tensor, seeds: Sequence[int], protocol: BackdoorProtocol, ctx: Context,
) -> Tensor:
    """What the ordinary sampler draws from ``noise`` [n, 3, h, w], whether or not ``model`` is guarded."""
    unet, scheduler = load_unconditional(model, ctx.device)
    steps = min(protocol.steps, scheduler.config.num_train_timesteps)
    schedule = adjusted(scheduler.config, clip_sample=protocol.clip)
    parts = chunks(len(seeds), UNCONDITIONAL_BATCH)
    return torch.cat([
        sample_unconditional(unet, schedule, noise[part], seeds[part], steps, protocol.sampler)
        for part in ctx.track(parts, "sampling", len(parts))
    ])
