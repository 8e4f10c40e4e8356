"""What one plugin is tested with, and how a check says that it failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.plugin import Facts, facts_of

Check = Callable[["Case", Path], None]
"""``check(case, folder)`` raises AssertionError; ``folder`` is empty and its own."""


@dataclass(frozen=True)
class Case:
    """A plugin's class under test. ``options``: those that make it fast on tiny models. ``apart``: of defenses of
    photos, whether a photo's protection depends on that photo alone. ``negative``: options that may be below zero.
    ``bad``: option -> values that must be refused."""

    cls: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False
    negative: Sequence[str] = ()
    bad: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def make(self, **changes: Any) -> Any:
        """An instance with the case's options, and changes of them."""
        return self.cls(**{**self.options, **changes})

    @property
    def facts(self) -> Facts:
        """Those of an instance: they may depend on its options."""
        return facts_of(self.make())

    @property
    def name(self) -> str:
        return facts_of(self.cls).name

    @property
    def has_eps(self) -> bool:
        return "eps" in getattr(self.cls, "__dataclass_fields__", {})


def expect(holds: bool, advice: str) -> None:
    """Fail a check with what to do about it."""
    if not holds:
        raise AssertionError(advice)
