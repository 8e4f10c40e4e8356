"""Checks of a plugin's options that several plugins share; imports no torch, runs before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from bench.errors import BenchError, unknown

JUDGE = "micro-face-3"
"""The face encoder that scores; no defense may optimise against it."""


class Variant(Enum):
    """``described``: what a paper says. ``released``: what its code does, where the two differ."""

    described = "described"
    released = "released"


def variant(chosen: Variant | str) -> Variant:
    """The variant of a defense by name; refuses others."""
    try:
        return Variant(chosen)
    except ValueError:
        raise unknown("variant", str(chosen), "defense.variant", [v.value for v in Variant]) from None


def require(name: str, value: float, low: float, exclusive: bool = False, where: str = "defense") -> None:
    """Refuse an option that is below ``low`` (or at it, if ``exclusive``)."""
    if value < low or (exclusive and value == low):
        bound = "more than" if exclusive else "at least"
        raise BenchError(f"{where}.{name}={value} is out of range; give {bound} {low}.")


def require_all(plugin: object, above: dict[str, float] | None = None, least: dict[str, float] | None = None) -> None:
    """``above``: options of a defense that must exceed a bound; ``least``: those that must reach one."""
    for name, low in (above or {}).items():
        require(name, getattr(plugin, name), low, exclusive=True)
    for name, low in (least or {}).items():
        require(name, getattr(plugin, name), low)


TRAINING = {"epochs": 1, "steps": 1, "batch": 1, "lr": 0, "warmup": 0, "grad_clip": 0}
"""Options of training runs (`bench.diffusion.training.Plan`) and their least values; lr must exceed its."""


def check_training(plugin: object, where: str = "defense") -> None:
    """Refuse what no training run can use, before any work starts; ``None`` leaves an option open."""
    for name, low in TRAINING.items():
        if getattr(plugin, name, None) is not None:
            require(name, getattr(plugin, name), low, exclusive=name == "lr", where=where)


def check_encoders(names: Sequence[str]) -> None:
    """Refuse an empty or repeated list of a defense's encoders, and the judge among them."""
    if not names or len(set(names)) < len(names):
        raise BenchError(f"defense.encoders={list(names)}: name at least one encoder, none twice.")
    if JUDGE in names:
        raise BenchError(f"defense.encoders: {JUDGE} is the judge; it scores, and no defense may use it. Take "
                         "micro-face-1 or micro-face-2.")


REPAIR_DATA = ("synthetic", "real")


class RepairOptions(Protocol):
    """Fields of a defense that repairs by distillation (`bench.diffusion.distilling`).

    ``repair_data``: ``synthetic`` (``synthetic_images`` samples of the suspicious model, drawn by
    ``synthetic_sampler`` in ``synthetic_steps`` steps) or ``real`` (``real_share`` of the defender's images).
    ``steps``: number of updates, None for ``epochs`` passes. ``distill``: weight w of the teacher's term.
    ``ema``: largest decay of the averaged weights, which are what is kept; 0 for the last ones.
    """

    repair_data: str
    real_share: float
    synthetic_images: int
    synthetic_sampler: str
    synthetic_steps: int
    epochs: int
    steps: int | None
    batch: int
    lr: float
    distill: float
    ema: float
    grad_clip: float
    mixed_precision: bool


def check_repair(options: RepairOptions) -> None:
    """Refuse settings that cannot work, before any work starts."""
    if options.repair_data not in REPAIR_DATA:
        raise unknown("repair_data", options.repair_data, "defense.repair_data", REPAIR_DATA)
    require_all(options, above={"real_share": 0, "lr": 0}, least={
        "synthetic_images": 1, "synthetic_steps": 1, "epochs": 1, "batch": 1, "distill": 0, "ema": 0, "grad_clip": 0})
    require("steps", 1 if options.steps is None else options.steps, 1)
    if options.real_share > 1 or options.ema >= 1:
        raise BenchError(f"defense.real_share={options.real_share}, defense.ema={options.ema}: give a share of at "
                         "most 1 and a decay below 1.")
