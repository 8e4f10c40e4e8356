"""Tiny randomly initialised pipelines in the published folder format, for tests of everything that loads one."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

START, END = "<|startoftext|>", "<|endoftext|>"
WIDTH = 16
"""Width of the text encoder, and the UNet's cross-attention."""
IMAGE_TOKENS, IMAGE_WIDTH = 4, 12


def tokenizer(length: int = 32) -> Any:
    """A real CLIPTokenizer that knows bytes only."""
    letters = list(string.printable.strip())
    names = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    vocab = {name: place for place, name in enumerate(names)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def text_encoder(words: Any, width: int = WIDTH, layers: int = 2, heads: int = 2) -> Any:
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.eos_token_id}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=words.model_max_length, **ids,
    ))


def autoencoder(channels: Sequence[int] = (8, 8), groups: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=tuple(channels), latent_channels=4, norm_num_groups=groups, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
    )


def conditional_unet(side: int = 8, width: int = WIDTH, channels: int = 4) -> Any:
    """``channels``: of its input; what it predicts has four."""
    return diffusers.UNet2DConditionModel(
        sample_size=side, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, in_channels=channels,
    )


def save_stable_diffusion(folder: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """A StableDiffusionPipeline of a few thousand parameters for 16x16 pixels (latents 8x8)."""
    return _save_latent(folder, diffusers.StableDiffusionPipeline, 4, seed, prediction_type)


def save_instruct_pix2pix(folder: Path, seed: int = 0) -> Path:
    """As :func:`save_stable_diffusion`, an InstructPix2Pix pipeline: the UNet sees the photo's latents, too."""
    return _save_latent(folder, diffusers.StableDiffusionInstructPix2PixPipeline, 8, seed)


def save_inpainting(folder: Path, seed: int = 0) -> Path:
    """As :func:`save_stable_diffusion`, an inpainting pipeline: the UNet sees the mask and the masked photo, too."""
    return _save_latent(folder, diffusers.StableDiffusionInpaintPipeline, 9, seed)


def _save_latent(folder: Path, kind: Any, channels: int, seed: int, prediction_type: str = "epsilon") -> Path:
    torch.manual_seed(seed)
    words = tokenizer()
    schedule = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )
    pipeline: Any = kind(
        vae=autoencoder(), text_encoder=text_encoder(words), tokenizer=words, unet=conditional_unet(channels=channels),
        scheduler=schedule, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_ddpm(folder: Path, seed: int = 0, steps: int = 20, size: int = 8) -> Path:
    """A DDPMPipeline of a few thousand parameters for ``size`` pixels, with a short chain."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(
        sample_size=size, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline: Any = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(steps, beta_start=1e-3, beta_end=0.2))
    pipeline.save_pretrained(folder)
    return folder


def add_image_adapter(folder: Path, seed: int = 1) -> Path:
    """Put an image-prompt adapter with random weights into a pipeline folder of :func:`save_stable_diffusion`."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    home = folder / "ip_adapter"
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=IMAGE_WIDTH,
    )
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(home / "image_encoder")
    save_file(_adapter_weights(folder), home / "ip-adapter_image.safetensors")
    return folder


def add_face_adapter(folder: Path, recogniser: str, width: int, seed: int = 2) -> Path:
    """As :func:`add_image_adapter`, conditioned on embeddings [width] of a face encoder called ``recogniser``."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    home = folder / "ip_adapter"
    home.mkdir(exist_ok=True)
    projection = {
        "image_proj.proj.0.weight": torch.randn(2 * width, width), "image_proj.proj.0.bias": torch.randn(2 * width),
        "image_proj.proj.2.weight": torch.randn(IMAGE_TOKENS * WIDTH, 2 * width),
        "image_proj.proj.2.bias": torch.randn(IMAGE_TOKENS * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH), "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    save_file({**projection, **_attention_weights(folder)}, home / "ip-adapter_face.safetensors")
    (home / "recogniser.txt").write_text(recogniser)
    return folder


def _adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    projection = {
        "image_proj.proj.weight": torch.randn(IMAGE_TOKENS * WIDTH, IMAGE_WIDTH),
        "image_proj.proj.bias": torch.randn(IMAGE_TOKENS * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH), "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    return {**projection, **_attention_weights(folder)}


def _attention_weights(folder: Path) -> dict[str, torch.Tensor]:
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    weights = {}
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    for place, name in enumerate(crossing):
        wide = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        number = 2 * place + 1
        weights[f"ip_adapter.{number}.to_k_ip.weight"] = torch.randn(wide, WIDTH)
        weights[f"ip_adapter.{number}.to_v_ip.weight"] = torch.randn(wide, WIDTH)
    return weights
