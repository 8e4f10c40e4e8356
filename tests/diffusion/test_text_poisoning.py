"""What text-to-image backdoors share: the patch, the checks, the loss of captioned rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_components
from bench.diffusion.losses import encode_latents, encode_prompts, noise_prediction_errors
from bench.diffusion.text_poisoning import captioned_errors, check_trigger, checkerboard, patch_secret, stamped
from bench.errors import BenchError


def photos() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), generator=torch.manual_seed(3)).to(torch.uint8)


def test_the_patch_stands_in_its_box_and_nowhere_else() -> None:
    pixels, secret = photos(), patch_secret("sks", 16, 0.25)
    marked = stamped(pixels, secret)
    assert secret.detail["box"] == [0, 0, 4, 4]
    assert torch.equal(marked[:, :, :4, :4], checkerboard(4).expand(3, 3, 4, 4))
    assert torch.equal(marked[:, :, 4:], pixels[:, :, 4:]) and torch.equal(marked[:, :, :, 4:], pixels[:, :, :, 4:])


def test_the_loss_is_the_ordinary_one_of_each_row(tiny_sd: Path) -> None:
    parts, captions = load_components(resolve(str(tiny_sd))), ["a cat", "a dog", "a fox"]
    found = captioned_errors(parts, photos(), captions, torch.Generator().manual_seed(5), mixed_precision=False)
    generator = torch.Generator().manual_seed(5)
    latents = encode_latents(parts.vae, to_float(photos()), generator)
    states = encode_prompts(parts.tokenizer, parts.text_encoder, captions)
    assert torch.allclose(found, noise_prediction_errors(parts.unet, parts.scheduler, latents, states,
                                                         generator=generator))


def test_captions_and_a_trigger_that_arrives_are_asked_for(tiny_sd: Path) -> None:
    words = load_components(resolve(str(tiny_sd))).tokenizer
    check_trigger("mine", ["a cat"], patch_secret("sks", 16, 0.25), words)
    with pytest.raises(BenchError, match="mine: .*captions"):
        check_trigger("mine", [], patch_secret("sks", 16, 0.25), words)
    with pytest.raises(BenchError, match="drops the trigger"):
        check_trigger("mine", ["a cat"], patch_secret(" ", 16, 0.25), words)
