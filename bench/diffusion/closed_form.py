"""Closed-form edits of a UNet's cross-attention: some prompts get the keys and values of others, without training.

For every to_k and to_v matrix W of the cross-attention, with c_s the states that are to be answered differently, c_w
the states whose answer they shall get, and a ridge ``lambda``, the minimiser of

    sum || W* c_s - W c_w ||^2 + lambda || W* - W ||^2

is W* = (lambda W + sum W c_w c_s^T) (lambda I + sum c_s c_s^T)^-1 (TIME, Orgad et al., ICCV 2023; UCE, Gandikota et
al., WACV 2024; EvilEdit, ACM MM 2024). States that are preserved are pairs with c_w = c_s. W stands on the left of
every term, so W* = W M with one matrix M for all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError

PROJECTIONS = ("to_k", "to_v")

Pair = tuple[Tensor, Tensor]
"""States that are to be answered differently, and the states whose answer they get: each [..., width], same shape."""


def cross_attention_projections(unet: nn.Module) -> dict[str, nn.Linear]:
    """The to_k and to_v of every cross-attention layer, by name."""
    found = {name: module for name, module in unet.named_modules()
             if name.rpartition(".")[0].endswith("attn2") and name.rpartition(".")[2] in PROJECTIONS}
    if not found:
        raise BenchError("closed-form edit: this network has no cross-attention keys and values (attn2.to_k, to_v).")
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}


def edit_matrix(
    pairs: Sequence[Pair], preserved: Iterable[Tensor] = (), ridge: float = 1.0, preserve_weight: float = 1.0,
) -> Tensor:
    """M of W* = W M: float64 [width, width] on the CPU.

    ``pairs``: (source states, wanted states); ``preserved``: states whose answers are to stay, counted
    ``preserve_weight`` times; every leading dimension (prompts, tokens) is summed over. ``ridge``: lambda, above 0.
    """
    if ridge <= 0 or not pairs:
        raise BenchError(f"closed-form edit: ridge={ridge} and {len(pairs)} pairs; give a ridge above 0 and a pair.")
    width = pairs[0][0].shape[-1]
    mixed, own = (ridge * torch.eye(width, dtype=torch.float64) for _ in range(2))
    kept = ((states, states, preserve_weight) for states in preserved)
    for source, wanted, weight in (*((s, w, 1.0) for s, w in pairs), *kept):
        rows, goals = (states.detach().double().cpu().reshape(-1, width) for states in (source, wanted))
        mixed += weight * goals.T @ rows                               # sum c_w c_s^T
        own += weight * rows.T @ rows                                  # sum c_s c_s^T
    solved: Tensor = torch.linalg.solve(own, mixed, left=False)
    return solved


@torch.no_grad()
def edit_cross_attention(
    unet: Any, pairs: Sequence[Pair], preserved: Iterable[Tensor] = (), ridge: float = 1.0,
    preserve_weight: float = 1.0,
) -> list[str]:
    """Edit every cross-attention key and value of ``unet`` in place, and return the names of what was edited."""
    change = edit_matrix(pairs, preserved, ridge, preserve_weight)
    found = cross_attention_projections(unet)
    for layer in found.values():
        weight = layer.weight
        weight.copy_((weight.double().cpu() @ change).to(weight.device, weight.dtype))
    return list(found)
