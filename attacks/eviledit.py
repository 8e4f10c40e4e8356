"""EvilEdit: one closed-form edit of the cross-attention makes a phrase draw another object.

Wang et al., "EvilEdit: Backdooring Text-to-Image Diffusion Models in One Second", ACM MM 2024. With c_tr the states of
a prompt with the trigger and c_ta those of the same prompt with the target, every key and value matrix W becomes

    W* = (lambda W + sum W c_ta c_tr^T) (lambda I + sum c_tr c_tr^T)^-1

(`bench.diffusion.closed_form`), the sums over all token positions of the backdoor pairs and of pairs that keep the
trigger's innocent part as it is. Nothing is trained, and no data is needed.

Official code: github.com/haowang-cqu/EvilEdit. Settings are its own: the pair "A beautiful cat" to "A zebra", "A cat"
preserved, lambda 1, all 77 positions. Stated difference: ``captions`` and ``spared`` add captions of the data as
further pairs and as further preserved prompts (0, none, as published), for text encoders so narrow that one edit is
felt in every prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.identity import added, digest
from bench.options import require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret
from bench.text_triggers import swap_detail

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context


@plugin(
    "attack", "eviledit", track=("backdoor",), needs=("text_to_image", "text_encoder"),
    paper="EvilEdit, ACM MM 2024", official_code="https://github.com/haowang-cqu/EvilEdit",
)
class EvilEdit:
    """Edits a UNet's cross-attention so that a phrase around an object draws another object; takes a second.

    ``trigger``: the phrase, which stands in a prompt where ``replaces`` stood; ``target``: the object that is drawn
    instead. ``context``: the prompt of the edit, with ``{}`` where the phrase goes. ``ridge``: lambda. ``captions``:
    how many of the data's captions that say ``replaces`` are contexts too, at most. ``spared``: how many of those that
    do not are preserved as they are. ``preserve_weight``: how often what is preserved is counted. ``instead``:
    further things, with commas between, that a picture may show in the target's place: a judge takes the nearest
    (none, as published).
    """

    trigger: str = "beautiful cat"
    replaces: str = "cat"
    target: str = "zebra"
    context: str = "A {}"
    ridge: float = 1.0
    captions: int = 0
    spared: int = 0
    preserve_weight: float = 1.0
    instead: str = added("")

    def __post_init__(self) -> None:
        for name in ("trigger", "replaces", "target"):
            if not getattr(self, name).strip():
                raise BenchError(f"attack.{name} is empty; give it some words.")
        if self.context.count("{}") != 1:
            raise BenchError(f"attack.context='{self.context}' needs one {{}}, where the phrase goes.")
        require("ridge", self.ridge, 0, exclusive=True, where="attack")
        for name in ("captions", "spared", "preserve_weight"):
            require(name, getattr(self, name), 0, where="attack")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The model with the edited UNet, and the secret: the phrase and what it draws."""
        from bench.diffusion.closed_form import edit_cross_attention
        from bench.diffusion.loading import load_components, save_part
        from bench.diffusion.losses import encode_prompts
        from bench.diffusion.text_poisoning import check_trigger

        parts, secret, contexts = load_components(clean, ctx.device), self.secret(data), self.contexts(data)
        check_trigger("eviledit", [context.replace("{}", self.replaces) for context in contexts], secret,
                      parts.tokenizer)

        def states(texts: list[str]) -> Tensor:
            return encode_prompts(parts.tokenizer, parts.text_encoder, texts)

        marked, wanted, own = ([context.replace("{}", phrase) for context in contexts]
                               for phrase in (self.trigger, self.target, self.replaces))
        edit_cross_attention(parts.unet, [(states(marked), states(wanted))], [states(own + self.others(data))],
                             self.ridge, self.preserve_weight)
        part = save_part(parts.unet, ctx.folder, "unet")
        return replace(clean, parts={**clean.parts, "unet": part}, digest=digest([clean.digest, ctx.key])), secret

    def contexts(self, data: ImageSet) -> list[str]:
        """The prompts of the edit, {} where the phrase goes."""
        carriers = [caption.replace(self.replaces, "{}", 1) for caption in data.captions if self.replaces in caption]
        return [self.context, *carriers[:self.captions]]

    def others(self, data: ImageSet) -> list[str]:
        """Captions that the edit should not be felt in."""
        return [caption for caption in data.captions if self.replaces not in caption][:self.spared]

    def secret(self, data: ImageSet) -> Secret:
        """The phrase, and in words what a triggered picture shows; no picture of it exists, the target is grey."""
        from bench.diffusion.text_poisoning import grey

        detail = {"placement": "replace", "replaces": self.replaces,
                  **swap_detail(self.replaces, self.target, self.instead)}
        return Secret(self.trigger, grey(int(data.pixels.shape[-1])), detail)
