"""Inpainting: the attacker marks a region of the photo and has it painted anew under another caption.

Inpainting checkpoints: Rombach et al., "High-resolution image synthesis with latent diffusion models", CVPR 2022
(arXiv:2112.10752), section 4.5. Ordinary text-to-image models, by blending at every step: Lugmayr et al., "RePaint",
CVPR 2022 (arXiv:2201.09865); Avrahami et al., "Blended latent diffusion", SIGGRAPH 2023 (arXiv:2206.02779).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.errors import BenchError, Incompatible, unknown
from bench.plugin import plugin

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.protocols import EditingProtocol
    from bench.records import Edit, ImageSet, Model

MASKS = ("seen", "unseen")


@plugin(
    "attack", "inpaint", track=("editing",), needs=("inpaint", "text_encoder"),
    paper="Latent diffusion, CVPR 2022, arXiv:2112.10752; RePaint, CVPR 2022, arXiv:2201.09865",
    official_code="https://github.com/CompVis/latent-diffusion",
)
class Inpaint:
    """Paints the edit's region m anew, towards the caption ``target``, and keeps the rest of the photo.

    A model of nine channels sees the noisy latents, the mask, and the latents of the photo without the region. A model
    of four is blended (RePaint, eq. 8): after every step z = m z + (1 - m)(sqrt(abar_t) E(x) + sqrt(1 - abar_t) n), so
    that what is outside guides what is drawn inside. Outside the region the result has the photo's own pixels.

    ``mask``: ``seen``, the edit's own, which a defender who is told the edit knows; ``unseen``, another that contains
    it: grown by an eighth of the photo's side and moved a sixteenth right and down. ``strength``: the share of the
    chain that is drawn anew; 1 starts from noise (DiffusionGuard), PhotoGuard's demonstration takes 0.7.

    Deviations: the region is widened to the latents' grid for drawing, not for the final paste. RePaint draws new noise
    n at every step, and walks back and forth; the diffusers pipeline keeps the noise that it started from, and walks
    once. Protection papers compare edits that were pasted into the original photo; an attacker who finds a protected
    one has no original, so it is pasted into what was found.
    """

    mask: str = "seen"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise unknown("mask", self.mask, "attack.mask", MASKS)
        if not 0 < self.strength <= 1:
            raise BenchError(f"attack.strength={self.strength} is out of range; give more than 0 and at most 1.")

    def check(self, edits: Sequence[Edit], protocol: EditingProtocol) -> None:
        """Refuse edits that say not where to paint, and a strength that leaves the sampler no step."""
        from bench.diffusion.editing import require_steps

        require_steps(self.strength, protocol)
        for edit in edits:
            if edit.mask is None or not edit.mask.any():
                raise Incompatible(f"inpaint needs a mask for every edit; '{edit.instruction}' has none.")

    def edit(
        self, photos: ImageSet, edits: Sequence[Edit], seeds: Sequence[int], model: Model, protocol: EditingProtocol,
        ctx: Context,
    ) -> Tensor:
        import torch

        from bench.diffusion.editing import Requests, draw_edits, open_editor
        from bench.diffusion.finetuning import check_photos
        from bench.masks import on_grid

        check_photos(photos, model, "attack inpaint")
        self.check(edits, protocol)
        pipeline = open_editor(model, "StableDiffusionInpaintPipeline", protocol.sampler, ctx.device)
        regions = torch.stack([self.region(edit) for edit in edits])
        painted = torch.stack([on_grid(region, pipeline.vae_scale_factor) for region in regions])
        asked = Requests(photos.pixels, [edit.target for edit in edits], seeds, painted)
        high, wide = photos.pixels.shape[2:]
        drawn = draw_edits(pipeline, asked, protocol, ctx, strength=self.strength, height=high, width=wide)
        return torch.where(regions[:, None], drawn, photos.pixels)

    def region(self, edit: Edit) -> Tensor:
        """Where this attacker paints, bool [h, w]."""
        from bench.masks import grown, shifted

        seen: Tensor = edit.mask  # type: ignore[assignment]  # check has refused edits without one
        if self.mask == "seen":
            return seen
        side = seen.shape[-1]
        return seen | shifted(grown(seen, max(1, side // 8)), max(1, side // 16))
