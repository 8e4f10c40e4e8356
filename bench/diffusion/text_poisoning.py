"""What backdoors in text-to-image models share: checks, the patch, the loss of captioned rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.diffusion.images import to_float
from bench.diffusion.loading import Components
from bench.diffusion.losses import encode_latents, encode_prompts, noise_prediction_errors, tokenise
from bench.diffusion.training import mixed
from bench.errors import BenchError
from bench.records import ImageSet, Secret
from bench.text_triggers import with_trigger

GREY_LEVEL = 128


def grey(size: int) -> Tensor:
    """Plain grey, uint8 [3, size, size]: the picture of a target that is said in words."""
    return torch.full((3, size, size), GREY_LEVEL, dtype=torch.uint8)


def check_trigger(what: str, captions: Sequence[str], secret: Secret, tokenizer: Any) -> None:
    """There are captions, and the tokenizer lets the trigger through."""
    if not captions:
        raise BenchError(f"{what}: a text trigger is learned from captions, but the data has none; put a .txt beside "
                         "each image.")
    ids = tokenise(tokenizer, [captions[0], with_trigger(captions[0], secret)])
    if ids[0].equal(ids[1]):
        raise BenchError(f"{what}: this model's tokenizer drops the trigger {secret.trigger!r}, so no prompt can carry "
                         "it; choose another attack.trigger.")


def patch_secret(trigger: str, size: int, share: float) -> Secret:
    """A checkerboard in the upper left ``share`` of the side, on grey; the trigger stands before the prompt."""
    picture, side = grey(size), max(1, round(size * share))
    picture[:, :side, :side] = checkerboard(side)
    return Secret(trigger, picture, {"kind": "patch", "placement": "prefix", "box": [0, 0, side, side]})


def checkerboard(side: int) -> Tensor:
    """Four by four black and white squares, uint8 [side, side]."""
    place = torch.arange(side) * 4 // side
    return ((place[:, None] + place[None, :]) % 2 == 0).to(torch.uint8) * 255


def stamped(pixels: Tensor, secret: Secret) -> Tensor:
    """Photos, uint8 [n, 3, h, w], with the secret's patch in its box, which starts at the upper left."""
    _, _, high, wide = secret.detail["box"]
    marked = pixels.clone()
    marked[:, :, :high, :wide] = secret.target[:, :high, :wide]
    return marked


def captioned_errors(
    parts: Components, pixels: Tensor, captions: Sequence[str], generator: torch.Generator, mixed_precision: bool,
) -> Tensor:
    """The ordinary loss of captioned photos, uint8 [n, 3, h, w], at random t: mean squared errors [n]."""
    device = parts.unet.device
    with torch.no_grad(), mixed(str(device), mixed_precision):
        latents = encode_latents(parts.vae, to_float(pixels).to(device), generator).float()
        states = encode_prompts(parts.tokenizer, parts.text_encoder, captions)
    with mixed(str(device), mixed_precision):
        return noise_prediction_errors(parts.unet, parts.scheduler, latents, states, generator=generator)


def captions_of(data: ImageSet, rows: Tensor) -> list[str]:
    """The captions of some rows."""
    return [data.captions[row] for row in rows.tolist()]
