"""Does the picture move the way the words do? CLIP's directional similarity, for photos whose right edit nobody knows.

Gal et al., "StyleGAN-NADA", ACM TOG 2022 (its directional loss): the cosine between the difference of two pictures'
embeddings and the difference of two captions' embeddings, by which InstructPix2Pix (Brooks et al., CVPR 2023) scores
edits. Embeddings are scaled to unit length before they are subtracted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.plugin import plugin
from bench.records import Evidence, Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context

STILL = "both captions say the same to the judge"
STANDING = 1e-5
"""Differences of unit vectors below this are rounding."""


@plugin("metric", "edit_direction", track=("editing",), paper="Gal et al., StyleGAN-NADA, ACM TOG 2022; Brooks et al., "
        "InstructPix2Pix, CVPR 2023", official_code="https://github.com/timothybrooks/instruct-pix2pix")
class EditDirection:
    """``edit_direction``: cosine between how the picture differs from the original photo and how the wanted caption
    differs from the photo's, as the protocol's judge sees them (``editing.judge``); 0 for the photo itself.
    ``edit_direction@benign``: the same of the editor's picture of the original.

    A ruined picture has moved, too, but hardly in the words' direction. Values of different judges must not be
    compared.
    """

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Means over pictures with intervals over photos."""
        import torch

        from bench.features import clip
        from bench.measuring import edit_rows, mean_of, require_edits

        shown = require_edits(evidence, "edit_direction")
        judge, edits = clip(shown.judge, ctx.device), [task.edit for task in shown.tasks]
        words = delta(judge.texts([e.source for e in edits]), judge.texts([e.target for e in edits]))
        before = judge.images(torch.cat([task.subject.published.pixels for task in shown.tasks]))
        found = []
        for suffix, better, drawn in (("", False, shown.edited), ("@benign", None, shown.benign)):
            moved = delta(before.repeat_interleave(shown.seeds, 0), judge.images(drawn.images.pixels))
            values = directions(moved, words.repeat_interleave(shown.seeds, 0))
            rows = edit_rows(shown, values, STILL)
            found.append(mean_of(f"edit_direction{suffix}", rows, "cosine", better, judge.facts))
        return found


def delta(before: Tensor, after: Tensor) -> Tensor:
    """The difference of embeddings [n, d] at unit length, before to after."""
    from torch.nn.functional import normalize

    return normalize(after, dim=1) - normalize(before, dim=1)


def directions(moved: Tensor, words: Tensor) -> list[float | None]:
    """The cosine of each row of ``moved`` [n, d] with the same row of ``words`` [n, d]: 0 where nothing moved, None
    where the words do not differ."""
    from torch.nn.functional import cosine_similarity

    cosines = cosine_similarity(moved, words, dim=1) * (moved.norm(dim=1) > STANDING)
    differ = (words.norm(dim=1) > STANDING).tolist()
    return [cosine if different else None for cosine, different in zip(cosines.tolist(), differ, strict=True)]
