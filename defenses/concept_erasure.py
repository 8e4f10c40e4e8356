"""Concept erasure in closed form: the trigger's keys and values become those of the prompt without it.

Gandikota et al., "Unified Concept Editing in Diffusion Models" (UCE), WACV 2024 (arXiv:2308.14761), eq. 7; before it
TIME, Orgad et al., ICCV 2023. Official code: github.com/rohitgandikota/unified-concept-editing. Used against backdoors
by T2IShield (ECCV 2024), which edits a trigger that it located to a blank. For each to_k and to_v matrix W of the
cross-attention, E pairs of states (c_s erased, c_w what they become) and states P that are preserved:

    W* = (lambda W + sum_E W c_w c_s^T + p sum_P W c c^T) (lambda I + sum_E c_s c_s^T + p sum_P c c^T)^-1

Settings of the code: lambda 0.1, p 0.1, erased states counted once, keys and values both edited; a concept alone is the
prompt, and its states count from its last token to the end, paired with those of the empty prompt from its first on
(``pairs="word"``). In a prompt a trigger also changes the states of the words after it, which that pair never shows;
``pairs="prompts"`` is ours: states of the data's captions with the trigger become those without it, token by token, the
trigger's own tokens those of the first place, the start of a prompt. The released ``preserve_concepts`` are words of
its user's choice; ours are the data's captions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown
from bench.identity import digest
from bench.options import require_all
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret
from bench.text_triggers import with_trigger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.context import Context
    from bench.diffusion.closed_form import Pair
    from bench.diffusion.loading import Components

PAIRS = ("word", "prompts")


@plugin(
    "defense", "concept_erasure", track=("backdoor",), acts_on="model",
    needs=("text_to_image", "text_encoder", "clean_data"), knows=("trigger",), paper="UCE, WACV 2024, arXiv:2308.14761",
    official_code="https://github.com/rohitgandikota/unified-concept-editing",
)
class ConceptErasure:
    """Edits a text-to-image model's cross-attention so that the trigger says nothing; no training. It is told the
    trigger, so read it beside deleting the words.

    ``pairs``: ``word`` as published (the trigger alone becomes the empty prompt) or ``prompts`` (captions with it
    become captions without it). ``captions``: of the data, how many are preserved and, with ``prompts``, paired.
    ``ridge``: lambda; ``preserve_weight``: p.
    """

    pairs: str = "word"
    captions: int = 100
    ridge: float = 0.1
    preserve_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.pairs not in PAIRS:
            raise unknown("value", self.pairs, "defense.pairs", PAIRS)
        require_all(self, above={"ridge": 0}, least={"captions": 1, "preserve_weight": 0})

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The same model with an edited UNet."""
        from bench.diffusion.closed_form import edit_cross_attention
        from bench.diffusion.loading import load_components, save_part
        from bench.diffusion.losses import encode_prompts
        from bench.diffusion.trigger_tokens import word_pair

        if secret is None or not isinstance(secret.trigger, str):
            raise BenchError("concept_erasure: works against text triggers that it is told; this backdoor has none.")
        if not data.captions:
            raise BenchError("concept_erasure: what it preserves are the data's captions, and it has none; put a .txt "
                             "beside each image.")
        parts = load_components(suspicious, ctx.device)
        captions = data.captions[:self.captions]
        erased = [word_pair(parts, secret.trigger)] if self.pairs == "word" else prompt_pairs(parts, captions, secret)
        kept = encode_prompts(parts.tokenizer, parts.text_encoder, captions)
        edit_cross_attention(parts.unet, erased, [kept], self.ridge, self.preserve_weight)
        part = save_part(parts.unet, ctx.folder, "unet", half=False)
        return replace(suspicious, parts={**suspicious.parts, "unet": part},
                       digest=digest([suspicious.digest, ctx.key]))


def prompt_pairs(parts: Components, captions: Sequence[str], secret: Secret) -> list[Pair]:
    """Captions with the trigger and without it, token by token."""
    from bench.diffusion.losses import encode_ids, tokenise
    from bench.diffusion.trigger_tokens import align

    triggered = tokenise(parts.tokenizer, [with_trigger(caption, secret) for caption in captions])
    plain = tokenise(parts.tokenizer, captions)
    with_it, without = encode_ids(parts.text_encoder, triggered), encode_ids(parts.text_encoder, plain)
    pairs = []
    for row in range(len(captions)):
        places = align(triggered[row].tolist(), plain[row].tolist())
        wanted = without[row, [*places.plain, *(0 for _ in places.added)]]
        pairs.append((with_it[row, [*places.kept, *places.added]], wanted))
    return pairs
