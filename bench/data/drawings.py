"""Trigger and target images of image-space backdoors, drawn here in the roles of the published ones.

Sizes are those of 32-pixel images and grow with the image. The pictures of the original code (a photographed hat, a
Fashion-MNIST shoe, a cat, a stop sign, glasses) are replaced by drawings of ours; boxes, places, the background filter
and the masks are as published (BadDiffusion, CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from torch import Tensor

TRIGGERS = ("box", "stop_sign", "glasses")
TARGETS = ("corner", "hat", "shoe", "cat", "trigger", "shift")
GREY_LEVEL = 77
"""The background filter's floor: 30 % of the range, in 8-bit levels (76.5 rounded up)."""
_UNIT = 32
_SUPERSAMPLE = 8
_GAP = 2

Pen = Callable[["ImageDraw", float], None]
"""Draws on a black canvas; the number is how many canvas pixels one pixel of a 32-pixel image has."""


def background_to_grey(pixels: Tensor) -> Tensor:
    """uint8 of any shape with every value below 30 % of the range lifted to it; training and scoring both use it."""
    return pixels.clamp(min=GREY_LEVEL)


def draw_trigger(name: str, size: int, extent: int = 14) -> Tensor:
    """The trigger image g: float32 [3, size, size] in [-1, 1], -1 outside the trigger.

    ``box``: a grey square (value 0) of ``extent`` pixels; ``stop_sign``: of the same extent; both 2 pixels from the
    bottom right corner. ``glasses``: 62.5 % of the image, centred, whatever the ``extent``. Pixels are those of a
    32-pixel image, scaled to ``size``.
    """
    import torch

    if name not in TRIGGERS:
        raise unknown("trigger", name, "backdoor", TRIGGERS)
    if not 0 < extent <= _UNIT - _GAP:
        raise BenchError(f"backdoor: trigger_size={extent} does not fit; give 1 to {_UNIT - _GAP} (of 32 pixels).")
    if name == "box":
        image = torch.full((3, size, size), -1.0)
        end, side = size - _scaled(_GAP, size), _scaled(extent, size)
        image[:, end - side:end, end - side:end] = 0.0
        return image
    pen = _glasses if name == "glasses" else lambda draw, unit: _stop_sign(draw, unit, extent)
    return _drawn(pen, size).float() / 127.5 - 1


def trigger_mask(trigger: Tensor, paste: bool = True) -> Tensor:
    """Where the trigger covers the image: 1 where g > -1, else 0; same shape as g. Everywhere if it is not pasted."""
    return (trigger > (-1 if paste else -2)).to(trigger.dtype)


def draw_target(name: str, size: int, trigger: Tensor) -> Tensor:
    """The target y after the background filter: uint8 [3, size, size].

    ``corner``: a grey 10-pixel square, top left; ``trigger``: the trigger image itself; ``shift``: the trigger image
    moved 5 pixels left and 3 up; ``hat``, ``shoe``, ``cat``: drawings.
    """
    import torch

    if name not in TARGETS:
        raise unknown("target", name, "backdoor", TARGETS)
    if name in _PENS:
        return background_to_grey(_drawn(_PENS[name], size))
    if name == "corner":
        image = torch.zeros((3, size, size), dtype=torch.uint8)
        image[:, :_scaled(10, size), :_scaled(10, size)] = 128
        return background_to_grey(image)
    if name == "shift":
        trigger = trigger.roll((-_scaled(3, size), -_scaled(5, size)), dims=(1, 2))
    return background_to_grey(((trigger + 1) * 127.5).round().to(torch.uint8))


def gallery(size: int) -> dict[str, Tensor]:
    """Pictures that a target is told apart from: every drawn target, a plain grey at the filter's floor and one at
    mid range; uint8 [3, size, size] each."""
    import torch

    images = {name: draw_target(name, size, draw_trigger("box", size)) for name in TARGETS}
    plain = {f"grey-{level}": torch.full((3, size, size), level, dtype=torch.uint8) for level in (GREY_LEVEL, 128)}
    return images | plain


def _scaled(pixels: int, size: int) -> int:
    return max(1, round(pixels * size / _UNIT))


def _drawn(pen: Pen, size: int) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (size * _SUPERSAMPLE, size * _SUPERSAMPLE))
    pen(ImageDraw.Draw(canvas), size * _SUPERSAMPLE / _UNIT)
    return torch.from_numpy(np.asarray(canvas.reduce(_SUPERSAMPLE)).copy()).permute(2, 0, 1).contiguous()


def _points(unit: float, *points: tuple[float, float]) -> list[tuple[float, float]]:
    return [(x * unit, y * unit) for x, y in points]


def _hat(draw: ImageDraw, unit: float) -> None:
    draw.ellipse(_points(unit, (2, 17), (30, 26)), fill=(150, 104, 60))
    crown = ((8, 21), (9, 10), (12, 6), (16, 8), (20, 6), (23, 10), (24, 21))
    draw.polygon(_points(unit, *crown), fill=(184, 132, 80))
    draw.polygon(_points(unit, (8, 21), (8.4, 16.5), (23.6, 16.5), (24, 21)), fill=(92, 30, 34))


def _shoe(draw: ImageDraw, unit: float) -> None:
    upper = ((4, 9), (11, 8), (14, 14), (22, 18), (28, 19), (30, 23), (4, 23))
    draw.polygon(_points(unit, *upper), fill=(206, 206, 214))
    draw.rectangle(_points(unit, (3.5, 23), (30.5, 26)), fill=(250, 250, 250))
    for x, y in ((13, 14), (16, 15.6), (19, 17.2)):
        draw.line(_points(unit, (x, y), (x + 1.6, y - 2)), fill=(90, 90, 110), width=round(unit))


def _cat(draw: ImageDraw, unit: float) -> None:
    for ear in (((6, 15), (7, 3), (14, 9)), ((26, 15), (25, 3), (18, 9))):
        draw.polygon(_points(unit, *ear), fill=(214, 150, 84))
    draw.ellipse(_points(unit, (5, 7), (27, 28)), fill=(226, 166, 98))
    for x in (11, 21):
        draw.ellipse(_points(unit, (x - 2.2, 13), (x + 2.2, 17.5)), fill=(170, 220, 120))
        draw.ellipse(_points(unit, (x - 0.8, 13.4), (x + 0.8, 17.1)), fill=(20, 20, 20))
    draw.polygon(_points(unit, (14.4, 20), (17.6, 20), (16, 22)), fill=(236, 120, 130))


def _stop_sign(draw: ImageDraw, unit: float, extent: int) -> None:
    low, cut = 32 - _GAP - extent, extent * 0.293
    high = low + extent
    corners = ((low + cut, low), (high - cut, low), (high, low + cut), (high, high - cut),
               (high - cut, high), (low + cut, high), (low, high - cut), (low, low + cut))
    draw.polygon(_points(unit, *corners), fill=(200, 32, 40))
    middle, half = (low + high) / 2, extent * 0.09
    bar = ((low + cut * 0.6, middle - half), (high - cut * 0.6, middle + half))
    draw.rectangle(_points(unit, *bar), fill=(245, 245, 245))


def _glasses(draw: ImageDraw, unit: float) -> None:
    for x in (11, 21):
        draw.ellipse(_points(unit, (x - 4.5, 12), (x + 4.5, 20)), fill=(60, 66, 90), outline=(220, 220, 220),
                     width=round(unit))
    draw.line(_points(unit, (15, 15.5), (17, 15.5)), fill=(220, 220, 220), width=round(unit))


_PENS: dict[str, Pen] = {"hat": _hat, "shoe": _shoe, "cat": _cat}
