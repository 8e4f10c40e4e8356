"""CLIP score (Hessel et al., EMNLP 2021): does a generated picture show what its prompt asks for?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import CustomizationEvidence, Evidence, Measurement, Row

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context


@plugin("metric", "clip_score", track=("customization",), paper="Hessel et al., CLIPScore, EMNLP 2021")
class ClipScore:
    """100 max(cos, 0) between each generated picture and its prompt without the word that names the person.

    ``extractor``: micro-clip or the folder of a CLIPModel. The paper's weight of 2.5 is not applied. Scores of
    different CLIP models must not be compared.
    """

    extractor: str = "micro-clip"

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """One mean over pictures; the interval is over subjects."""
        from bench.features import clip
        from bench.measuring import mean_of

        if not isinstance(evidence, CustomizationEvidence):
            raise BenchError("clip_score: needs the evidence of a customization cell.")
        model = clip(self.extractor, ctx.device)
        rows: list[Row] = []
        for subject in evidence.subjects:
            drawn, token = evidence.generated[subject.name], evidence.tokens.get(subject.name, "")
            prompts = [without_token(prompt, token) for prompt in drawn.prompts]
            values = clip_scores(model.images(drawn.images.pixels), model.texts(prompts))
            rows += [Row(f"{subject.name}/{name}", subject.name, value)
                     for name, value in zip(drawn.images.names, values, strict=True)]
        return [mean_of("clip_score", rows, "100 x cosine", None, model.facts)]


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
