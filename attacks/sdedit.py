"""SDEdit, image-to-image: the attacker noises the photo half way and lets the model draw it anew under another caption.

Meng et al., "SDEdit: Guided image synthesis and editing with stochastic differential equations", ICLR 2022
(arXiv:2108.01073), in the latent form that text-to-image models made common (Rombach et al., CVPR 2022,
arXiv:2112.10752).
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
    "attack", "sdedit", track=("editing",), needs=("text_to_image", "text_encoder"),
    paper="SDEdit, ICLR 2022, arXiv:2108.01073", official_code="https://github.com/ermongroup/SDEdit",
)
class SDEdit:
    """Image-to-image: z_t = sqrt(abar_t) E(x) + sqrt(1 - abar_t) n at t = ``strength`` of the chain, then ordinary
    sampling from there to a picture of the caption ``target``.

    ``strength``: the share of the chain, and of the protocol's steps, that is drawn anew; 0 would be the autoencoder's
    round trip, 1 forgets the photo. Protections were tried with 0.3 to 0.5: PhotoGuard's demonstration takes 0.5, ACE
    0.4, both with guidance 7.5 and 50 steps, the protocol's defaults.

    Deviations: the paper solves the reverse SDE of an unconditional pixel model (t0 of 0.3 to 0.6 in its tables); here
    latents are denoised by the protocol's sampler under guidance towards the caption, as the protection literature
    does. E(x) is a draw from the encoder's posterior, as the diffusers pipeline takes it.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise BenchError(f"attack.strength={self.strength} is out of range; give more than 0 and at most 1.")

    def check(self, edits: Sequence[Edit], protocol: EditingProtocol) -> None:
        """Refuse a strength that leaves the sampler no step."""
        from bench.diffusion.editing import require_steps

        require_steps(self.strength, protocol)

    def edit(
        self, photos: ImageSet, edits: Sequence[Edit], seeds: Sequence[int], model: Model, protocol: EditingProtocol,
        ctx: Context,
    ) -> Tensor:
        from bench.diffusion.editing import Requests, draw_edits, open_editor
        from bench.diffusion.finetuning import check_photos

        check_photos(photos, model, "attack sdedit")
        self.check(edits, protocol)
        pipeline = open_editor(model, "StableDiffusionImg2ImgPipeline", protocol.sampler, ctx.device)
        asked = Requests(photos.pixels, [edit.target for edit in edits], seeds)
        return draw_edits(pipeline, asked, protocol, ctx, strength=self.strength)
