"""What face recognisers still see of the person in the photos as the attacker uses them.

DLADiff's tables call it ISM_pro: the similarity of the protected photo to the original. Zero-shot attackers feed on
exactly this, so it tells how much of a protection against them is in the file, and for whom: the encoders that a
defense optimised against, and the judge that none has seen.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import Evidence, ImageSet, Measurement, Row

if TYPE_CHECKING:
    from bench.context import Context
    from bench.faces import FaceRecogniser


@plugin("metric", "photo_identity", track=("customization", "editing"), paper="DLADiff, arXiv:2511.19910 (ISM_pro)")
class PhotoIdentity:
    """``photo_ism``: cosine between the embeddings of each photo as the attacker uses it (protected, then purified) and
    as it was; 0 where no face is found in it.

    ``recognisers``: the first is the judge; the others' scores carry their name. Embedded encoders, folders, ``dlib``
    or ``insightface:<pack>``.
    """

    recognisers: list[str] = field(default_factory=lambda: ["micro-face-3", "micro-face-1", "micro-face-2"])

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """One measurement per recogniser; means over photos, intervals over subjects."""
        from bench.faces import recogniser, recogniser_facts
        from bench.measuring import mean_of, photo_pairs, require_photos

        pairs = photo_pairs(require_photos(evidence, "photo_identity"), "purified")
        if not self.recognisers or len(set(self.recognisers)) < len(self.recognisers):
            raise BenchError(f"photo_identity: recognisers={list(self.recognisers)}: name at least one, none twice.")
        found = []
        for place, name in enumerate(self.recognisers):
            judge = recogniser(name)
            rows = [row for person, before, after in pairs for row in compare(person, before, after, judge)]
            title = f"photo_ism@{name}" if place else "photo_ism"
            found.append(mean_of(title, rows, "cosine", False, recogniser_facts(name, judge)))
        return found


def compare(subject: str, before: ImageSet, after: ImageSet, judge: FaceRecogniser) -> list[Row]:
    """One row per photo; without a value where the original itself shows no face to this recogniser."""
    import torch
    from torch.nn.functional import normalize

    from bench.diffusion.images import to_unit

    with torch.no_grad():
        (was, known), (now, seen) = (judge.embed(to_unit(photos.pixels)) for photos in (before, after))
    cosines = (normalize(was.double(), dim=1) * normalize(now.double(), dim=1)).sum(1).tolist()
    return [
        Row(f"{subject}/{name}", subject, (value if visible else 0.0) if had else None,
            "" if had else "no face was found in the original")
        for name, value, had, visible in zip(after.names, cosines, known.tolist(), seen.tolist(), strict=True)
    ]
