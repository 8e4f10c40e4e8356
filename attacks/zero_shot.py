"""Zero-shot customisation: an image-prompt adapter copies a person from photos without any training.

Ye et al., "IP-Adapter: Text compatible image prompt adapter for text-to-image diffusion models", 2023
(arXiv:2308.06721): cross-attention to tokens made from an image embedding, beside that to the prompt. The ``face``
adapter is its FaceID form, conditioned on a face recogniser's embedding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown
from bench.plugin import facts_of, plugin
from bench.records import Adapter, Customised

if TYPE_CHECKING:
    from bench.context import Context
    from bench.records import ImageSet, Model

ADAPTERS = ("image", "face")


@plugin(
    "attack", "zero_shot", track=("customization",), needs=("text_to_image", "ip_image"),
    paper="IP-Adapter, arXiv:2308.06721", official_code="https://github.com/tencent-ailab/IP-Adapter",
)
class ZeroShot:
    """Draws with the stock model, conditioned on the mean embedding of the photos by an image-prompt adapter.

    ``adapter``: ``image`` (CLIP embedding) or ``face`` (a face recogniser's; photos without a face are left out).
    ``scale``: weight of the image tokens, 0 to ignore the photos; 0.6 to 0.8 leaves room for the prompt.
    """

    adapter: str = "image"
    scale: float = 0.8

    def __post_init__(self) -> None:
        if self.adapter not in ADAPTERS:
            raise unknown("adapter", self.adapter, "attack.adapter", ADAPTERS)
        if not 0 <= self.scale <= 2:
            raise BenchError(f"attack.scale={self.scale} is out of range; give 0 to 2.")
        # What the model must offer depends on the option, and the planner reads it from the instance.
        self.__plugin__ = replace(facts_of(type(self)), needs=("text_to_image", f"ip_{self.adapter}"))

    def customise(self, photos: ImageSet, class_noun: str, model: Model, ctx: Context) -> Customised:
        from bench.diffusion.checkpoints import adapter_path

        if len(photos) == 0:
            raise BenchError("attack zero_shot: no photos were given; at least one is needed.")
        kind = f"ip_{self.adapter}"
        adapter = Adapter(kind, adapter_path(model, kind).weight, self.scale)
        return Customised(replace(model, adapters=(*model.adapters, adapter)), "", photos)
