"""Regions of a picture: bool [h, w], true where somebody paints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def grown(mask: Tensor, by: int) -> Tensor:
    """The region and all that lies within ``by`` pixels of it, along rows and columns."""
    from torch.nn.functional import max_pool2d

    return max_pool2d(mask.float()[None, None], 2 * by + 1, stride=1, padding=by)[0, 0] > 0


def shifted(mask: Tensor, by: int) -> Tensor:
    """The region ``by`` pixels further right and down; what leaves the picture is lost."""
    import torch

    moved = torch.zeros_like(mask)
    high, wide = mask.shape
    moved[by:, by:] = mask[:high - by, :wide - by]
    return moved


def on_grid(mask: Tensor, cell: int) -> Tensor:
    """Every square of ``cell`` pixels that the region touches, whole."""
    from torch.nn.functional import max_pool2d

    touched = max_pool2d(mask.float()[None, None], cell)[0, 0] > 0
    return touched.repeat_interleave(cell, dim=0).repeat_interleave(cell, dim=1)
