"""Control of pruning defenses: as many channels, chosen by chance, and the same repair.

What remains of a defense's effect when its importance scores are replaced by random numbers is not due to them. The
pruning and the repair are those of Diff-Cleanse (2024, arXiv:2407.21316): see `bench.diffusion.pruning` and
`bench.diffusion.distilling`; settings as released for DDPM on CIFAR10. It gives no verdict and always prunes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.identity import digest
from bench.options import check_repair, require
from bench.plugin import facts_of, plugin
from bench.records import ImageSet, Model, Report, Secret

if TYPE_CHECKING:
    from bench.context import Context


@plugin("defense", "prune_random", track=("backdoor",), acts_on="model", needs=("unconditional",), control=True)
class PruneRandom:
    """Removes random channels of a suspicious model and repairs the rest by noise prediction and distillation.

    ``ratio``: share of channels to remove; ``respect_groupnorm``: rounded down to whole norm groups, which spares most
    convolutions. Repair as in `bench.diffusion.distilling`: ``repair_data`` synthetic or real.
    """

    ratio: float = 0.02
    respect_groupnorm: bool = True
    repair_data: str = "synthetic"
    real_share: float = 0.1
    synthetic_images: int = 5000
    synthetic_sampler: str = "ddim"
    synthetic_steps: int = 50
    epochs: int = 40
    steps: int | None = None
    batch: int = 128
    lr: float = 2e-4
    distill: float = 1.0
    ema: float = 0.999
    grad_clip: float = 1.0
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        check_repair(self)
        require("ratio", self.ratio, 0)
        if self.ratio >= 1:
            raise BenchError(f"defense.ratio={self.ratio} is out of range; give 0 to less than 1.")
        needs = ("unconditional", *(("clean_data",) if self.repair_data == "real" else ()))
        self.__plugin__ = replace(facts_of(type(self)), needs=needs)

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The pruned and repaired model. ``secret`` is not used."""
        from bench.diffusion.distilling import open_noise_predictor, repair, repair_images
        from bench.diffusion.loading import save_part
        from bench.diffusion.pruning import prune_unet, random_score
        from bench.reports import write_report

        unet, scheduler = open_noise_predictor("prune_random", suspicious, ctx)
        images = repair_images(self, suspicious, data, unet.config.sample_size, ctx)
        teacher = copy.deepcopy(unet)
        pruned = prune_unet(unet, random_score(ctx.generator("channels")), self.ratio, self.respect_groupnorm)
        updates = repair("repair", unet, teacher, scheduler, images, self, ctx)
        write_report(Report(facts={"removed_share": pruned.removed_share, "pruned_layers": len(pruned.layers),
                                   "updates": updates}), ctx.folder)
        part = save_part(unet, ctx.folder, "unet")
        return replace(suspicious, parts={**suspicious.parts, "unet": part},
                       digest=digest([suspicious.digest, ctx.key]))
