"""The drawn world: 64x64 portraits whose every fact is known.

An `Identity` fixes the geometry and colours of a face; a `View` draws pose, light, expression, glasses, clothes and
background; `caption` says what can be seen. Because the picture is a function of both, an edit ("add glasses") has
one right answer. Nobody living is drawn: every face is a seeded draw from the distributions below.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 64
VERSION = 1
_SUPERSAMPLE = 3

Colour = tuple[int, int, int]
Points = NDArray[np.float64]
Pixels = NDArray[np.uint8]

HAIR_COLOURS: dict[str, Colour] = {
    "black": (30, 26, 26),
    "brown": (101, 62, 36),
    "blond": (228, 188, 96),
    "red": (178, 66, 26),
    "grey": (138, 138, 140),
    "white": (236, 234, 228),
}
HAIR_STYLES = ("short", "long", "curly", "spiky", "bob", "bald")
BEARDS = ("none", "beard", "moustache", "goatee")
EXPRESSIONS = ("neutral", "smiling", "sad", "surprised")
GLASSES = ("no", "glasses", "sunglasses")
BACKGROUND_COLOURS: dict[str, Colour] = {
    "red": (206, 46, 52),
    "blue": (50, 92, 204),
    "green": (46, 150, 66),
    "yellow": (240, 212, 66),
    "purple": (138, 60, 176),
    "orange": (240, 136, 36),
    "grey": (148, 148, 152),
    "pink": (246, 156, 190),
    "teal": (38, 160, 164),
}
SCENES = ("beach", "forest", "city")
BACKGROUNDS = (*BACKGROUND_COLOURS, *SCENES)
SHIRTS: dict[str, Colour] = {
    "red": (192, 32, 40),
    "blue": (36, 66, 176),
    "green": (34, 124, 56),
    "yellow": (232, 200, 44),
    "black": (34, 34, 38),
    "white": (238, 238, 236),
    "purple": (116, 40, 150),
    "orange": (230, 116, 24),
}
_SKINS: tuple[Colour, ...] = (
    (252, 222, 200),
    (240, 198, 164),
    (222, 172, 130),
    (190, 136, 94),
    (146, 98, 64),
    (98, 64, 44),
    (70, 46, 36),
)
_EYES: tuple[Colour, ...] = (
    (62, 38, 22),
    (112, 72, 36),
    (60, 110, 170),
    (70, 130, 80),
    (110, 120, 130),
    (30, 24, 24),
)
_LIPS: tuple[Colour, ...] = ((176, 74, 76), (206, 60, 84), (150, 70, 62), (198, 108, 96), (132, 48, 66))


@dataclass(frozen=True)
class Identity:
    """A face. Lengths are in units of about half a face's width; angles are in radians."""

    skin: Colour
    hair_colour: str
    hair_shade: float
    hair_style: str
    hair_volume: float
    hairline: float
    hairline_shape: float
    parting: float
    beard: str
    width: float
    top: float
    bottom: float
    jaw: float
    ear_size: float
    ear_height: float
    neck: float
    eye_height: float
    eye_spacing: float
    eye_size: float
    eye_aspect: float
    eye_tilt: float
    eye_colour: Colour
    brow_height: float
    brow_tilt: float
    brow_length: float
    brow_weight: float
    nose_length: float
    nose_width: float
    nose_style: float
    mouth_height: float
    mouth_width: float
    lip_weight: float
    lip_colour: Colour
    cheeks: float
    freckles: bool
    mole: tuple[float, float] | None


@dataclass(frozen=True)
class View:
    """One photograph of an identity. Angles are in radians, shifts in pixels of a 64-pixel picture."""

    roll: float
    yaw: float
    pitch: float
    scale: float
    shift: tuple[float, float]
    light_angle: float
    light_strength: float
    exposure: float
    expression: str
    glasses: str
    shirt: str
    shirt_shade: float
    background: str
    background_shade: float
    scenery: int


@dataclass(frozen=True)
class Edit:
    """One field of a face or of a view, set to a value."""

    of: Literal["identity", "view"]
    field: str
    value: str


@dataclass
class Drawn:
    """Pictures uint8 [n, 3, s, s], identity indices int64 [n], and what is said and true of each picture."""

    pixels: Pixels
    identity: NDArray[np.int64]
    captions: list[str]
    attributes: list[dict[str, str]]


SPLITS: dict[str, range] = {
    "sd_a": range(8_000),
    "sd_b": range(8_000, 16_000),
    "clip": range(16_000, 24_000),
    "face_1": range(24_000, 32_000),
    "face_2": range(32_000, 40_000),
    "face_3": range(40_000, 48_000),
    "ddpm": range(48_000, 56_000),
    "ip2p": range(56_000, 64_000),
    "card": range(64_000, 66_000),
    "subjects": range(66_000, 68_000),
    "fid_reference": range(68_000, 72_000),
}


def _edits() -> dict[str, Edit]:
    edits = {
        "add glasses": Edit("view", "glasses", "glasses"),
        "add sunglasses": Edit("view", "glasses", "sunglasses"),
        "remove the glasses": Edit("view", "glasses", "no"),
        "add a beard": Edit("identity", "beard", "beard"),
        "add a moustache": Edit("identity", "beard", "moustache"),
        "remove the beard": Edit("identity", "beard", "none"),
        "make the person bald": Edit("identity", "hair_style", "bald"),
        "make the person smile": Edit("view", "expression", "smiling"),
        "make the person sad": Edit("view", "expression", "sad"),
        "make the person surprised": Edit("view", "expression", "surprised"),
    }
    edits |= {f"make the background {name}": Edit("view", "background", name) for name in BACKGROUND_COLOURS}
    edits |= {f"put the person in front of the {name}": Edit("view", "background", name) for name in SCENES}
    edits |= {f"make the shirt {name}": Edit("view", "shirt", name) for name in SHIRTS}
    edits |= {f"make the hair {name}": Edit("identity", "hair_colour", name) for name in HAIR_COLOURS}
    edits |= {
        f"make the hair {name}": Edit("identity", "hair_style", name) for name in ("short", "long", "curly")
    }
    return edits


EDITS: dict[str, Edit] = _edits()


def _mix(a: Sequence[float], b: Sequence[float], t: float) -> Colour:
    return cast(Colour, tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True)))


def _shade(colour: Colour, factor: float) -> Colour:
    return cast(Colour, tuple(int(min(255, max(0, round(c * factor)))) for c in colour))


def _skin(rng: np.random.Generator) -> Colour:
    place = rng.uniform(0, len(_SKINS) - 1.001)
    tone = _mix(_SKINS[int(place)], _SKINS[int(place) + 1], place % 1)
    return cast(Colour, tuple(int(np.clip(c + rng.normal(0, 5), 0, 255)) for c in tone))


def identity(index: int) -> Identity:
    """The `index`-th person of the world: deterministic, and there is no last one."""
    rng = np.random.default_rng((20_240, index))
    u = rng.uniform
    hair_weights = (0.26, 0.24, 0.17, 0.13, 0.1, 0.1)
    style_weights = (0.27, 0.2, 0.16, 0.13, 0.12, 0.12)
    return Identity(
        skin=_skin(rng),
        hair_colour=str(rng.choice(list(HAIR_COLOURS), p=hair_weights)),
        hair_shade=u(0.85, 1.12),
        hair_style=str(rng.choice(HAIR_STYLES, p=style_weights)),
        hair_volume=u(0.04, 0.24),
        hairline=u(0.42, 0.78),
        hairline_shape=u(-0.14, 0.3),
        parting=u(-0.6, 0.6),
        beard=str(rng.choice(BEARDS, p=(0.64, 0.14, 0.11, 0.11))),
        width=u(0.78, 1.06),
        top=u(0.98, 1.2),
        bottom=u(1.04, 1.42),
        jaw=u(1.5, 3.2),
        ear_size=u(0.12, 0.27),
        ear_height=u(-0.12, 0.16),
        neck=u(0.34, 0.6),
        eye_height=u(-0.2, 0.1),
        eye_spacing=u(0.31, 0.5),
        eye_size=u(0.135, 0.235),
        eye_aspect=u(0.46, 0.92),
        eye_tilt=u(-0.3, 0.3),
        eye_colour=_EYES[rng.integers(len(_EYES))],
        brow_height=u(0.06, 0.2),
        brow_tilt=u(-0.34, 0.34),
        brow_length=u(0.17, 0.3),
        brow_weight=u(0.03, 0.11),
        nose_length=u(0.28, 0.56),
        nose_width=u(0.09, 0.26),
        nose_style=u(0, 1),
        mouth_height=u(0.2, 0.36),
        mouth_width=u(0.2, 0.42),
        lip_weight=u(0.035, 0.105),
        lip_colour=_LIPS[rng.integers(len(_LIPS))],
        cheeks=u(0, 0.4),
        freckles=bool(rng.random() < 0.14),
        mole=(u(-0.55, 0.55), u(0.15, 0.7)) if rng.random() < 0.22 else None,
    )


def sample_view(rng: np.random.Generator) -> View:
    """Draw pose, light, expression, glasses, clothes and background."""
    u = rng.uniform
    backgrounds = (0.09,) * len(BACKGROUND_COLOURS) + (0.19 / 3,) * len(SCENES)
    return View(
        roll=float(np.clip(rng.normal(0, 0.09), -0.22, 0.22)),
        yaw=u(-0.3, 0.3),
        pitch=u(-0.1, 0.1),
        scale=u(0.9, 1.1),
        shift=(u(-3, 3), u(-2, 2)),
        light_angle=u(0, 2 * np.pi),
        light_strength=u(0, 0.26),
        exposure=u(0.9, 1.06),
        expression=str(rng.choice(EXPRESSIONS, p=(0.4, 0.3, 0.15, 0.15))),
        glasses=str(rng.choice(GLASSES, p=(0.7, 0.2, 0.1))),
        shirt=str(rng.choice(list(SHIRTS))),
        shirt_shade=u(0.85, 1.15),
        background=str(rng.choice(BACKGROUNDS, p=backgrounds)),
        background_shade=u(0.86, 1.1),
        scenery=int(rng.integers(8)),
    )


class _Canvas:
    """Draws in face units: turns the head by yaw and pitch, then rolls, scales and shifts onto the picture."""

    def __init__(self, who: Identity, view: View, size: int) -> None:
        self.side = size * _SUPERSAMPLE
        self.unit = 0.3 * self.side * view.scale
        self.image = Image.new("RGB", (self.side, self.side))
        self.pen = ImageDraw.Draw(self.image)
        self.who, self.view = who, view
        pixel = self.side / SIZE
        self.centre = np.array(
            [self.side / 2 + view.shift[0] * pixel, self.side * 0.5 + view.shift[1] * pixel]
        )
        cos, sin = np.cos(view.roll), np.sin(view.roll)
        self.turn = np.array([[cos, sin], [-sin, cos]]) * self.unit

    def place(self, points: Points, depth: float) -> Points:
        """Face points [n, 2] to picture points; `depth` 0 is the head's outline, 1 the surface of the face."""
        x, y = points[:, 0], points[:, 1]
        bulge = depth * np.sqrt(np.clip(1 - (x / 1.3) ** 2, 0.0, 1.0))
        turned = np.stack(
            [x + bulge * np.sin(self.view.yaw) * 0.8, y + bulge * np.sin(self.view.pitch) * 0.8], 1
        )
        return cast(Points, turned @ self.turn + self.centre)

    def polygon(self, points: Points, colour: Colour, depth: float = 1.0) -> None:
        self.pen.polygon([tuple(p) for p in self.place(points, depth).tolist()], fill=colour)

    def line(self, points: Points, colour: Colour, width: float, depth: float = 1.0) -> None:
        thick = max(1, round(width * self.unit))
        self.pen.line(
            [tuple(p) for p in self.place(points, depth).tolist()], fill=colour, width=thick, joint="curve"
        )

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, tilt: float = 0.0, depth: float = 1.0
    ) -> None:
        self.polygon(_oval(x, y, rx, ry, tilt), colour, depth)


_ANGLES = np.linspace(0, 2 * np.pi, 20, endpoint=False)
_CIRCLE: Points = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def _oval(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Points:
    cos, sin = np.cos(tilt), np.sin(tilt)
    return cast(Points, (_CIRCLE * (rx, ry)) @ np.array([[cos, sin], [-sin, cos]]) + (x, y))


def _outline(who: Identity) -> Points:
    """The head: half an ellipse above the ears, half a superellipse with the jaw's exponent below."""
    t = np.linspace(0, np.pi, 24)
    above = np.stack([who.width * np.cos(t), -who.top * np.sin(t)], 1)
    x, y = np.cos(t[1:-1]), np.sin(t[1:-1])
    power = 2 / who.jaw
    below = np.stack([-who.width * np.sign(x) * np.abs(x) ** power, who.bottom * np.abs(y) ** power], 1)
    return np.concatenate([above, below])


def _hair_tone(who: Identity) -> Colour:
    return _shade(HAIR_COLOURS[who.hair_colour], who.hair_shade)


def _draw_background(canvas: _Canvas, view: View) -> None:
    if view.background in BACKGROUND_COLOURS:
        canvas.pen.rectangle(
            (0, 0, canvas.side, canvas.side),
            _shade(BACKGROUND_COLOURS[view.background], view.background_shade),
        )
        return
    {"beach": _draw_beach, "forest": _draw_forest, "city": _draw_city}[view.background](canvas, view)


def _draw_beach(canvas: _Canvas, view: View) -> None:
    s, k = canvas.side, view.background_shade
    horizon = s * (0.4 + 0.03 * (view.scenery % 4))
    canvas.pen.rectangle((0, 0, s, horizon), _shade((150, 206, 240), k))
    canvas.pen.rectangle((0, horizon, s, s * 0.68), _shade((34, 120, 190), k))
    canvas.pen.rectangle((0, s * 0.68, s, s), _shade((236, 212, 156), k))


def _draw_forest(canvas: _Canvas, view: View) -> None:
    s, k = canvas.side, view.background_shade
    canvas.pen.rectangle((0, 0, s, s), _shade((176, 214, 196), k))
    for i in range(6):
        x, top = s * (i - 0.4 + 0.12 * view.scenery % 1) / 5, s * (0.06 + 0.1 * ((i * 5 + view.scenery) % 3))
        canvas.pen.polygon(
            [(x - s * 0.16, s * 0.86), (x, top), (x + s * 0.16, s * 0.86)],
            _shade((24, 92 + 14 * (i % 3), 48), k),
        )
    canvas.pen.rectangle((0, s * 0.84, s, s), _shade((96, 74, 44), k))


def _draw_city(canvas: _Canvas, view: View) -> None:
    s, k = canvas.side, view.background_shade
    canvas.pen.rectangle((0, 0, s, s), _shade((206, 214, 226), k))
    for i in range(5):
        x, top = s * i / 5, s * (0.1 + 0.12 * ((i * 3 + view.scenery) % 4))
        tone = _shade((92, 100, 120), k * (0.8 + 0.16 * ((i + view.scenery) % 3)))
        canvas.pen.rectangle((x, top, x + s / 5, s), tone)


def _draw_body(canvas: _Canvas, who: Identity, view: View) -> None:
    shirt = _shade(SHIRTS[view.shirt], view.shirt_shade)
    n = who.neck
    base = who.bottom
    body = np.array(
        [
            [-1.75, 2.6],
            [-1.5, base + 0.42],
            [-n - 0.1, base + 0.14],
            [n + 0.1, base + 0.14],
            [1.5, base + 0.42],
            [1.75, 2.6],
        ]
    )
    canvas.polygon(body, shirt, 0)
    canvas.polygon(
        np.array([[-n, 0.5], [n, 0.5], [n, base + 0.18], [0, base + 0.42], [-n, base + 0.18]]),
        _shade(who.skin, 0.8),
        0,
    )


def _draw_back_hair(canvas: _Canvas, who: Identity) -> None:
    if who.hair_style in ("bald", "short", "spiky"):
        return
    tone = _shade(_hair_tone(who), 0.86)
    wide, high = who.width + 0.1 + who.hair_volume, who.top + 0.06 + who.hair_volume
    if who.hair_style == "curly":
        for angle in np.linspace(-0.35, np.pi + 0.35, 13):
            canvas.oval(wide * np.cos(angle), -high * 0.95 * np.sin(angle), 0.3, 0.3, tone, depth=0)
        return
    t = np.linspace(0, np.pi, 16)
    end = 1.75 if who.hair_style == "long" else who.bottom * 0.62
    flare = 0.12 if who.hair_style == "long" else 0.2
    crown = np.stack([wide * np.cos(t), -high * np.sin(t)], 1)
    locks = np.array(
        [[-wide - flare, end * 0.8], [-wide * 0.92, end], [wide * 0.92, end], [wide + flare, end * 0.8]]
    )
    canvas.polygon(np.concatenate([crown, locks]), tone, 0)


def _draw_head(canvas: _Canvas, who: Identity) -> None:
    for side in (-1, 1):
        x = side * (who.width + 0.02)
        canvas.oval(x, who.ear_height, who.ear_size * 0.7, who.ear_size * 1.2, _shade(who.skin, 0.9), depth=0)
        canvas.oval(
            x, who.ear_height, who.ear_size * 0.35, who.ear_size * 0.7, _shade(who.skin, 0.72), depth=0
        )
    canvas.polygon(_outline(who), who.skin, 0)
    blush = _mix(who.skin, (226, 84, 84), who.cheeks)
    for side in (-1, 1):
        canvas.oval(side * who.width * 0.56, who.eye_height + 0.46, 0.17, 0.12, blush)
    if who.freckles:
        _draw_freckles(canvas, who)
    if who.mole is not None:
        canvas.oval(*who.mole, 0.065, 0.065, (58, 34, 28))


def _draw_freckles(canvas: _Canvas, who: Identity) -> None:
    tone = _mix(who.skin, (112, 52, 24), 0.55)
    for i, (x, y) in enumerate(((0.3, 0.26), (0.5, 0.2), (0.42, 0.36), (0.6, 0.34))):
        for side in (-1, 1):
            canvas.oval(side * x, who.eye_height + y + 0.02 * (i % 2), 0.034, 0.034, tone)


def _draw_front_hair(canvas: _Canvas, who: Identity) -> None:
    if who.hair_style == "bald":
        return
    tone, grow = (
        _hair_tone(who),
        {"short": 0.4, "spiky": 0.3}.get(who.hair_style, 0.8) * who.hair_volume + 0.03,
    )
    t = np.linspace(-0.12, np.pi + 0.12, 25)
    wide, high = who.width + grow * 0.6, who.top + grow
    lift = (
        np.where(np.arange(25) % 2 == 1, 0.22 + who.hair_volume * 0.5, 0.0) * np.sin(np.clip(t, 0, np.pi))
        if who.hair_style == "spiky"
        else 0.0
    )
    crown = np.stack([wide * np.cos(t), -(high + lift) * np.sin(t)], 1)
    x = np.linspace(-0.86, 0.86, 13)
    part = who.hairline_shape * np.abs(x - who.parting) / 0.9 + 0.1 * np.cos(4 * (x - who.parting))
    fringe = np.stack([x * who.width, -who.top * who.hairline + part * 0.8], 1)
    canvas.polygon(np.concatenate([crown, fringe]), tone, 0.25)
    if who.hair_style == "curly":
        for place in np.linspace(-0.8, 0.8, 6):
            canvas.oval(place * who.width, -who.top * who.hairline - 0.08, 0.2, 0.18, tone, depth=0.25)


def _draw_beard(canvas: _Canvas, who: Identity, mouth: float) -> None:
    tone = _shade(_hair_tone(who), 0.92)
    if who.beard == "beard":
        half = _outline(who)
        low = half[(half[:, 1] > who.eye_height + 0.3)] * (1.02, 1.05)
        left, right = low[0], low[-1]
        rim = np.array(
            [
                [right[0] * 0.8, mouth - 0.14],
                [0.26, mouth - 0.2],
                [-0.26, mouth - 0.2],
                [left[0] * 0.8, mouth - 0.14],
            ]
        )
        canvas.polygon(np.concatenate([low, rim if right[0] > 0 else rim * (-1, 1)]), tone, 0.15)
    if who.beard == "goatee":
        canvas.polygon(
            np.array(
                [
                    [-0.2, mouth + 0.1],
                    [0.2, mouth + 0.1],
                    [0.16, who.bottom * 1.04],
                    [-0.16, who.bottom * 1.04],
                ]
            ),
            tone,
            0.6,
        )
    if who.beard in ("moustache", "goatee"):
        w = who.mouth_width * 1.05
        canvas.polygon(
            np.array(
                [
                    [-w, mouth - 0.03],
                    [-0.1, mouth - 0.2],
                    [0.1, mouth - 0.2],
                    [w, mouth - 0.03],
                    [0, mouth - 0.06],
                ]
            ),
            tone,
        )


def _draw_mouth(canvas: _Canvas, who: Identity, view: View, y: float) -> None:
    w, lip, tone = who.mouth_width, who.lip_weight, who.lip_colour
    if view.expression == "surprised":
        canvas.oval(0, y + 0.06, w * 0.52, 0.17, tone)
        canvas.oval(0, y + 0.06, w * 0.52 - lip * 0.7, 0.17 - lip * 0.7, (62, 20, 24))
        return
    x = np.linspace(-1, 1, 9)
    bend = {"smiling": 0.17, "sad": -0.13}.get(view.expression, 0.0)
    curve = bend * (0.5 - x**2)
    if view.expression == "smiling":
        teeth = np.concatenate(
            [
                np.stack([x * w * 1.1, y - bend * 0.5 + 0 * x], 1),
                np.stack([x * w * 1.1, y + curve * 1.25], 1)[::-1],
            ]
        )
        canvas.polygon(teeth, (250, 248, 244))
    canvas.line(np.stack([x * w * (1.1 if bend > 0 else 1.0), y + curve], 1), tone, lip * 1.3)


def _draw_nose(canvas: _Canvas, who: Identity) -> float:
    tip = who.eye_height + who.nose_length
    w, tone = who.nose_width, _shade(who.skin, 0.74)
    if who.nose_style < 0.5:
        canvas.polygon(
            np.array([[0, tip - who.nose_length * 0.7], [w, tip], [-w, tip]]), _shade(who.skin, 0.84), 1.25
        )
        canvas.line(np.array([[-w, tip], [w, tip]]), tone, 0.05, 1.25)
    else:
        canvas.oval(0, tip - 0.05, w, 0.09, _shade(who.skin, 0.84), depth=1.25)
        for side in (-1, 1):
            canvas.oval(side * w * 0.5, tip, 0.045, 0.035, tone, depth=1.25)
    return tip


def _draw_eyes(canvas: _Canvas, who: Identity, view: View) -> None:
    wide = 1.25 if view.expression == "surprised" else 1.0
    rx, ry = who.eye_size, who.eye_size * who.eye_aspect * wide
    lift = {"surprised": 0.07, "sad": -0.01}.get(view.expression, 0.0)
    tilt = who.brow_tilt + (0.22 if view.expression == "sad" else 0.0)
    hair = _hair_tone(who) if who.hair_style != "bald" else (60, 44, 36)
    brow = _mix(hair, (40, 30, 26), 0.35)
    for side in (-1, 1):
        x, y = side * who.eye_spacing, who.eye_height
        canvas.oval(x, y, rx * 1.14, ry * 1.22, _shade(who.skin, 0.66), side * who.eye_tilt)
        canvas.oval(x, y, rx, ry, (246, 246, 244), side * who.eye_tilt)
        iris = min(rx, ry) * 0.94
        canvas.oval(x, y, iris * 0.8, iris * 0.9, who.eye_colour)
        canvas.oval(x, y, iris * 0.4, iris * 0.45, (12, 10, 10))
        along = np.array([-1.0, 0.0, 1.0]) * who.brow_length
        bow = np.array([0.0, -0.035, 0.0])
        high = y - ry - who.brow_height - lift
        canvas.line(np.stack([x + along, high + along * tilt * side + bow], 1), brow, who.brow_weight)


def _draw_glasses(canvas: _Canvas, who: Identity, view: View) -> None:
    if view.glasses == "no":
        return
    y, r = who.eye_height, min(who.eye_spacing * 0.86, 0.34)
    frame = (22, 20, 24)
    for side in (-1, 1):
        ring = _oval(side * who.eye_spacing, y, r, r * 0.86)
        if view.glasses == "sunglasses":
            canvas.polygon(ring, frame)
        canvas.line(np.concatenate([ring, ring[:2]]), frame, 0.075)
        canvas.line(np.array([[side * (who.eye_spacing + r), y], [side * who.width, y - 0.06]]), frame, 0.07)
    canvas.line(np.array([[-who.eye_spacing + r, y], [who.eye_spacing - r, y]]), frame, 0.075)


def _draw_shadow(canvas: _Canvas, who: Identity, view: View) -> None:
    """The side of the head that looks away from the light is a little darker."""
    outline = _outline(who)
    side = 1 if np.cos(view.light_angle) < 0 else -1
    edge = outline[outline[:, 0] * side >= who.width * 0.1]
    inner = edge[::-1] * (0.8 - 0.5 * abs(view.yaw), 0.97)
    if side < 0:
        canvas.polygon(np.concatenate([edge, inner]), _shade(who.skin, 0.9), 0)
        return
    order = np.argsort(edge[:, 1])
    canvas.polygon(np.concatenate([edge[order], inner[np.argsort(-inner[:, 1])]]), _shade(who.skin, 0.9), 0)


def _light(image: Pixels, view: View) -> Pixels:
    """A linear gradient of light over the whole picture, and the exposure."""
    size = image.shape[0]
    axis = np.linspace(-1, 1, size)
    ramp = np.cos(view.light_angle) * axis[None, :] + np.sin(view.light_angle) * axis[:, None]
    gain = view.exposure * (1 + view.light_strength * ramp / 1.4)
    return cast(Pixels, np.clip(image * gain[:, :, None] + 0.5, 0, 255).astype(np.uint8))


def draw(who: Identity, view: View, size: int = SIZE) -> Pixels:
    """The picture of `who` in `view`: uint8 [size, size, 3]."""
    canvas = _Canvas(who, view, size)
    _draw_background(canvas, view)
    _draw_back_hair(canvas, who)
    _draw_body(canvas, who, view)
    _draw_head(canvas, who)
    _draw_shadow(canvas, who, view)
    mouth = who.eye_height + who.nose_length + who.mouth_height
    mouth = min(mouth, who.bottom - 0.2)
    _draw_beard(canvas, who, mouth)
    _draw_mouth(canvas, who, view, mouth)
    _draw_front_hair(canvas, who)
    _draw_eyes(canvas, who, view)
    _draw_nose(canvas, who)
    _draw_glasses(canvas, who, view)
    return _light(np.asarray(canvas.image.reduce(_SUPERSAMPLE), dtype=np.uint8), view)


NIGHT = 0.35
"""The most light that a night shot has left."""


def at_night(pixels: Pixels, share: float, seed: int) -> Pixels:
    """Pictures uint8 [n, 3, s, s] with about `share` of them, drawn by `seed`, as night shots.

    The light that they have left is uniform from none to `NIGHT`. Photo collections have such pictures, and
    unconditional models need them: a network that never saw a dark picture cannot tell a dark signal from the noise.
    """
    rng = np.random.default_rng((11, seed))
    dim = rng.random(len(pixels)) < share
    light = np.where(dim, NIGHT * rng.random(len(pixels)), 1.0)
    return cast(Pixels, (pixels * light[:, None, None, None] + 0.5).astype(np.uint8))


def attributes(who: Identity, view: View) -> dict[str, str]:
    """What can be seen, one word each."""
    return {
        "hair_colour": "none" if who.hair_style == "bald" else who.hair_colour,
        "hair_style": who.hair_style,
        "beard": who.beard,
        "glasses": view.glasses,
        "expression": view.expression,
        "shirt": view.shirt,
        "background": view.background,
    }


def _face_phrase(facts: dict[str, str], style: bool, colour: bool, beard: bool) -> str:
    bald = facts["hair_style"] == "bald"
    words = [facts["hair_style"] if style else "", facts["hair_colour"] if colour else "", "hair"]
    parts = [" ".join(w for w in words if w)] if (style or colour) and not bald else []
    if beard and facts["beard"] != "none":
        parts.append(f"a {facts['beard']}")
    person = "bald person" if bald and (style or colour) else "person"
    return person + (" with " + " and ".join(parts) if parts else "")


def _place_phrase(background: str) -> str:
    return f"in front of the {background}" if background in SCENES else f"{background} background"


def describe(facts: dict[str, str], rng: np.random.Generator | None = None) -> str:
    """`attributes` in words. With `rng` the wording, the order and the attributes that are named vary."""

    def say(share: float) -> bool:
        return rng is None or bool(rng.random() < share)

    opening = "a photo of a" if rng is None else str(rng.choice(OPENINGS, p=_OPENING_WEIGHTS))
    if rng is not None and rng.random() < 0.12:
        return f"{opening} person"
    parts = [f"{opening} {_face_phrase(facts, say(0.8), say(0.8), say(0.8))}"]
    wearing = [facts["glasses"]] if facts["glasses"] != "no" and say(0.85) else []
    wearing += [f"a {facts['shirt']} shirt"] if say(0.6) else []
    parts += ["wearing " + " and ".join(wearing)] if wearing else []
    parts += [facts["expression"]] if facts["expression"] != "neutral" and say(0.8) else []
    parts += [_place_phrase(facts["background"])] if say(0.8) else []
    if rng is not None and len(parts) > 2:
        parts[1:] = [parts[1:][i] for i in rng.permutation(len(parts) - 1)]
    return ", ".join(parts)


def caption(who: Identity, view: View, rng: np.random.Generator | None = None) -> str:
    """What can be seen, in words; see `describe`."""
    return describe(attributes(who, view), rng)


OPENINGS = (
    "a photo of a",
    "a portrait of a",
    "a dslr portrait of a",
    "a close up photo of a",
    "a picture of a",
    "photo of a",
)
_OPENING_WEIGHTS = (0.5, 0.14, 0.1, 0.1, 0.1, 0.06)


def apply_edit(who: Identity, view: View, instruction: str) -> tuple[Identity, View]:
    """The face and view after the edit; unchanged where the edit already holds. `instruction` is a key of `EDITS`."""
    if instruction not in EDITS:
        raise ValueError(f"unknown edit {instruction!r}; choose from: {', '.join(EDITS)}")
    edit = EDITS[instruction]
    if edit.of == "view":
        return who, replace(view, **{edit.field: edit.value})  # type: ignore[arg-type]
    face = replace(who, **{edit.field: edit.value})  # type: ignore[arg-type]
    if edit.field == "hair_colour" and face.hair_style == "bald":
        face = replace(face, hair_style="short")
    return face, view


def is_change(who: Identity, view: View, instruction: str) -> bool:
    """Whether the edit alters what can be seen (a bald head has no hair to colour)."""
    if EDITS[instruction].field == "hair_colour" and who.hair_style == "bald":
        return False
    return apply_edit(who, view, instruction) != (who, view)


def _cache_folder() -> Path:
    return Path(os.environ.get("BENCH_MICRO_CACHE", str(Path.home() / ".cache" / "bench-micro")))


def _people(split: str, n: int, seed: int, views_per_identity: int) -> NDArray[np.int64]:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from: {', '.join(SPLITS)}")
    people = SPLITS[split]
    wanted = -(-n // views_per_identity)
    order = np.random.default_rng((7, seed)).permutation(len(people)) if seed else np.arange(len(people))
    chosen = np.asarray(people, dtype=np.int64)[order[np.arange(wanted) % len(people)]]
    return np.repeat(chosen, views_per_identity)[:n]


def _draw_dataset(people: NDArray[np.int64], size: int, seed: int) -> Drawn:
    pixels = np.empty((len(people), 3, size, size), dtype=np.uint8)
    captions, facts = [], []
    for row, index in enumerate(people):
        rng = np.random.default_rng((seed, row, int(index)))
        who, view = identity(int(index)), sample_view(rng)
        pixels[row] = draw(who, view, size).transpose(2, 0, 1)
        captions.append(caption(who, view, rng))
        facts.append(attributes(who, view))
    return Drawn(pixels, people, captions, facts)


def dataset(split: str, n: int, size: int = SIZE, seed: int = 0, views_per_identity: int = 8) -> Drawn:
    """The first `n` pictures of a split, `views_per_identity` in a row of each person.

    A pure function of its arguments; the drawing (about 3 ms a picture) is cached as an `.npz` in the folder
    `BENCH_MICRO_CACHE` (default `~/.cache/bench-micro`).
    """
    people = _people(split, n, seed, views_per_identity)
    file = _cache_folder() / f"v{VERSION}-{split}-{n}-{size}-{seed}-{views_per_identity}.npz"
    if file.exists():
        return _read_cached(file, people)
    drawn = _draw_dataset(people, size, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.stem}.{os.getpid()}.part.npz")
    keys = list(drawn.attributes[0]) if drawn.attributes else []
    table = np.array([[fact[k] for k in keys] for fact in drawn.attributes])
    np.savez(part, pixels=drawn.pixels, captions=np.array(drawn.captions), keys=np.array(keys), table=table)
    part.replace(file)
    return drawn


def _read_cached(file: Path, people: NDArray[np.int64]) -> Drawn:
    with np.load(file, allow_pickle=False) as data:
        keys = [str(k) for k in data["keys"]]
        facts = [dict(zip(keys, map(str, row), strict=True)) for row in data["table"]]
        return Drawn(data["pixels"], people, [str(c) for c in data["captions"]], facts)
