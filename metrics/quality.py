"""Quality of the generated pictures by themselves: has a defense won by ruining every picture?

Many defenses against customisation do not hide the person, they make the attacker's pictures noisy or textured; an
identity score alone cannot show that. Worse pictures are the aim of such defenses and the failure of those that
replace the identity, so neither direction is called better here: the numbers are to be read beside ``ism``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import CustomizationEvidence, Evidence, ImageSet, Measurement, Row, Subject

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.naturalness import Gaussian


@plugin("metric", "no_reference_quality", track=("customization",),
        paper="Mittal et al., Making a 'Completely Blind' Image Quality Analyzer, IEEE Signal Processing Letters 2013")
class NoReferenceQuality:
    """Quality of the generated pictures by themselves: ``niqe`` and ``total_variation``, to be read beside ``ism``.

    ``niqe``: higher is less like clean photos of this data; ``niqe_photos``: the same of the original set B, for
    comparison; ``total_variation``: relative to the subject's clean photos, 1 is as much texture. NIQE's model of
    clean pictures is fitted to sets A and C of all subjects, so its values hold for this data only. ``patch``: side of
    NIQE's patches in pixels; 0: the paper's 96, less on small pictures (16 at 64 pixels). Noise and blur raise NIQE
    steadily; blocks of strong JPEG compression hardly do.
    """

    patch: int = 0

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Means over pictures with intervals over subjects."""
        if not isinstance(evidence, CustomizationEvidence):
            raise BenchError("no_reference_quality: needs the evidence of a customization cell.")
        return [*self._niqe(evidence), texture(evidence)]

    def _niqe(self, evidence: CustomizationEvidence) -> list[Measurement]:
        from bench.measuring import mean_of, missing
        from bench.naturalness import FEWEST, SHARP, patch_size

        photos = evidence.subjects[0].clean.pixels
        patch = self.patch or patch_size(*photos.shape[2:])
        clean = clean_model(evidence.subjects, patch)
        facts: dict[str, Any] = {"patch": patch, "overlap": "half", "scales": 2, "sharpness": SHARP,
                                 "clean": "sets A and C of all subjects", "clean_patches": clean.count}
        drawn = {s.name: evidence.generated[s.name].images for s in evidence.subjects}
        published = {s.name: s.published for s in evidence.subjects}
        if clean.count < FEWEST:
            reason = f"{clean.count} sharp patches in the clean photos; NIQE's model needs {FEWEST}, so more photos"
            return [missing(name, [], "distance", None, facts, reason) for name in ("niqe", "niqe_photos")]
        return [mean_of("niqe", niqe_rows(drawn, clean, patch), "distance", None, facts),
                mean_of("niqe_photos", niqe_rows(published, clean, patch), "distance", None, facts)]


def clean_model(subjects: tuple[Subject, ...], patch: int) -> Gaussian:
    """NIQE's Gaussian over the sharp patches of all subjects' sets A and C."""
    import numpy as np
    import torch

    from bench.naturalness import features, fit

    parts = [features(torch.cat([s.clean.pixels, s.held_out.pixels]).numpy(), patch) for s in subjects]
    return fit(np.concatenate([numbers for numbers, _ in parts]), np.concatenate([sharp for _, sharp in parts]))


def niqe_rows(pictures: dict[str, ImageSet], clean: Gaussian, patch: int) -> list[Row]:
    """One row per picture of each subject."""
    from bench.naturalness import scores

    return [Row(f"{subject}/{name}", subject, value) for subject, images in pictures.items()
            for name, value in zip(images.names, scores(images.pixels.numpy(), clean, patch), strict=True)]


def texture(evidence: CustomizationEvidence) -> Measurement:
    """Total variation of each generated picture, over the mean of the subject's clean photos (sets A and C)."""
    import torch

    from bench.measuring import mean_of

    rows: list[Row] = []
    for subject in evidence.subjects:
        drawn = evidence.generated[subject.name].images
        clean = torch.cat([subject.clean.pixels, subject.held_out.pixels])
        usual = float(variation(clean).mean())
        if reason := _incomparable(drawn.pixels, clean, usual):
            rows += [Row(f"{subject.name}/{name}", subject.name, None, reason) for name in drawn.names]
            continue
        rows += [Row(f"{subject.name}/{name}", subject.name, value / usual)
                 for name, value in zip(drawn.names, variation(drawn.pixels).tolist(), strict=True)]
    return mean_of("total_variation", rows, "x clean photos", None, {"norm": "anisotropic", "of": "sets A and C"})


def _incomparable(drawn: Tensor, clean: Tensor, usual: float) -> str:
    if drawn.shape[2:] != clean.shape[2:]:
        return "the pictures have another size than the photos"
    return "" if usual else "the clean photos are flat"


def variation(pixels: Tensor) -> Tensor:
    """Total variation of pictures uint8 [n, 3, h, w]: sum of absolute differences of neighbours in levels, [n]."""
    from torchmetrics.functional.image import total_variation

    found: Tensor = total_variation(pixels.double(), reduction="none")
    return found
