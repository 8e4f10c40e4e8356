"""Attention maps of a UNet: post-softmax probabilities, differentiable, averaged over heads.

A map says for each place of the picture how much it attends to each token of the prompt (cross-attention, ``attn2``) or
to each other place (self-attention, ``attn1``): softmax(Q K^T / sqrt(d)), Vaswani et al. 2017, eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KINDS = {"attn1.processor": "self", "attn2.processor": "cross"}


@dataclass
class Maps:
    """What one pass left: layer name -> [n, places, tokens or places]. Rows sum to 1."""

    cross: dict[str, Tensor] = field(default_factory=dict)
    self: dict[str, Tensor] = field(default_factory=dict)


class RecordingProcessor:
    """Plain attention that also hands its head-averaged probabilities to ``kept[name]``.

    ``sides``: record only maps of these widths, None for all. ``later_half``: average over the later half of the heads
    only. Needed because fused attention never forms the map.
    """

    def __init__(
        self, kept: dict[str, Tensor], name: str, sides: frozenset[int] | None, later_half: bool = False,
    ) -> None:
        self.kept, self.name, self.sides, self.later_half = kept, name, sides, later_half

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, *_: Any, **__: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (attn.head_to_batch_dim(x) for x in (
            attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        places = probabilities.shape[1]
        if self.sides is None or math.isqrt(places) in self.sides:
            first = attn.heads // 2 if self.later_half else 0
            self.kept[self.name] = probabilities.unflatten(0, (-1, attn.heads))[:, first:].mean(1)
        mixed = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        out: Tensor = attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor
        return out


@contextmanager
def recorded(unet: Any, sides: frozenset[int] | None = None, later_half: bool = False) -> Iterator[Maps]:
    """Within it, every pass through ``unet`` fills the maps anew; afterwards its attention is as before."""
    maps, before = Maps(), dict(unet.attn_processors)
    chosen = {}
    for name, old in before.items():
        kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), None)
        chosen[name] = RecordingProcessor(getattr(maps, kind), name, sides, later_half) if kind else old
    unet.set_attn_processor(chosen)
    try:
        yield maps
    finally:
        unet.set_attn_processor(before)


def latent_fractions(side: int, factors: tuple[int, ...]) -> frozenset[int]:
    """Widths of maps as fractions of the latents' ``side``: factor 4 is 16 on the 64 of SD 1.x at 512 pixels."""
    return frozenset(side // factor for factor in factors)
