"""Control: no defense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from bench.context import Context
    from bench.records import ImageSet, Model, Secret, Subject


@plugin("defense", "none", control=True)
class NoDefense:
    """Control: photos are published and models are used as they are."""

    def budget(self) -> Budget:
        return Budget(0)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        return [subject.published for subject in subjects]

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        return suspicious
