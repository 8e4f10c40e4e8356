"""Did the attacker get the edit, and of this person? The figure that ranks defenses against edits.

A protected photo can fail the attacker in two ways: the picture does not show what was asked, or it no longer shows the
person. Measures of shift reward both, and most of all a ruined picture (`edit_shift`); here each is asked by itself. A
judge that no defense uses, a CLIP model, is given the captions of the photo with every value that the edited attribute
can have: the edit reads as asked where the wanted caption fits the picture best. A held-out face recogniser compares
the picture with the original photo. The attacker succeeded where both hold. A recogniser may take for somebody else
whoever changes hair, so a person who was asked to is also known by the right answer, in a world where it is known: on
60 right answers of the drawn world, micro-face-3 knows 3 of 18 changes of hair by the original photo, and 38 of 42
other ones. How to read the parts:

* attribute high, identity high: the edit went through.
* attribute low, identity high: the editor was kept from editing, the photo is intact.
* attribute high, identity low: the edit was done to somebody else. No harm to this person, no use to her either.
* both low: with a low quality (`no_reference_quality`, `kid`) the picture was destroyed.

Judges err, so they are judged: on the benign edits (what the editor can do at all), on the world's right answers where
it knows them (what the judges concede at most), and on the photos themselves (how often they see an edit that nobody
made).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import EditingEvidence, EditTask, Evidence, Generations, Measurement, Row

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.faces import FaceRecogniser
    from bench.features import Clip

Values = list[float | None]
Rows = dict[str, list[Row]]
NO_FACE = "no face was found in the original photo"
NO_THRESHOLD = "the recogniser has no calibrated threshold; set edit_success.threshold"
NO_ANSWER = "the right answer is not known"
UNITS = {"edit_success": "share", "edit_attribute": "share", "edit_identity": "cosine", "edit_identity_rate": "share"}
BATCH = 64


@plugin("metric", "edit_success", track=("editing",), primary=True)
class EditSuccess:
    """``edit_success``: share of pictures that read as asked and still show the person. Its parts: ``edit_attribute``
    (reads as asked), ``edit_identity`` (cosine to the face of the original photo, or of the right answer where that is
    known and nearer; 0 where no face is found) and ``edit_identity_rate`` (cosine at or above the recogniser's
    threshold, which 1 in 1000 pairs of strangers reach).

    ``@benign``: of the editor's pictures of the original photos. ``@answer``: of the right answers, the judges' own
    ceiling. ``edit_attribute@photo``: of the original photos, where reading as asked is the judge's error. The caption
    judge is the protocol's (``editing.judge``). ``recognisers``: the first counts, others' figures carry their name;
    embedded encoders, folders, ``dlib`` or ``insightface:<pack>``. ``threshold``: of recognisers whose files state
    none (InsightFace's do not); without it these give no ``edit_success``.
    """

    recognisers: list[str] = field(default_factory=lambda: ["micro-face-3", "micro-face-2"])
    threshold: float | None = None

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Means over pictures with intervals over photos."""
        from bench.faces import recogniser
        from bench.features import clip
        from bench.measuring import require_edits

        shown = require_edits(evidence, "edit_success")
        if not self.recognisers or len(set(self.recognisers)) < len(self.recognisers):
            raise BenchError(f"edit_success: recognisers={list(self.recognisers)}: name at least one, none twice.")
        captions = CaptionJudge(clip(shown.judge, ctx.device))
        first, *others = (self._face_judge(name, recogniser(name)) for name in self.recognisers)
        drawn = edits_of(shown, shown.edited)
        reads = captions.reads(drawn)
        found = summarise(judged(drawn, reads, first), captions, first)
        for face in others:
            rows = judged(drawn, reads, face)
            rows.pop("edit_attribute")  # no face in it
            found += summarise(rows, captions, face, f"@{face.name}")
        return [*found, *references(shown, captions, first)]

    def _face_judge(self, name: str, judge: FaceRecogniser) -> FaceJudge:
        from bench.faces import recogniser_facts, threshold_of

        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise BenchError(f"edit_success: threshold={self.threshold} is out of range; give a cosine above 0, at "
                             "most 1.")
        own = threshold_of(judge)
        limit = self.threshold if own is None else own
        facts = {**recogniser_facts(name, judge), "threshold": limit, "against": "photo, or the known answer if nearer"}
        return FaceJudge(name, judge, limit, facts)


@dataclass(frozen=True)
class Pictures:
    """Pictures to be judged, uint8 [n, 3, h, w], with the name and the task of each."""

    pixels: Tensor
    names: tuple[str, ...]
    tasks: tuple[EditTask, ...]

    def rows(self, values: Values, reason: str = "") -> list[Row]:
        return [Row(name, task.subject.name, value, reason if value is None else "")
                for name, task, value in zip(self.names, self.tasks, values, strict=True)]


@dataclass(frozen=True)
class CaptionJudge:
    """Which caption fits a picture best, by a CLIP model."""

    model: Clip

    def reads(self, pictures: Pictures) -> list[float]:
        """1 where the target fits a picture better than all other captions, else 0."""
        from torch.nn.functional import normalize

        rivals = [captions_of(task) for task in pictures.tasks]
        known = list(dict.fromkeys(caption for captions in rivals for caption in captions))
        scores = normalize(self.model.images(pictures.pixels), dim=1) @ normalize(self.model.texts(known), dim=1).T
        found = []
        for row, captions in zip(scores, rivals, strict=True):
            target, *others = (float(row[known.index(caption)]) for caption in captions)
            found.append(float(target > max(others)))
        return found


def captions_of(task: EditTask) -> tuple[str, ...]:
    """The wanted caption first, then those of the attribute's other values."""
    if not task.edit.others or task.edit.target in task.edit.others:
        raise BenchError(f"edit_success: the edit '{task.edit.instruction}' of {task.subject.name} needs captions of "
                         "other outcomes than its target, and the target must not be among them.")
    return (task.edit.target, *task.edit.others)


@dataclass(frozen=True)
class FaceJudge:
    """A recogniser, its name and facts, and from which cosine on it takes two faces for one person."""

    name: str
    recogniser: FaceRecogniser
    threshold: float | None
    facts: dict[str, Any]

    def cosines(self, pictures: Pictures) -> Values:
        """Of each picture to the nearer of the photo that it was made of and the right answer; 0 without a face, None
        where the photo has none."""
        import torch

        now, seen = self._embed(pictures.pixels)
        was, known = self._embed(originals(pictures.tasks))
        right, there = self._embed(wanted(pictures.tasks))
        wished = torch.where(there, (now * right).sum(1), -1.0)
        values = torch.maximum((now * was).sum(1), wished).tolist()
        return [(value if visible else 0.0) if had else None
                for value, visible, had in zip(values, seen.tolist(), known.tolist(), strict=True)]

    def _embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings [n, d], and whether there was a face, [n]."""
        import torch
        from torch.nn.functional import normalize

        from bench.diffusion.images import to_unit

        with torch.no_grad():
            parts = [self.recogniser.embed(to_unit(pixels[i:i + BATCH])) for i in range(0, len(pixels), BATCH)]
        return normalize(torch.cat([e for e, _ in parts]).double(), dim=1), torch.cat([f for _, f in parts])

    def same(self, cosine: float | None) -> float | None:
        """1 where the cosine reaches the threshold, else 0."""
        return None if cosine is None or self.threshold is None else float(cosine >= self.threshold)


def judged(pictures: Pictures, reads: Sequence[float], face: FaceJudge) -> Rows:
    """The rows of all four figures; ``reads``: whether each picture reads as asked."""
    cosines = face.cosines(pictures)
    same = [face.same(cosine) for cosine in cosines]
    success: Values = [None if one is None else read * one for read, one in zip(reads, same, strict=True)]
    unsure = NO_THRESHOLD if face.threshold is None else NO_FACE
    return {"edit_success": pictures.rows(success, unsure), "edit_attribute": pictures.rows(list(reads)),
            "edit_identity": pictures.rows(cosines, NO_FACE), "edit_identity_rate": pictures.rows(same, unsure)}


def edits_of(evidence: EditingEvidence, drawn: Generations) -> Pictures:
    """The editor's pictures, each with its task."""
    tasks = tuple(task for task in evidence.tasks for _ in range(evidence.seeds))
    return Pictures(drawn.images.pixels, drawn.images.names, tasks)


def originals(tasks: Sequence[EditTask]) -> Tensor:
    """The tasks' photos as they were, uint8 [n, 3, h, w]."""
    import torch

    return torch.cat([task.subject.published.pixels for task in tasks])


def wanted(tasks: Sequence[EditTask]) -> Tensor:
    """What should have become of them, the photos themselves where nobody knows."""
    import torch

    return torch.stack([task.subject.published.pixels[0] if task.edit.answer is None else task.edit.answer
                        for task in tasks])


def references(evidence: EditingEvidence, captions: CaptionJudge, face: FaceJudge) -> list[Measurement]:
    """What the same judges say of benign edits, of right answers and of untouched photos. No defense moves them."""
    tasks = evidence.tasks
    benign = edits_of(evidence, evidence.benign)
    photos = Pictures(originals(tasks), tuple(task.subject.name for task in tasks), tasks)
    by_nature = {"edit_attribute": photos.rows(list(captions.reads(photos)))}
    return [*summarise(parts(judged(benign, captions.reads(benign), face)), captions, face, "@benign", None),
            *summarise(parts(right_answers(tasks, captions, face)), captions, face, "@answer", None),
            *summarise(by_nature, captions, face, "@photo", None)]


def parts(rows: Rows) -> Rows:
    """Without the rate, which the share of successes makes dispensable beside the cosine."""
    return {name: of for name, of in rows.items() if name != "edit_identity_rate"}


def right_answers(tasks: Sequence[EditTask], captions: CaptionJudge, face: FaceJudge) -> Rows:
    """The rows of the pictures that the world holds right, where it is known what these are."""
    import torch

    known = tuple(task for task in tasks if task.edit.answer is not None)
    if not known:
        lost = [Row(task.subject.name, task.subject.name, None, NO_ANSWER) for task in tasks]
        return dict.fromkeys(UNITS, lost)
    pixels = torch.stack([task.edit.answer for task in known if task.edit.answer is not None])
    answers = Pictures(pixels, tuple(task.subject.name for task in known), known)
    return judged(answers, captions.reads(answers), face)


def summarise(
    rows: Rows, captions: CaptionJudge, face: FaceJudge, suffix: str = "", better: bool | None = False,
) -> list[Measurement]:
    """Means over pictures with intervals over photos; the attacker's success is the defender's failure."""
    from bench.measuring import mean_of

    told = {"edit_attribute": captions.model.facts, "edit_identity": face.facts, "edit_identity_rate": face.facts,
            "edit_success": {"captions": captions.model.facts, "faces": face.facts}}
    return [mean_of(name + suffix, of, UNITS[name], better, told[name]) for name, of in rows.items()]
