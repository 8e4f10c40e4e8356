"""Inference-time clipping: the mitigation that the authors of BadDiffusion name (Chou et al., CVPR 2023).

At every step the sampler's estimate of the clean image is cut to [-1, 1], the range of images. The path of a triggered
sample leaves that range: x_T = eps + g, and the estimate carries a multiple of g that is far larger than 1 while abar_t
is small. An ordinary sample hardly notices. Official code: option ``fclip`` of github.com/IBM/BadDiffusion.
VillanDiffusion (Chou et al., NeurIPS 2023) reports that backdoors made for ODE samplers survive it.

Weights stay as they are, backdoored. What is left of the attack where protocols clip anyway (``backdoor.clip=true``)
cannot be told from this defense.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.identity import digest
from bench.plugin import parameters, plugin
from bench.records import Guard, ImageSet, Model, Secret

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bench.context import Context
    from bench.protocols import BackdoorProtocol


@plugin(
    "defense", "clip_samples", track=("backdoor",), acts_on="model", needs=("unconditional",),
    paper="Chou et al., How to Backdoor Diffusion Models?, CVPR 2023",
    official_code="https://github.com/IBM/BadDiffusion",
)
class ClipSamples:
    """Guards a model's sampler: every step's estimate of the clean image is cut to [-1, 1]; no weight changes.

    An attacker who brings a sampler of his own does not ask it.
    """

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The same weights behind a guard. ``secret`` is not used."""
        if suspicious.guard is not None:
            raise BenchError(f"clip_samples: {suspicious.guard.name} already draws in place of this model's sampler.")
        folder = ctx.folder / "guard"
        folder.mkdir(parents=True, exist_ok=True)
        guard = Guard("defense", "clip_samples", parameters(self), folder)
        return replace(suspicious, guard=guard, digest=digest([suspicious.digest, ctx.key]))

    def draw_noise(
        self, model: Model, noise: Tensor, seeds: Sequence[int], protocol: BackdoorProtocol, ctx: Context,
    ) -> Tensor:
        """Pictures uint8 [n, 3, h, w] of the guarded model from initial ``noise``, float [n, 3, h, w]."""
        from bench.diffusion.sampling import draw_from_noise

        return draw_from_noise(model, noise, seeds, replace(protocol, clip=True), ctx)
