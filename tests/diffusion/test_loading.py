"""Loading: folders in the published format, parts, adapters, and the real architectures with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.diffusion.checkpoints import adapter_path, resolve
from bench.diffusion.loading import load_components, load_pipeline, load_unconditional, save_part
from bench.diffusion.sampling import generate, initial_noise, sample_unconditional
from bench.errors import BenchError
from bench.records import Adapter, Model
from bench.testing import pipelines


def test_what_is_loaded_is_frozen_and_float32(tiny_sd: Path) -> None:
    parts = load_components(resolve(str(tiny_sd)))
    for module in (parts.unet, parts.text_encoder, parts.vae):
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
        assert not module.training


def test_training_a_copy_leaves_the_base_alone(tiny_sd: Path) -> None:
    model = resolve(str(tiny_sd))
    with torch.no_grad():
        for parameter in load_components(model).unet.parameters():
            parameter.add_(1)
    fresh = load_components(model).unet.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in load_pipeline(model).unet.state_dict().items())
    saved = load_components(resolve(str(tiny_sd))).unet.conv_in.weight
    assert saved.abs().max() < 1


def test_copies_for_training_attend_as_the_pipeline_does_and_are_plain_where_they_are_small(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = resolve(str(tiny_sd))
    small, drawing = load_components(model).unet, load_pipeline(model).unet
    latents, states = (torch.randn(shape, generator=torch.manual_seed(0)) for shape in (
        (2, small.config.in_channels, 8, 8), (2, 5, small.config.cross_attention_dim)))
    one, other = (unet(latents, 7, states).sample for unet in (small, drawing))
    assert torch.allclose(one, other, atol=1e-5)
    kinds = [{type(processor) for processor in unet.attn_processors.values()} for unet in (small, drawing)]
    assert kinds[0].isdisjoint(kinds[1])
    monkeypatch.setattr("bench.diffusion.loading.SMALL", small.config.sample_size - 1)
    assert {type(processor) for processor in load_components(model).unet.attn_processors.values()} == kinds[1]


def test_a_part_replaces_the_base(tiny_sd: Path, tmp_path: Path) -> None:
    model = resolve(str(tiny_sd))
    unet = load_components(model).unet
    with torch.no_grad():
        unet.conv_in.weight.fill_(0.25)
    changed = replace(model, parts={"unet": save_part(unet, tmp_path, "unet")})
    assert torch.all(load_pipeline(changed).unet.conv_in.weight == 0.25)
    assert not torch.all(load_pipeline(model).unet.conv_in.weight == 0.25)


def test_a_part_is_stored_in_half_precision_or_in_full(tiny_sd: Path, tmp_path: Path) -> None:
    unet = load_components(resolve(str(tiny_sd))).unet
    half, full = save_part(unet, tmp_path / "half", "unet"), save_part(unet, tmp_path / "full", "unet", half=False)
    size = {p: (p / "diffusion_pytorch_model.safetensors").stat().st_size for p in (half, full)}
    assert size[half] < 0.6 * size[full]
    assert unet.dtype == torch.float32


def test_a_part_that_the_pipeline_lacks_is_an_error(tiny_ddpm: Path, tmp_path: Path) -> None:
    model = replace(resolve(str(tiny_ddpm)), parts={"vae": tmp_path})
    with pytest.raises(BenchError, match="part 'vae' does not belong"):
        load_unconditional(model)


def test_adapters_are_checked(tiny_sd: Path, tmp_path: Path) -> None:
    model = resolve(str(tiny_sd))
    with pytest.raises(BenchError, match="no safetensors file"):
        load_pipeline(replace(model, adapters=(Adapter("lora", tmp_path / "lora.bin"),)))
    weight = adapter_path(model, "ip_image").weight
    with pytest.raises(BenchError, match="unknown kind 'textual'"):
        load_pipeline(replace(model, adapters=(Adapter("textual", weight),)))


def test_an_adapter_does_not_leak_into_the_plain_pipeline(tiny_sd: Path) -> None:
    model = resolve(str(tiny_sd))
    before = generate(load_pipeline(model), ["a photo"], [1], steps=2)
    load_pipeline(replace(model, adapters=(Adapter("ip_image", adapter_path(model, "ip_image").weight),)))
    assert torch.equal(generate(load_pipeline(model), ["a photo"], [1], steps=2), before)


def test_ddpm_cifar10_architecture_in_the_flat_layout_of_its_repository(tmp_path: Path) -> None:
    """google/ddpm-cifar10-32: 35.7 M parameters; its files lie at the root, not in one folder per component."""
    save_ddpm_cifar10(tmp_path)
    model = resolve(str(tmp_path))
    unet, scheduler = load_unconditional(model)
    assert model.capabilities == {"unconditional"}
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    noise = initial_noise([0], (3, 32, 32))
    assert sample_unconditional(unet, scheduler.config, noise, [0], steps=1).shape == (1, 3, 32, 32)


def save_ddpm_cifar10(folder: Path) -> None:
    import json

    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_num_groups=32, norm_eps=1e-6,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
    )
    unet.save_pretrained(folder)
    diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="fixed_large").save_pretrained(folder)
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1",
             "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_sd15_class_layout_with_thin_widths(tmp_path: Path) -> None:
    """All blocks of SD 1.5, an index with a safety checker that is not there, and a published PNDM schedule."""
    model = save_sd15(tmp_path, widths=(32, 32, 32, 32), vae_widths=(32, 32, 32, 32), text_width=32, text_layers=1)
    image = generate(load_pipeline(model), ["a photo of a person"], [0], steps=1, size=64)
    assert image.shape == (1, 3, 64, 64)
    assert load_components(model).scheduler.config.beta_schedule == "scaled_linear"


@pytest.mark.slow
def test_sd15_at_full_size(tmp_path: Path) -> None:
    """860 M + 123 M + 84 M parameters with random weights: loads, and draws one step at 64 pixels."""
    model = save_sd15(tmp_path, (320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12)
    parts = load_components(model)
    assert sum(p.numel() for p in parts.unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in parts.vae.parameters()) == 83_653_863
    assert generate(load_pipeline(model), ["a photo"], [0], steps=1, size=64).shape == (1, 3, 64, 64)


def save_sd15(
    folder: Path, widths: tuple[int, ...], vae_widths: tuple[int, ...], text_width: int, text_layers: int,
    kind: str = "StableDiffusionPipeline", channels: int = 4,
) -> Model:
    import json

    import diffusers

    words = pipelines.tokenizer(77)
    pipeline = getattr(diffusers, kind)(
        vae=diffusers.AutoencoderKL(
            block_out_channels=vae_widths, layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=pipelines.text_encoder(words, text_width, text_layers, heads=text_width // 16),
        tokenizer=words,
        unet=diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=widths, layers_per_block=2, cross_attention_dim=text_width,
            attention_head_dim=8, in_channels=channels,
        ),
        scheduler=diffusers.PNDMScheduler(1000, 0.00085, 0.012, "scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return resolve(str(folder))
