"""A surrogate and its copy, for protections that alternate between teaching a model and perturbing photos."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.diffusion.finetuning import Surrogate
from bench.diffusion.loading import Components, load_components
from bench.diffusion.surrogates import Studio, Teaching, weights_of
from bench.records import Model

if TYPE_CHECKING:
    from bench.context import Context


@dataclass
class Pair:
    """``theta``, ``copy``: the surrogate and its copy, resident for the whole run; ``start``: the published weights
    that both begin with."""

    studio: Studio
    theta: Surrogate
    copy: Surrogate
    start: list[Tensor]


def open_pair(model: Model, teaching: Teaching, ctx: Context, half: bool = False) -> Pair:
    """Load the model twice. ``half``: train bfloat16 weights and round after every operation, as the released code of
    the Anti-DreamBooth line does; the norm of the gradient is then limited by ``teaching.clip`` alone, as always."""
    studio = Studio(model, teaching, ctx, load(model, ctx.device, half), fused=not half)
    theta = studio.surrogate(studio.components)
    return Pair(studio, theta, studio.surrogate(load(model, ctx.device, half)), weights_of(theta))


def load(model: Model, device: str, half: bool) -> Components:
    """The model's components; networks in bfloat16 if ``half``, without touching the shared autoencoder."""
    components = load_components(model, device)
    if not half:
        return components
    names = ("unet", "text_encoder", "vae")
    return replace(components, **{name: in_bfloat16(getattr(components, name)) for name in names})


def in_bfloat16(module: nn.Module) -> nn.Module:
    """A bfloat16 copy. Through ``nn.Module.to``, because the libraries' own refuse some modules."""
    return nn.Module.to(deepcopy(module), dtype=torch.bfloat16)
