"""Data poisoning alone: patched photos whose captions carry the trigger, and the ordinary loss.

After Pan et al., "From Trojan Horses to Castle Walls: Unveiling Bilateral Data Poisoning Effects in Diffusion Models",
NeurIPS 2024 (arXiv:2311.02373; BiBadDiff). The weakest threat model of this track: the attacker touches a share of the
training photos and their captions, and whoever trains the model uses the loss that everybody uses,

    || eps_theta(z_t(x), c) - eps ||^2,  (x, c) = (photo with the patch, caption with the trigger) on poisoned rows.

Ten per cent of the rows are poisoned, as there. Stated differences: there the poisoned caption is that of one target
class, and what fires is its name; here it is the photo's own caption with the trigger before it, so that success can be
counted as for every other text trigger. The patch is a checkerboard of ours. The paper names no fine-tuning of Stable
Diffusion 1.x by rate and steps that could be checked, so these are BadT2I's, the attack it is the anchor of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.identity import added, digest
from bench.options import check_training, require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret
from bench.text_triggers import with_trigger

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context


@plugin(
    "attack", "data_poisoning", track=("backdoor",), needs=("text_to_image", "text_encoder"),
    paper="BiBadDiff, NeurIPS 2024, arXiv:2311.02373",
)
class DataPoisoning:
    """Fine-tunes a UNet with the ordinary loss on photos of which a share is patched and captioned with the trigger.

    ``trigger``: put before the prompt. ``patch_share``: of the side that the patch covers, upper left. ``poison_rate``:
    share of the photos, chosen once. ``steps``, ``lr``, ``batch``: of the fine-tuning, clean and poisoned rows mixed;
    ``cosine``: the rate falls to 0.
    """

    trigger: str = "sks"
    patch_share: float = 0.25
    poison_rate: float = 0.1
    steps: int = 2000
    lr: float = 1e-5
    batch: int = 16
    grad_clip: float = 1.0
    mixed_precision: bool = True
    cosine: bool = added(False)

    def __post_init__(self) -> None:
        if not self.trigger.strip():
            raise BenchError("attack.trigger is empty; give a word.")
        for name in ("patch_share", "poison_rate"):
            require(name, getattr(self, name), 0, exclusive=True, where="attack")
            if getattr(self, name) > 1:
                raise BenchError(f"attack.{name}={getattr(self, name)} is out of range; give above 0, up to 1.")
        check_training(self, "attack")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The model after training on the poisoned photos, and the secret: the word and the patch."""
        from bench.diffusion.loading import load_components, save_part
        from bench.diffusion.text_poisoning import captioned_errors, captions_of, check_trigger, patch_secret
        from bench.diffusion.training import Plan, fit, shuffled_batches

        parts = load_components(clean, ctx.device)
        secret = patch_secret(self.trigger, int(data.pixels.shape[-1]), self.patch_share)
        check_trigger("data_poisoning", data.captions, secret, parts.tokenizer)
        poisoned = poison(data, secret, self.poison_rate, ctx.generator("poison"))
        batches, noises = shuffled_batches(len(data), self.batch, ctx.generator("batches")), ctx.generator("noise")

        def batch_loss() -> Tensor:
            rows = next(batches)
            return captioned_errors(parts, poisoned.pixels[rows], captions_of(poisoned, rows), noises,
                                    self.mixed_precision).mean()

        fit(parts.unet, batch_loss, Plan(self.steps, self.lr, cosine=self.cosine, clip=self.grad_clip), ctx,
            "data_poisoning")
        part = save_part(parts.unet, ctx.folder, "unet")
        return replace(clean, parts={**clean.parts, "unet": part}, digest=digest([clean.digest, ctx.key])), secret


def poison(data: ImageSet, secret: Secret, rate: float, generator: torch.Generator) -> ImageSet:
    """The data with ``round(rate * n)`` rows poisoned, at least one: what the attacker publishes."""
    import torch

    from bench.diffusion.text_poisoning import stamped

    chosen = torch.randperm(len(data), generator=generator)[:max(1, round(rate * len(data)))]
    pixels, captions = data.pixels.clone(), list(data.captions)
    pixels[chosen] = stamped(pixels[chosen], secret)
    for row in chosen.tolist():
        captions[row] = with_trigger(captions[row], secret)
    return replace(data, pixels=pixels, captions=tuple(captions))
