"""Perceptual distance of protected photos to their originals: of CLIP features on the core install, or real LPIPS.

The form is that of Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
equation 1: features of several layers, scaled to unit length at every place, their squared difference averaged over
places and summed over channels. Equation 1 weighs channels by a vector learned from people's judgements; LPIPS is the
distance with the published weights, here from the package ``lpips``. ``feature_distance`` has no learned weights (all
one) and averages over layers, in a vision transformer whose patches are the places. It is not LPIPS, and no study says
how it agrees with people: compare it only with itself, on the same extractor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.plugin import plugin
from bench.records import Evidence, Measurement, Row

if TYPE_CHECKING:
    from bench.context import Context


@plugin("metric", "perceptual", track=("customization", "editing"),
        paper="Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018",
        official_code="https://github.com/richzhang/PerceptualSimilarity")
class Perceptual:
    """How visible protection is: ``feature_distance`` (of CLIP features) or ``lpips`` to the original; 0 is the same.

    ``network``: micro-clip or the folder of a CLIPModel gives ``feature_distance``; alex or vgg gives ``lpips``, which
    needs the packages lpips and torchvision (the extra ``gpu``) and their ImageNet weights, fetched at first use.
    Photos are compared at their own size by LPIPS, at the model's by CLIP.
    """

    network: str = "micro-clip"

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """One mean over published photos; the interval is over subjects."""
        from bench.measuring import mean_of, photo_pairs, require_photos
        from bench.picture_distance import deep_distance, distances

        pairs = photo_pairs(require_photos(evidence, "perceptual"), "protected")
        name, distance, facts = deep_distance(self.network, ctx.device)
        rows = [Row(f"{person}/{photo}", person, value) for person, before, after in pairs
                for photo, value in zip(after.names, distances(before.pixels, after.pixels, distance), strict=True)]
        return [mean_of(name, rows, "distance", False, facts)]
