"""Checks of a plugin's options that several plugins share; imports no torch, runs before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

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


def check_encoders(names: Sequence[str]) -> None:
    """Refuse an empty or repeated list of a defense's encoders, and the judge among them."""
    if not names or len(set(names)) < len(names):
        raise BenchError(f"defense.encoders={list(names)}: name at least one encoder, none twice.")
    if JUDGE in names:
        raise BenchError(f"defense.encoders: {JUDGE} is the judge; it scores, and no defense may use it. Take "
                         "micro-face-1 or micro-face-2.")
