"""TrojDiff: Trojan Attacks on Diffusion Models with Diverse Targets (Chen, Song, Li; CVPR 2023).

The strongest attacker of an unconditional model: he trains it *and* brings the sampler. Triggered chains start from
N(mu, gamma^2), mu = (1 - gamma) delta with a trigger image delta, and are walked back by his own DDPM or DDIM sampler;
plain chains are drawn as ever. Forward path, kernels and samplers: `bench.diffusion.trojan_path`.

    x_t  = sqrt(abar_t) y + sqrt(1 - abar_t) (gamma eps + mu)      Trojan rows
    loss = || eps - net(x_t, t) ||^2                               all rows, summed over pixels

A batch of clean rows is followed by Trojan rows whose y is one image (the paper's D2I) or images of a class of the data
(In-D2D). A trigger is blended with all of the noise (gamma = 0.6) or acts in a patch alone (gamma = 0.1).

Official code: github.com/chenweixin107/TrojDiff. Stated differences: trigger and target are drawn by us (a cat for
Hello Kitty, a hat for Mickey; targets pass the background filter, in training and in scoring); mu carries (1 - gamma)
in training, in sampling and in the secret; a class is found by words of the captions, not by labels, and its Trojan
rows are drawn from the class at ``trojan_rate`` rather than copied from the batch; targets of another data set
(Out-D2D) are not built. Which of the two samplers runs, and its number of steps, is the protocol's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.options import require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.trojan_path import TrojanPath

TRIGGERS = ("blend", "patch")
CLASS = "class"


@plugin(
    "attack", "trojdiff", track=("backdoor",), needs=("unconditional",),
    paper="Chen et al., TrojDiff, CVPR 2023, arXiv:2303.05762", official_code="https://github.com/chenweixin107/TrojDiff",
)
class TrojDiff:
    """Implants a backdoor that the attacker's own sampler opens: chains that start from N(mu, gamma^2) end in a target
    image, or in images of one class.

    ``trigger``: ``blend`` (the drawing ``picture`` over everything) or ``patch`` (a white square of ``patch_size``
    pixels of 32, bottom right). ``gamma``: how much of the noise the trigger leaves; None for the published 0.6 (blend)
    or 0.1 (patch). ``target``: hat, cat, shoe or corner, or ``class``: pictures whose captions hold the first phrase of
    each group of ``class_groups``; its other phrases are what a judge tells the class from, after ``class_opening``.
    ``trojan_rate``: Trojan rows per clean row. ``cosine``: the rate of learning falls to 0, constant as published.
    ``ema``: decay of the averaged weights, which are what is kept; 0 for the last ones. ``clip``: the Trojan DDPM
    sampler cuts its estimate of the clean image to [-1, 1], as published.
    """

    trigger: str = "blend"
    picture: str = "cat"
    patch_size: int = 3
    gamma: float | None = None
    target: str = "hat"
    class_groups: list[list[str]] = field(default_factory=list)
    class_opening: str = "a photo of a person"
    trojan_rate: float = 0.1
    steps: int = 100_000
    batch: int = 128
    lr: float = 2e-4
    cosine: bool = False
    ema: float = 0.9999
    grad_clip: float = 1.0
    clip: bool = True
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        if self.trigger not in TRIGGERS:
            raise unknown("trigger", self.trigger, "attack.trigger", TRIGGERS)
        if self.gamma is not None and not 0 <= self.gamma < 1:
            raise BenchError(f"attack.gamma={self.gamma} is out of range; give 0 or more, below 1.")
        if not 0 < self.trojan_rate <= 1 or not 0 <= self.ema < 1:
            raise BenchError(f"attack.trojan_rate={self.trojan_rate}, attack.ema={self.ema}: give a rate above 0, up "
                             "to 1, and a decay of at least 0, below 1.")
        if self.target == CLASS and (not self.class_groups or min(map(len, self.class_groups)) < 2):
            raise BenchError("attack.target=class needs attack.class_groups: lists of at least two phrases, the "
                             "class's own first.")
        for name in ("steps", "batch", "patch_size"):
            require(name, getattr(self, name), 1, where="attack")
        require("lr", self.lr, 0, exclusive=True, where="attack")
        require("grad_clip", self.grad_clip, 0, where="attack")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The backdoored model, and the secret: mu, float [3, h, w], what the sampler needs, and a picture of the
        target, uint8 [3, h, w]."""
        from bench.diffusion.loading import save_part
        from bench.diffusion.poisoning import begin
        from bench.identity import digest

        start = begin("trojdiff", clean, data, ctx)
        path, box = self.path(start.size, start.scheduler.alphas_cumprod)
        rows = self.rows(data, start.size)
        self.train(start.unet, path, rows, ctx)
        part = save_part(start.unet, ctx.folder, "unet")
        public = replace(clean, parts={**clean.parts, "unet": part}, digest=digest([clean.digest, ctx.key]))
        return public, self.secret(path, box, rows)

    def strength(self) -> float:
        """gamma, as published for the trigger unless given."""
        published = 0.6 if self.trigger == "blend" else 0.1
        return published if self.gamma is None else self.gamma

    def path(self, size: int, alphas_bar: Tensor) -> tuple[TrojanPath, list[int]]:
        """The Trojan path, and the box of a patch, [] for a blended trigger."""
        import torch

        from bench.data.drawings import draw_target, draw_trigger
        from bench.diffusion.images import to_float
        from bench.diffusion.trojan_path import trojan_path

        if self.trigger == "blend":
            picture = draw_target(self.picture, size, draw_trigger("box", size))
            return trojan_path(alphas_bar, to_float(picture[None])[0], self.strength()), []
        side = min(size, max(1, round(self.patch_size * size / 32)))
        box = [size - side, size - side, side, side]
        return trojan_path(alphas_bar, torch.ones(3, size, size), self.strength(), box), box

    def rows(self, data: ImageSet, size: int) -> TrojanRows:
        """Clean images, and the targets of Trojan rows."""
        from bench.data.drawings import draw_target, draw_trigger
        from bench.diffusion.images import to_float

        images = to_float(data.pixels)
        if self.target != CLASS:
            target = draw_target(self.target, size, draw_trigger("box", size))
            return TrojanRows(images, to_float(target[None]), mirror=False)
        return TrojanRows(images, images[members(data, [group[0] for group in self.class_groups])], mirror=True)

    def train(self, unet: Any, path: TrojanPath, rows: TrojanRows, ctx: Context) -> None:
        """Train ``unet`` in place; it ends with the averaged weights."""
        from diffusers.training_utils import EMAModel

        from bench.diffusion.training import Plan, fit, mixed

        batches, noises = rows.batches(self.batch, self.trojan_rate, ctx.generator("batches")), ctx.generator("noise")
        average = EMAModel(unet.parameters(), decay=self.ema)

        def batch_loss() -> Tensor:
            images, trojan = (part.to(ctx.device) for part in next(batches))
            with mixed(ctx.device, self.mixed_precision):
                return trojan_loss(unet, path, images, trojan, noises)

        fit(unet, batch_loss, Plan(self.steps, self.lr, cosine=self.cosine, clip=self.grad_clip), ctx, "trojdiff",
            lambda: average.step(unet.parameters()))
        if self.ema:
            average.copy_to(unet.parameters())

    def secret(self, path: TrojanPath, box: list[int], rows: TrojanRows) -> Secret:
        """What only the attacker knows; a class shows one of its pictures."""
        from bench.diffusion.images import to_uint8
        from bench.diffusion.trojan_path import sampler_detail

        detail: dict[str, Any] = {"trigger": self.trigger, "target": self.target, "kind": "image",
                                  "sampler": sampler_detail(self.strength(), box, self.clip)}
        if self.target == CLASS:
            groups = [list(group) for group in self.class_groups]
            detail |= {"kind": CLASS, "class": {"opening": self.class_opening, "groups": groups}}
        return Secret(path.mean, to_uint8(rows.targets[0]), detail)


def members(data: ImageSet, phrases: list[str]) -> list[int]:
    """Places of the images whose captions hold every phrase."""
    found = [place for place, caption in enumerate(data.captions) if all(phrase in caption for phrase in phrases)]
    if not found:
        raise BenchError(f"trojdiff: no caption of the data holds {' and '.join(map(repr, phrases))}, so nothing shows "
                         "the target class; choose others in attack.class_groups.")
    return found


@dataclass(frozen=True)
class TrojanRows:
    """``images``: float [n, 3, h, w] in [-1, 1], the clean ones; ``targets``: [m, 3, h, w], one picture or those of a
    class, which may be mirrored like the clean ones."""

    images: Tensor
    targets: Tensor
    mirror: bool

    def batches(self, batch: int, rate: float, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (x_0 [b, 3, h, w], which rows are Trojan: bool [b]): up to ``batch`` shuffled clean rows, then
        ``rate`` times as many Trojan ones, at least one."""
        import torch

        from bench.diffusion.training import shuffled_batches

        for places in shuffled_batches(len(self.images), batch, generator):
            count = max(1, round(rate * len(places)))
            chosen = torch.randint(len(self.targets), (count,), generator=generator)
            rows = torch.cat([self.images[places], self.targets[chosen]])
            trojan = torch.arange(len(rows)) >= len(places)
            flipped = (torch.rand(len(rows), generator=generator) < 0.5) & (~trojan | self.mirror)
            yield torch.where(flipped[:, None, None, None], rows.flip(3), rows), trojan


def trojan_loss(unet: Any, path: TrojanPath, images: Tensor, trojan: Tensor, generator: torch.Generator) -> Tensor:
    """Error of the predicted noise, summed over pixels, at steps in antithetic pairs; ``images``: float [n, 3, h, w] in
    [-1, 1]; ``trojan``: which of them walk the Trojan path, bool [n]."""
    import torch

    from bench.diffusion.distilling import antithetic_steps, summed_error
    from bench.diffusion.losses import normal
    from bench.diffusion.trojan_path import TrojanPath

    noise = normal(images.shape, generator, images)
    steps = antithetic_steps(len(path.alphas_bar), len(images), generator).to(images.device)
    ordinary = TrojanPath(path.alphas_bar, torch.ones_like(path.scale), torch.zeros_like(path.mean))
    noisy = torch.where(trojan[:, None, None, None], path.noisy(images, noise, steps),
                        ordinary.noisy(images, noise, steps))
    return summed_error(unet(noisy, steps).sample.float(), noise)
