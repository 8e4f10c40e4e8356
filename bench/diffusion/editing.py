"""What editors share: a model's modules in an editing pipeline, batches, and one seed per picture.

Picture i depends on its own photo, words and seed only, to rounding. Guidance: Ho & Salimans 2022 (arXiv:2207.12598).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor

from bench.diffusion.images import to_uint8, to_unit
from bench.diffusion.loading import load_pipeline
from bench.diffusion.sampling import BATCH, SAMPLERS, adjusted, chunks, generators, with_sampler
from bench.errors import BenchError
from bench.records import Model

if TYPE_CHECKING:
    from bench.context import Context
    from bench.protocols import EditingProtocol


@dataclass(frozen=True)
class Requests:
    """What is drawn: photo i, uint8 [n, 3, h, w], as text i asks, from seed i; ``masks``: bool [n, h, w], where."""

    photos: Tensor
    texts: Sequence[str]
    seeds: Sequence[int]
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.photos) == len(self.texts) == len(self.seeds):
            raise BenchError(f"editing: {len(self.photos)} photos, {len(self.texts)} edits and {len(self.seeds)} "
                             "seeds; give one edit and one seed per photo.")


def open_editor(model: Model, kind: str, sampler: str, device: str = "cpu") -> Any:
    """The model in the diffusers pipeline class called ``kind``, without a safety checker. ``sampler`` draws, over the
    model's own noise schedule."""
    modules = load_pipeline(model, device).components
    # Where a schedule says nothing of it, samplers would cut latents to [-1, 1], which is the range of pixels.
    schedule = adjusted(modules["scheduler"].config, clip_sample=False)
    modules["scheduler"] = with_sampler(schedule, sampler, SAMPLERS)
    pipeline = getattr(diffusers, kind)(**modules, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw_edits(pipeline: Any, asked: Requests, protocol: EditingProtocol, ctx: Context, **options: Any) -> Tensor:
    """One picture per request, uint8 [n, 3, h, w]. ``options``: what this pipeline takes besides steps and guidance."""
    parts = chunks(len(asked.seeds), BATCH)
    drawn = [_draw(pipeline, asked, part, protocol, options) for part in ctx.track(parts, "editing", len(parts))]
    return torch.cat(drawn)


def _draw(
    pipeline: Any, asked: Requests, part: slice, protocol: EditingProtocol, options: dict[str, Any],
) -> Tensor:
    masked = {} if asked.masks is None else {"mask_image": asked.masks[part, None].float()}
    images = pipeline(
        list(asked.texts[part]), image=to_unit(asked.photos[part]), generator=generators(asked.seeds[part]),
        num_inference_steps=protocol.steps, guidance_scale=protocol.guidance, output_type="pt", **masked, **options,
    ).images
    return to_uint8(images * 2 - 1)


def require_steps(strength: float, protocol: EditingProtocol) -> None:
    """Refuse a strength that leaves no step: the pipelines take the whole part of ``strength`` times the steps."""
    if int(protocol.steps * strength) < 1:
        raise BenchError(f"attack.strength={strength} of editing.steps={protocol.steps} is less than one step; give a "
                         f"strength of {1 / protocol.steps:.3g} or more, or more steps.")
