"""InstructPix2Pix: the attacker tells a model that was trained on edits what to change in the photo.

Brooks et al., "InstructPix2Pix: Learning to follow image editing instructions", CVPR 2023 (arXiv:2211.09800).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.protocols import EditingProtocol
    from bench.records import Edit, ImageSet, Model


@plugin(
    "attack", "instruct_pix2pix", track=("editing",), needs=("edit", "text_encoder"),
    paper="InstructPix2Pix, CVPR 2023, arXiv:2211.09800",
    official_code="https://github.com/timothybrooks/instruct-pix2pix",
)
class InstructPix2Pix:
    """Edits by instruction. The network sees the noisy latents beside the photo's, E(x), and is guided by both, eq. 3:

    e(z, 0, 0) + s_I (e(z, E(x), 0) - e(z, 0, 0)) + s_T (e(z, E(x), text) - e(z, E(x), 0))

    ``image_guidance``: s_I, 1 or more, how much the picture keeps of the photo; 1.5 in the paper's code and in
    FaceLock, 1.2 in EditShield. s_T is the protocol's guidance (7.5). E(x) is the mean of the encoder's posterior,
    unscaled.

    Deviation: the paper's code takes 100 steps of the ancestral Euler sampler; here the protocol's sampler and steps,
    which every editor shares. With the protocol's guidance at 1 the pipeline guides by neither, so another
    ``image_guidance`` than 1 is refused then.
    """

    image_guidance: float = 1.5

    def __post_init__(self) -> None:
        if not 1 <= self.image_guidance <= 100:
            raise BenchError(f"attack.image_guidance={self.image_guidance} is out of range; give 1 (none) to 100.")

    def check(self, edits: Sequence[Edit], protocol: EditingProtocol) -> None:
        """Refuse a guidance that the sampler would silently ignore."""
        if protocol.guidance <= 1 and self.image_guidance != 1:
            raise BenchError(f"attack.image_guidance={self.image_guidance} does nothing at "
                             f"editing.guidance={protocol.guidance:g}; give editing.guidance above 1, or "
                             "attack.image_guidance=1 for none.")

    def edit(
        self, photos: ImageSet, edits: Sequence[Edit], seeds: Sequence[int], model: Model, protocol: EditingProtocol,
        ctx: Context,
    ) -> Tensor:
        from bench.diffusion.editing import Requests, draw_edits, open_editor
        from bench.diffusion.finetuning import check_photos

        check_photos(photos, model, "attack instruct_pix2pix")
        self.check(edits, protocol)
        pipeline = open_editor(model, "StableDiffusionInstructPix2PixPipeline", protocol.sampler, ctx.device)
        asked = Requests(photos.pixels, [edit.instruction for edit in edits], seeds)
        return draw_edits(pipeline, asked, protocol, ctx, image_guidance_scale=self.image_guidance)
