"""Quality of the generated pictures by themselves: has a defense won by ruining every picture?

Many defenses against customisation do not hide the person, they make the attacker's pictures noisy or textured; an
identity score alone cannot show that. Worse pictures are the aim of such defenses and the failure of those that
replace the identity, so neither direction is called better here: the numbers are to be read beside ``ism``. Those of
edits are to be read beside ``edit_success``: a defense that ruins pictures has not kept anybody from editing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.options import require
from bench.plugin import plugin
from bench.records import CustomizationEvidence, EditingEvidence, Evidence, ImageSet, Measurement, Row, Subject

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.naturalness import Gaussian


@plugin("metric", "no_reference_quality", track=("customization", "editing"),
        paper="Mittal et al., Making a 'Completely Blind' Image Quality Analyzer, IEEE Signal Processing Letters 2013")
class NoReferenceQuality:
    """Quality of the attacker's pictures by themselves: ``niqe`` and ``total_variation``, to be read beside ``ism`` or
    ``edit_success``.

    ``niqe``: higher is less like clean photos of this data; ``niqe_photos``: the same of the photos before protection,
    for comparison; ``total_variation``: relative to the subject's clean photos, 1 is as much texture. Of edits also
    ``niqe_rise``, the edited picture's minus that of the benign edit with the same seed, and ``total_variation`` is
    relative to that edit. NIQE's model of clean pictures is fitted to sets A and C of all subjects, or to the photos
    before protection where there are no such sets, so its values hold for this data only. ``patch``: side of NIQE's
    patches in pixels; 0: the paper's 96, less on small pictures (16 at 64 pixels). Noise and blur raise NIQE steadily;
    blocks of strong JPEG compression hardly do.
    """

    patch: int = 0

    def __post_init__(self) -> None:
        require("patch", self.patch, 0, where="metrics.no_reference_quality")

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Means over pictures with intervals over subjects."""
        from bench.measuring import require_photos

        shown = require_photos(evidence, "no_reference_quality")
        if isinstance(shown, EditingEvidence):
            return [*self._niqe(shown, [task.subject for task in shown.tasks]), texture_of_edits(shown)]
        return [*self._niqe(shown, shown.subjects), texture(shown)]

    def _niqe(self, evidence: CustomizationEvidence | EditingEvidence, people: Sequence[Subject]) -> list[Measurement]:
        from bench.measuring import mean_of, missing
        from bench.naturalness import FEWEST, SHARP, patch_size

        known, where = clean_photos(people)
        patch = self.patch or patch_size(*known[0].shape[2:])
        clean = clean_model(known, patch)
        facts: dict[str, Any] = {"patch": patch, "overlap": "half", "scales": 2, "sharpness": SHARP,
                                 "clean": where, "clean_patches": clean.count}
        if clean.count < FEWEST:
            names = ["niqe", *(["niqe_rise"] if isinstance(evidence, EditingEvidence) else []), "niqe_photos"]
            reason = f"{clean.count} sharp patches in the clean photos; NIQE's model needs {FEWEST}, so more photos"
            return [missing(name, [], "distance", None, facts, reason) for name in names]
        found = edits_rows(evidence, clean, patch) if isinstance(evidence, EditingEvidence) else {
            "niqe": niqe_rows({s.name: evidence.generated[s.name].images for s in people}, clean, patch)}
        found["niqe_photos"] = niqe_rows({s.name: s.published for s in people}, clean, patch)
        return [mean_of(name, rows, "distance", None, facts) for name, rows in found.items()]


def clean_photos(people: Sequence[Subject]) -> tuple[list[Tensor], str]:
    """Pixels of each subject's photos that nobody protects, and in words which these are."""
    import torch

    if any(len(s.clean) + len(s.held_out) for s in people):
        return [torch.cat([s.clean.pixels, s.held_out.pixels]) for s in people], "sets A and C of all subjects"
    return [s.published.pixels for s in people], "the photos before protection"


def clean_model(photos: Sequence[Tensor], patch: int) -> Gaussian:
    """NIQE's Gaussian over the sharp patches of all subjects' photos, uint8 [n, 3, h, w] each."""
    import numpy as np

    from bench.naturalness import features, fit

    parts = [features(pixels.numpy(), patch) for pixels in photos]
    return fit(np.concatenate([numbers for numbers, _ in parts]), np.concatenate([sharp for _, sharp in parts]))


def edits_rows(evidence: EditingEvidence, clean: Gaussian, patch: int) -> dict[str, list[Row]]:
    """NIQE of the edited pictures, and what it is above that of the benign ones from the same seeds."""
    from bench.measuring import edit_rows
    from bench.naturalness import scores

    now, usual = (scores(drawn.images.pixels.numpy(), clean, patch) for drawn in (evidence.edited, evidence.benign))
    return {"niqe": edit_rows(evidence, now),
            "niqe_rise": edit_rows(evidence, [one - other for one, other in zip(now, usual, strict=True)])}


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


def texture_of_edits(evidence: EditingEvidence) -> Measurement:
    """Total variation of each edited picture, over that of the benign edit from the same seed."""
    from bench.measuring import edit_rows, mean_of

    now, usual = (variation(drawn.images.pixels).tolist() for drawn in (evidence.edited, evidence.benign))
    shares = [one / other if other else None for one, other in zip(now, usual, strict=True)]
    rows = edit_rows(evidence, shares, "the benign edit is flat")
    return mean_of("total_variation", rows, "x benign edit", None, {"norm": "anisotropic", "of": "the benign edit"})


def _incomparable(drawn: Tensor, clean: Tensor, usual: float) -> str:
    if drawn.shape[2:] != clean.shape[2:]:
        return "the pictures have another size than the photos"
    return "" if usual else "the clean photos are flat"


def variation(pixels: Tensor) -> Tensor:
    """Total variation of pictures uint8 [n, 3, h, w]: sum of absolute differences of neighbours in levels, [n]."""
    from torchmetrics.functional.image import total_variation

    found: Tensor = total_variation(pixels.double(), reduction="none")
    return found
