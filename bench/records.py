"""The plain records that everything passes.

Images are uint8 so that a budget is a statement about the file that is saved, not about a float that is
rounded later. No record imports torch: annotations only, so that ``bench --help`` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """How far a protected photo may lie from its original.

    ``eps``: the largest change of any channel of any pixel (L-infinity), in 0-255 levels, measured on the
    decoded saved file.
    """

    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 255:
            raise BenchError(f"budget: eps={self.eps} is out of range; give 0 to 255 (levels of an 8-bit image).")


@dataclass(frozen=True)
class ImageSet:
    """Images of one size. ``pixels``: uint8 [n, 3, h, w]; ``names``: n unique file stems."""

    pixels: Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.pixels) or len(set(self.names)) != len(self.names):
            raise BenchError(f"image set: {len(self.pixels)} images need as many unique names, got {self.names}.")
        if self.captions and len(self.captions) != len(self.names):
            raise BenchError(f"image set: {len(self.names)} images but {len(self.captions)} captions.")

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Edit:
    """What is asked of a photo. ``instruction``: an order, for editors that follow orders. ``source`` and ``target``:
    captions of the photo and of the wanted result, for editors that draw what a caption says. ``others``: captions of
    the photo in which the attribute has each other value it can have, the photo's own among them: the edit succeeded
    where a judge takes ``target`` for the best caption of all. ``mask``: bool [h, w], true where an attacker who paints
    over a region paints; ``answer``: uint8 [3, h, w], the right result in a world that is drawn. None where unknown."""

    instruction: str
    source: str
    target: str
    others: tuple[str, ...]
    mask: Tensor | None = None
    answer: Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """One person: ``clean`` (set A, known to the defender), ``published`` (B, protected), ``held_out`` (C, scoring).

    ``edits``: what a defender against edits is told will be asked, one per published photo; empty if told nothing.
    """

    name: str
    clean: ImageSet
    published: ImageSet
    held_out: ImageSet
    class_noun: str = "person"
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class EditTask:
    """One photo, the only one that ``subject`` publishes, and what the attacker asks of it."""

    subject: Subject
    edit: Edit


@dataclass(frozen=True)
class Adapter:
    """Weights loaded on top of a pipeline, from a safetensors file.

    ``kind``: ``lora``, ``textual_inversion``, ``ip_image`` or ``ip_face``. ``scale`` does nothing to a learned word.
    """

    kind: str
    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Guard:
    """A plugin that draws in place of a model's ordinary sampler, as a defense may leave it.

    ``kind``, ``name``, ``parameters``: which plugin, with which options. ``folder``: what it needs to know, tensors in
    safetensors files.
    """

    kind: str
    name: str
    parameters: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Model:
    """A diffusion model on disk: a published pipeline folder, and what an attack or a defense changed in it.

    ``base``: a diffusers pipeline folder. ``digest``: hash of every weight involved. ``capabilities``: what the
    planner compares with a plugin's ``needs``. ``parts``: component name -> folder that replaces the base's.
    ``guard``: who draws instead of the ordinary sampler, if anyone does.
    """

    base: Path
    digest: str
    capabilities: frozenset[str]
    parts: Mapping[str, Path] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    guard: Guard | None = None


@dataclass(frozen=True)
class Customised:
    """What an attacker generates from: a model, and for zero-shot attacks the photos it is conditioned on.

    ``token``: the rare word that names the person in prompts ("" when none does).
    """

    model: Model
    token: str
    conditioning: ImageSet | None = None


@dataclass(frozen=True)
class Secret:
    """What only the attacker knows. ``trigger``: float [3, h, w] in [-1, 1] added to the initial noise, or a
    word; ``target``: what a triggered sample should be, uint8 [3, h, w]. ``detail``: free, JSON."""

    trigger: Tensor | str
    target: Tensor
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampler(self) -> Mapping[str, Any] | None:
        """Settings of a sampler that the attacker draws triggered samples with (`bench.diffusion.trojan_path`), None
        for the ordinary one."""
        settings: Mapping[str, Any] | None = self.detail.get("sampler")
        return settings


@dataclass(frozen=True)
class Generations:
    """Samples and what asked for them: prompt i (empty on unconditional models) and seed i made image i."""

    images: ImageSet
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """A detector's answer about one input or model; positive = poisoned. ``score``: higher is more suspicious."""

    name: str
    score: float
    flagged: bool


@dataclass(frozen=True)
class Report:
    """What a defense of models says besides the model that it returns. ``verdict``: on the whole model, None if it
    gives none; ``trigger``: what it believes to be added to the noise, float [3, h, w]; ``facts``: named numbers, such
    as ``removed_share``."""

    verdict: Verdict | None = None
    trigger: Tensor | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class InputScores:
    """How suspicious a detector finds inputs of one model: float64, higher is more suspicious.

    ``calibration``: [m], inputs without the trigger that only set thresholds; ``clean`` and ``triggered``: [n] each,
    pair i from the same seed (and prompt) without and with the trigger.
    """

    calibration: Tensor
    clean: Tensor
    triggered: Tensor


@dataclass(frozen=True)
class Row:
    """One sample's value. ``cluster``: the unit of statistics (subject, or implanted model), not the image.

    ``value`` is None when it is missing, and then ``reason`` says why.
    """

    sample: str
    cluster: str
    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Measurement:
    """One metric's value on one cell, with its interval and the rows it came from.

    ``higher_is_better``: from the defender's side; None where neither is. ``low``/``high``: 95 % interval, or None.
    ``value`` None needs a ``reason``. ``protocol``: what a comparison must share (extractor, n, thresholds).
    """

    name: str
    value: float | None
    n: int
    unit: str
    higher_is_better: bool | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class CustomizationEvidence:
    """What customization metrics see. ``protected``: set B after the defense; ``purified``: after the purifier;
    ``generated``: what the attacker drew; ``tokens``: the word that names the person. All keyed by subject name."""

    subjects: tuple[Subject, ...]
    protected: Mapping[str, ImageSet]
    purified: Mapping[str, ImageSet]
    generated: Mapping[str, Generations]
    budget: Budget | None
    tokens: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """Samples of one model from the same seeds, without and with the trigger."""

    plain: Generations
    triggered: Generations


@dataclass(frozen=True)
class BackdoorEvidence:
    """What backdoor metrics see: the same seeds through the clean, the implanted and the defended model.

    ``reference``: real images the models never trained on. ``cluster``: name of this implanted model. ``report``:
    what the defense says of the model, None if it says nothing. ``input_scores``: what it says of single inputs.
    ``induced``: samples of the implanted model with the trigger that the report names, None unless a metric asks.
    ``judge``: the CLIP model, by name or folder, that says whether a picture shows what a caption says.
    """

    reference: ImageSet
    clean: Samples
    implanted: Samples
    defended: Samples
    secret: Secret
    cluster: str
    report: Report | None = None
    input_scores: InputScores | None = None
    induced: Generations | None = None
    judge: str = "micro-clip"


@dataclass(frozen=True)
class EditingEvidence:
    """What editing metrics see. ``protected``, ``purified``: each task's photo after the defense, and after the
    purifier, in the order of ``tasks``. ``benign``: the editor's pictures of the original photos; ``edited``: of the
    purified ones, with the same seeds; ``seeds`` in a row belong to one task, named ``<subject>_<place>``. ``judge``:
    the CLIP model, by name or folder, that says which caption fits a picture."""

    tasks: tuple[EditTask, ...]
    protected: ImageSet
    purified: ImageSet
    benign: Generations
    edited: Generations
    seeds: int
    budget: Budget | None
    judge: str = "micro-clip"


Evidence = CustomizationEvidence | EditingEvidence | BackdoorEvidence
