"""Identity score matching (Van Le et al., Anti-DreamBooth, ICCV 2023), with its traps mended.

The score of a generated picture is the cosine between its face's embedding and the subject's template. Differences
from the published code, each on purpose: reference embeddings are normalised before they are averaged, so no photo
weighs more than another; a picture without a face counts 0 in ``ism`` instead of being dropped, which would reward an
attack that fails (``ism_conditional`` is the published average over detected faces); the photos that were protected
are never part of the template; at least two recognisers judge, the first of which no defense may use.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import CustomizationEvidence, Evidence, Measurement, Row

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.faces import FaceRecogniser

NO_TEMPLATE = "no face was found in the subject's photos of sets A and C"
BATCH = 64
Scores = dict[str, list[Row]]


@plugin("metric", "ism", track=("customization",), primary=True,
        paper="Van Le et al., Anti-DreamBooth, ICCV 2023")
class IdentityScore:
    """Similarity of generated faces to the person: ``ism`` (cosine, 0 where no face is found), ``ism_conditional``
    (over found faces), ``fdfr`` (share without a face) and ``reid_rate`` (share above the threshold that lets 1 in
    1000 pairs of strangers pass).

    ``recognisers``: the first judges and is ranked, the others' scores carry their name (``ism@micro-face-2``). Names
    of embedded encoders, folders, ``dlib``, or ``insightface:<pack>@<detection size>``, whose sizes and file hashes
    stand in the protocol. The template is the mean of the unit embeddings of sets A
    and C, never of the protected set B.
    """

    recognisers: list[str] = field(default_factory=lambda: ["micro-face-3", "micro-face-2"])

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Four measurements per recogniser; intervals over subjects."""
        if not isinstance(evidence, CustomizationEvidence):
            raise BenchError("ism: needs the evidence of a customization cell.")
        if not self.recognisers or len(set(self.recognisers)) < len(self.recognisers):
            raise BenchError(f"ism: recognisers={self.recognisers}: name at least one, none twice.")
        from bench.faces import recogniser, recogniser_facts

        found: list[Measurement] = []
        for place, name in enumerate(self.recognisers):
            judge = recogniser(name)
            found += summarise(score(evidence, judge), recogniser_facts(name, judge), f"@{name}" if place else "")
        return found


def score(evidence: CustomizationEvidence, judge: FaceRecogniser) -> Scores:
    """Rows of each measurement, one per generated picture."""
    import torch

    from bench.faces import threshold_of

    threshold = threshold_of(judge)
    scores: Scores = {"ism": [], "ism_conditional": [], "fdfr": [], "reid_rate": []}
    for subject in evidence.subjects:
        drawn = evidence.generated[subject.name].images
        known = template(*_embed(judge, torch.cat([subject.clean.pixels, subject.held_out.pixels])))
        embeddings, found = _embed(judge, drawn.pixels)
        samples = [f"{subject.name}/{name}" for name in drawn.names]
        for name, rows in picture_rows(samples, subject.name, embeddings, found, known, threshold).items():
            scores[name] += rows
    return scores


def _embed(judge: FaceRecogniser, pixels: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    from bench.diffusion.images import to_unit

    with torch.no_grad():
        parts = [judge.embed(to_unit(pixels[i:i + BATCH])) for i in range(0, len(pixels), BATCH)]
    return torch.cat([e for e, _ in parts]).double(), torch.cat([f for _, f in parts])


def template(embeddings: Tensor, found: Tensor) -> Tensor | None:
    """The unit mean [d] of the unit embeddings [n, d] of photos in which a face was found; None if there is none."""
    from torch.nn.functional import normalize

    if not found.any():
        return None
    return normalize(normalize(embeddings[found], dim=1).mean(0), dim=0)


def picture_rows(
    samples: list[str], subject: str, embeddings: Tensor, found: Tensor, known: Tensor | None, threshold: float | None,
) -> Scores:
    """The rows of one subject's pictures: embeddings [n, d], found bool [n], template [d]."""
    from torch.nn.functional import normalize

    seen = found.tolist()
    fdfr = [Row(s, subject, float(not yes)) for s, yes in zip(samples, seen, strict=True)]
    if known is None:
        lost = [Row(s, subject, None, NO_TEMPLATE) for s in samples]
        return {"ism": lost, "ism_conditional": lost, "fdfr": fdfr, "reid_rate": lost}
    cosines = (normalize(embeddings, dim=1) @ known).tolist()
    rows = list(zip(samples, seen, cosines, strict=True))
    return {
        "ism": [Row(s, subject, cosine if yes else 0.0) for s, yes, cosine in rows],
        "ism_conditional": [Row(s, subject, cosine) if yes else Row(s, subject, None, "no face found")
                            for s, yes, cosine in rows],
        "fdfr": fdfr,
        "reid_rate": [_reid(s, subject, cosine if yes else None, threshold) for s, yes, cosine in rows],
    }


def _reid(sample: str, subject: str, cosine: float | None, threshold: float | None) -> Row:
    if threshold is None:
        return Row(sample, subject, None, "the recogniser has no calibrated threshold")
    return Row(sample, subject, float(cosine is not None and cosine >= threshold))


def summarise(scores: Scores, facts: dict[str, Any], suffix: str) -> list[Measurement]:
    """Means over pictures with intervals over subjects; low similarity is the defender's success."""
    from bench.measuring import mean_of

    better = {"ism": False, "ism_conditional": False, "fdfr": True, "reid_rate": False}
    units = {"ism": "cosine", "ism_conditional": "cosine", "fdfr": "share", "reid_rate": "share"}
    return [mean_of(name + suffix, rows, units[name], better[name], facts) for name, rows in scores.items()]
