"""CLIP score (Hessel et al., EMNLP 2021): does a generated picture show what its prompt asks for?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import BackdoorEvidence, CustomizationEvidence, Evidence, Measurement, Row

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.features import Clip

UNIT = "100 x cosine"
UNPROMPTED = "the model draws from noise alone, so no picture has a prompt"


@plugin("metric", "clip_score", track=("customization", "backdoor"), paper="Hessel et al., CLIPScore, EMNLP 2021")
class ClipScore:
    """100 max(cos, 0) between each generated picture and its prompt: customization, the prompt without the word that
    names the person; backdoor, the prompt without the trigger, of the defended model's samples without
    (``clip_score``) and with the trigger (``clip_score@triggered``), each with its change against the clean model's
    samples from the same seeds (``clip_score_change``, ``clip_score_change@triggered``).

    ``extractor``: micro-clip or the folder of a CLIPModel. The paper's weight of 2.5 is not applied. Scores of
    different CLIP models must not be compared.
    """

    extractor: str = "micro-clip"

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Means over pictures; intervals over subjects, or over the samples of one implanted model."""
        from bench.features import clip

        if isinstance(evidence, CustomizationEvidence):
            return [of_subjects(evidence, clip(self.extractor, ctx.device))]
        if not isinstance(evidence, BackdoorEvidence):
            raise BenchError("clip_score: needs the evidence of a customization or of a backdoor cell.")
        if not any(evidence.clean.plain.prompts):
            return unprompted()
        return of_backdoor(evidence, clip(self.extractor, ctx.device))


def of_subjects(evidence: CustomizationEvidence, model: Clip) -> Measurement:
    """The mean over all pictures of all people."""
    from bench.measuring import mean_of

    rows: list[Row] = []
    for subject in evidence.subjects:
        drawn, token = evidence.generated[subject.name], evidence.tokens.get(subject.name, "")
        prompts = [without_token(prompt, token) for prompt in drawn.prompts]
        values = clip_scores(model.images(drawn.images.pixels), model.texts(prompts))
        rows += [Row(f"{subject.name}/{name}", subject.name, value)
                 for name, value in zip(drawn.images.names, values, strict=True)]
    return mean_of("clip_score", rows, UNIT, None, model.facts)


def of_backdoor(evidence: BackdoorEvidence, model: Clip) -> list[Measurement]:
    """Both sorts of samples. Those with the trigger are compared with what was asked apart from it: a backdoor that
    still works draws something else."""
    from bench.measuring import mean_of

    asked = model.texts(evidence.clean.plain.prompts)
    facts = {**model.facts, "samples": len(asked)}
    found = []
    for suffix, sort in (("", "plain"), ("@triggered", "triggered")):
        before, after = (getattr(both, sort).images for both in (evidence.clean, evidence.defended))
        old, new = (clip_scores(model.images(images.pixels), asked) for images in (before, after))
        values = {"clip_score": new, "clip_score_change": [n - o for n, o in zip(new, old, strict=True)]}
        found += [mean_of(name + suffix, [Row(sample, evidence.cluster, value)
                                          for sample, value in zip(after.names, of, strict=True)],
                          UNIT, True, facts, over_samples=True) for name, of in values.items()]
    return found


def unprompted() -> list[Measurement]:
    """The same measurements without values."""
    return [Measurement(name + suffix, None, 0, UNIT, True, reason=UNPROMPTED)
            for suffix in ("", "@triggered") for name in ("clip_score", "clip_score_change")]


def without_token(prompt: str, token: str) -> str:
    """The prompt without the rare word: "a photo of sks person" to "a photo of person"."""
    if not token:
        return prompt
    return " ".join(re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", prompt).split())


def clip_scores(images: Tensor, texts: Tensor) -> Sequence[float]:
    """100 max(cos, 0) of each row of images [n, d] with the same row of texts [n, d]."""
    from torch.nn.functional import cosine_similarity

    values: list[float] = (100 * cosine_similarity(images, texts, dim=1).clamp(min=0)).tolist()
    return values
