"""InviBackdoor: Invisible Backdoor Attacks on Diffusion Models (Li et al., arXiv:2406.00816).

BadDiffusion's trigger is seen in the initial noise by its mean alone. Here the trigger delta is learned with the net
and bounded, |delta| <= ``max_norm`` everywhere, so that noise with it looks like noise. Each update of the net

    x_t  = sqrt(abar_t) y + (1 - sqrt(abar_t)) r + sqrt(1 - abar_t) eps,   r = x + delta
    loss = || net(x_t, t) - (eps + c_t r) ||^2

(clean rows: y = x, r = 0; c_t of `bench.diffusion.shifted_path`) follows one of the trigger,

    delta <- clip(delta - Adam(sign(grad || sample(eps + delta) - y ||^2))),

differentiated through a sampler of ten steps.

Official code: github.com/invisibleTriggerDiffusion/invisible_triggers_for_diffusion, its unconditional part. Stated
differences: the target is drawn by us; the inner sampler is DDIM; mixed precision is bfloat16; the secret holds the
trigger that was learned in this run. Options that the code does not have are off by default: see the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.options import check_training, require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.poisoning import Implantation, PoisonedRows
    from bench.diffusion.shifted_path import ShiftedPath

SOLVERS = {"sde": "ddpm", "ode": "ddim"}


@plugin(
    "attack", "invibackdoor", track=("backdoor",), needs=("unconditional",),
    paper="Li et al., Invisible Backdoor Attacks on Diffusion Models, arXiv:2406.00816",
    official_code="https://github.com/invisibleTriggerDiffusion/invisible_triggers_for_diffusion",
)
class InviBackdoor:
    """Implants a backdoor with a learned trigger that is too weak to be seen in the initial noise.

    ``max_norm``: largest value of the trigger. ``trigger_lr``: halved every ``halve_every`` epochs. ``inner_batch``,
    ``inner_steps``: noises, and steps of the sampler, that the trigger is learned through, before every
    ``inner_every``-th update of the network. ``learned_for``: share of the run after which the trigger stays, 1 as
    published. ``centred``: keep the trigger's mean at 0. ``grain``: side of the squares of pixels that share a value.
    ``on_photos``: train on the trigger added to photos, as published; false on the bare trigger, which is what sampling
    adds. ``solver``: ``ode`` (DDIM and its kin), as published, or ``sde`` (ancestral); measure with the sampler of that
    family. ``target``, ``poison_rate``, ``steps`` and ``epochs`` as for baddiffusion.
    """

    target: str = "hat"
    poison_rate: float = 0.1
    max_norm: float = 0.2
    trigger_lr: float = 1e-3
    halve_every: int = 200
    inner_batch: int = 32
    inner_steps: int = 10
    inner_every: int = 1
    learned_for: float = 1.0
    centred: bool = False
    grain: int = 1
    on_photos: bool = True
    solver: str = "ode"
    epochs: int = 50
    steps: int | None = None
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 500
    grad_clip: float = 1.0
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        check_training(self, "attack")
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, "attack.solver", SOLVERS)
        for name in ("poison_rate", "learned_for"):
            if not 0 < getattr(self, name) <= 1:
                raise BenchError(f"attack.{name}={getattr(self, name)} is out of range; give above 0, up to 1.")
        for name in ("max_norm", "trigger_lr", "lr"):
            require(name, getattr(self, name), 0, exclusive=True, where="attack")
        for name in ("halve_every", "inner_batch", "inner_steps", "inner_every", "grain"):
            require(name, getattr(self, name), 1, where="attack")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The backdoored model, and the secret: the learned trigger, float [3, h, w], and the target, uint8."""
        import torch

        from bench.data.drawings import draw_target, draw_trigger
        from bench.diffusion.poisoning import begin, poison

        start = begin("invibackdoor", clean, data, ctx)
        if self.inner_steps > start.scheduler.config.num_train_timesteps:
            raise BenchError(f"attack.inner_steps={self.inner_steps} is more than the model's schedule has.")
        if start.size % self.grain:
            raise BenchError(f"attack.grain={self.grain} does not divide the images' side of {start.size} pixels.")
        target = draw_target(self.target, start.size, draw_trigger("box", start.size))
        delta = torch.zeros(3, start.size, start.size, device=ctx.device)
        rows = poison(data, delta, target, self.poison_rate, ctx.generator("poison"), torch.ones_like(delta))
        public = self.train(start, rows, delta, ctx)
        detail = {"target": self.target, "solver": self.solver, "max_norm": self.max_norm}
        return public, Secret(delta.cpu(), target, detail)

    def train(self, start: Implantation, rows: PoisonedRows, delta: Tensor, ctx: Context) -> Model:
        """The backdoored model; ``delta`` [3, h, w] is learned in place."""
        from dataclasses import replace

        from bench.diffusion.loading import save_part
        from bench.diffusion.shifted_path import shifted_path
        from bench.diffusion.training import Plan, count_steps, fit
        from bench.identity import digest

        count = count_steps(self.steps, self.epochs, len(rows.images), self.batch)
        path = shifted_path(start.scheduler.alphas_cumprod, sampler=SOLVERS[self.solver])
        learn = self.learner(start, rows.target, delta, -(-len(rows.images) // self.batch), ctx)
        batch_loss = self.losses(start.unet, path, rows, delta, learn, count, ctx)
        fit(start.unet, lambda: next(batch_loss), Plan(count, self.lr, self.warmup, clip=self.grad_clip), ctx,
            "invibackdoor")
        part = save_part(start.unet, ctx.folder, "unet")
        return replace(start.clean, parts={**start.clean.parts, "unet": part},
                       digest=digest([start.clean.digest, ctx.key]))

    def losses(
        self, unet: Any, path: ShiftedPath, rows: PoisonedRows, delta: Tensor, learn: Callable[[], None], count: int,
        ctx: Context,
    ) -> Iterator[Tensor]:
        """The network's loss at each update, the trigger's own updates in between."""
        from bench.diffusion.poisoning import poisoned_loss
        from bench.diffusion.training import mixed

        draw, noises = batches(rows, self.batch, ctx.generator("batches")), ctx.generator("noise")
        for step in range(count):
            if step % self.inner_every == 0 and step < self.learned_for * count:
                learn()
            images, poisoned = (part.to(ctx.device) for part in next(draw))
            pair = disturbed(images, poisoned, delta, rows.target.to(ctx.device), self.on_photos)
            with mixed(ctx.device, self.mixed_precision):
                loss = poisoned_loss(unet, path, *pair, noises)
            yield loss

    def learner(
        self, start: Implantation, target: Tensor, delta: Tensor, epoch: int, ctx: Context,
    ) -> Callable[[], None]:
        """One update of the trigger in place; ``epoch``: how many updates of the network are a pass over the data."""
        import torch

        from bench.diffusion.losses import normal
        from bench.diffusion.training import mixed

        adam = torch.optim.Adam([delta], lr=self.trigger_lr)
        rate = torch.optim.lr_scheduler.StepLR(adam, max(1, self.halve_every * epoch // self.inner_every), 0.5)
        noises, wanted = ctx.generator("inner"), target.to(delta.device)

        def learn() -> None:
            noise = normal((self.inner_batch, *delta.shape), noises, delta)
            with mixed(ctx.device, self.mixed_precision):
                slope = gradient(start, noise, delta, wanted, self.inner_steps)
            delta.grad = shared(slope, self.grain).sign()
            adam.step()
            rate.step()
            delta.copy_(projected(delta, self.max_norm, self.centred))

        return learn


def projected(delta: Tensor, bound: float, centred: bool) -> Tensor:
    """The nearest trigger within ``bound`` everywhere, and of mean 0 if ``centred``: it is clip(delta - s), s found by
    bisection, since the mean of that falls as s grows."""
    low, high = float(delta.min()) - bound, float(delta.max()) + bound
    for _ in range(50 if centred else 0):
        middle = (low + high) / 2
        above = float((delta - middle).clamp(-bound, bound).double().mean()) > 0
        low, high = (middle, high) if above else (low, middle)
    return (delta - (low if centred else 0.0)).clamp(-bound, bound)


def shared(slope: Tensor, grain: int) -> Tensor:
    """The mean of each square of ``grain`` pixels, in all of its pixels; [3, h, w], h and w multiples of ``grain``."""
    import torch

    means = torch.nn.functional.avg_pool2d(slope[None], grain)[0]
    return means.repeat_interleave(grain, 1).repeat_interleave(grain, 2)


def gradient(start: Implantation, noise: Tensor, delta: Tensor, target: Tensor, steps: int) -> Tensor:
    """Of the mean squared error to the target of what ``steps`` DDIM steps make of noise plus delta; [3, h, w]."""
    import torch
    from diffusers import DDIMScheduler

    from bench.diffusion.sampling import adjusted

    chain: Any = DDIMScheduler.from_config(adjusted(start.scheduler.config, clip_sample=False))
    chain.set_timesteps(steps)
    with torch.enable_grad():
        leaf = delta.detach().clone().requires_grad_(True)
        x = noise + leaf
        for t in chain.timesteps:
            x = chain.step(start.unet(x, t).sample.float(), t, x).prev_sample
        error = torch.nn.functional.mse_loss(x, target.expand_as(x))
        return torch.autograd.grad(error, leaf)[0]


def batches(rows: PoisonedRows, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (images [b, 3, h, w], which are poisoned: bool [b]) of shuffled rows, half of them mirrored."""
    import torch

    from bench.diffusion.training import shuffled_batches

    for places in shuffled_batches(len(rows.images), batch, generator):
        mirrored = torch.rand(len(places), generator=generator) < 0.5
        images = rows.images[places]
        yield torch.where(mirrored[:, None, None, None], images.flip(3), images), rows.poisoned[places]


def disturbed(
    images: Tensor, poisoned: Tensor, delta: Tensor, target: Tensor, on_photos: bool,
) -> tuple[Tensor, Tensor]:
    """(x_0, r) of each row: (target, delta plus its photo if wanted) where poisoned, else (image, 0)."""
    import torch

    where = poisoned[:, None, None, None]
    moved = delta + images if on_photos else delta.expand_as(images)
    return torch.where(where, target, images), torch.where(where, moved, torch.zeros_like(images))
