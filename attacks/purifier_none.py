"""Control: the attacker uses the photos as published."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.plugin import plugin

if TYPE_CHECKING:
    from bench.context import Context
    from bench.records import ImageSet, Model


@plugin("purifier", "none", control=True)
class NoPurifier:
    """Control: the attacker uses the photos as published."""

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet:
        return photos
