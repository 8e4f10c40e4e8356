"""TERD: A Unified Framework for Safeguarding Diffusion Models Against Backdoors (Mo et al., ICML 2024).

1. *Trigger estimation.* On two noises with the same mu, t in the last ``window`` steps and x_0 itself noise (so late,
   the image hardly matters), the unknown target cancels out of the difference:

       x_i = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps_i + mu
       min_mu  1/2 || (eps_1 - net(x_1, t)) - (eps_2 - net(x_2, t)) ||^2  -  w || mu ||_1       (1)

   summed over pixels, averaged over the batch; the last term keeps mu from 0.
2. *Refinement.* x_0 is drawn from eps + mu in a few DDIM steps, through which gradients pass, and the loss is the mean
   of (1) late, with mu, and of (1) in the first ``window`` steps, without mu in x_i.
3. *Input verdict.* Which of N(mu, 1) and N(0, 1) an input is likelier under: the score of x is
   log N(x; mu, 1) - log N(x; 0, 1) = x mu - || mu ||^2 / 2; above 0 the paper calls it backdoored.
4. *Model verdict.* Per pixel, KL(N(mu, 1) || N(0, 1)) = mu^2 / 2; M_r is its mean over pixels, V_r its variance.

Settings [official code, BadDiffusion on CIFAR10]: mu from -U[0, 1], SGD 0.5 with cosine decay to 0, batch 16 (2 at 256
pixels), 3000 iterations, then a fresh SGD of 1000 with the gradient's norm clipped at 0.01, 10 DDIM steps, window 10,
w 5e-5 (5e-4 for larger images).

Deviations. It needs no data and repairs nothing: the model is returned as it was. In the paper a rate named TPR is the
share of *benign* inputs that pass; here positive is poisoned, always. The code prints M_r and V_r moved by constants
that have no meaning by its own comment; here they are as above, and the model's score is M_r. No threshold was
published, and the default one was calibrated on nothing: the start alone has M_r = 1/6, so read the score against clean
models, not the flag. The noise scale gamma that its TrojDiff script also
estimates is left out, gamma = 1: what scales the noise is not found. The DDIM here does not clip its estimate of the
clean image, which the code's default scheduler does: clipping by itself disarms these backdoors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, Incompatible
from bench.options import require_all
from bench.plugin import plugin
from bench.records import ImageSet, Model, Report, Secret, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context

logger = logging.getLogger(__name__)


@plugin(
    "defense", "terd", track=("backdoor",), acts_on="model", needs=("unconditional",),
    paper="Mo et al., TERD: A Unified Framework for Safeguarding Diffusion Models Against Backdoors, ICML 2024",
    official_code="https://github.com/PKU-ML/TERD",
)
class Terd:
    """Estimates a trigger without any data, and from it says which inputs, and whether the model, are backdoored.

    ``iterations``, ``refinements``: of the two stages. ``weight``: w. ``window``: steps from the end, and from the
    start, of the chain. ``sampling_steps``: of the refinement's DDIM. ``grad_clip``: of the refinement. ``threshold``:
    a model with M_r above it is called backdoored; no value was published, give one from clean models of your kind.
    """

    iterations: int = 3000
    refinements: int = 1000
    lr: float = 0.5
    batch: int = 16
    weight: float = 5e-5
    window: int = 10
    sampling_steps: int = 10
    grad_clip: float = 0.01
    threshold: float = 0.1

    def __post_init__(self) -> None:
        require_all(self, above={"lr": 0}, least={
            "iterations": 1, "refinements": 0, "batch": 1, "weight": 0, "window": 1, "sampling_steps": 1,
            "grad_clip": 0, "threshold": 0})

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """``suspicious`` itself; mu and the verdict are in the report."""
        from bench.diffusion.distilling import open_noise_predictor
        from bench.reports import write_report

        unet, scheduler = open_noise_predictor("terd", suspicious, ctx)
        if self.window > scheduler.config.num_train_timesteps:
            raise BenchError(f"defense.window={self.window} exceeds the model's chain of "
                             f"{scheduler.config.num_train_timesteps} steps.")
        mu, first = refined(estimated(unet, scheduler, self, ctx), unet, scheduler, self, ctx)
        mean, variance = divergence(mu)
        logger.info("terd: M_r %.4f, V_r %.4f", mean, variance)
        verdict = Verdict("terd", mean, mean > self.threshold)
        write_report(Report(verdict, mu, {"M_r": mean, "V_r": variance, "M_r_before_refinement": first}), ctx.folder)
        return suspicious

    def score_inputs(
        self, model: Model, inputs: Tensor | tuple[str, ...], report: Report | None, ctx: Context,
    ) -> Tensor:
        """The log-likelihood ratio of each input, noise [n, 3, h, w]: above 0 it is likelier to carry the trigger."""
        if isinstance(inputs, tuple) or report is None or report.trigger is None:
            raise Incompatible("terd: scores initial noise by the trigger that it estimated; it has no noise or none.")
        mu = report.trigger.double()
        scores: Tensor = (inputs.double() * mu).flatten(1).sum(1) - mu.square().sum() / 2
        return scores


def divergence(mu: Tensor) -> tuple[float, float]:
    """M_r and V_r of the model verdict."""
    each = mu.double().square() / 2
    return float(each.mean()), float(each.var(correction=0))


def estimated(unet: Any, scheduler: Any, options: Terd, ctx: Context) -> Tensor:
    """Stage 1: mu [3, h, w]."""
    import torch

    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    start = -torch.rand(shape, generator=ctx.generator("mu"))
    draws, last = ctx.generator("estimation"), scheduler.config.num_train_timesteps

    def loss(mu: Tensor) -> Tensor:
        images = torch.randn((options.batch, *shape), generator=draws).to(mu.device)
        return paired_loss(unet, scheduler, images, mu, (last - options.window, last), draws)

    return descended(start.to(ctx.device), loss, options.iterations, 0.0, options, ctx, "trigger estimation")


def refined(mu: Tensor, unet: Any, scheduler: Any, options: Terd, ctx: Context) -> tuple[Tensor, float]:
    """Stage 2: mu, and M_r before."""
    import torch

    draws, last = ctx.generator("refinement"), scheduler.config.num_train_timesteps
    sample = differentiable_ddim(unet, scheduler, options.sampling_steps)

    def loss(mu: Tensor) -> Tensor:
        noise = torch.randn((options.batch, *mu.shape), generator=draws).to(mu.device)
        images = sample(noise + mu)
        late = paired_loss(unet, scheduler, images, mu, (last - options.window, last), draws)
        return (late + paired_loss(unet, scheduler, images, mu * 0, (0, options.window), draws)) / 2

    found = descended(mu, loss, options.refinements, options.grad_clip, options, ctx, "trigger refinement")
    return found, divergence(mu)[0]


def descended(
    start: Tensor, loss: Callable[[Tensor], Tensor], steps: int, clip: float, options: Terd, ctx: Context, what: str,
) -> Tensor:
    """SGD with cosine decay on ``loss`` minus w || mu ||_1."""
    import torch

    mu = start.detach().clone().requires_grad_(True)
    descent = torch.optim.SGD([mu], lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, max(1, steps))
    for _ in ctx.track(range(steps), what, steps):
        descent.zero_grad()
        (loss(mu) - options.weight * mu.abs().sum()).backward()  # type: ignore[no-untyped-call]
        if clip:
            torch.nn.utils.clip_grad_norm_([mu], clip)
        descent.step()
        schedule.step()
    if not mu.isfinite().all():
        raise BenchError(f"terd: {what} diverged; lower defense.lr ({options.lr}).")
    return mu.detach()


def paired_loss(
    unet: Any, scheduler: Any, images: Tensor, mu: Tensor, steps: tuple[int, int], generator: Any,
) -> Tensor:
    """The first term of (1) at random t of ``steps`` (from, to); ``images``: x_0, float [n, 3, h, w]."""
    import torch

    noise = torch.randn((2 * len(images), *images.shape[1:]), generator=generator).to(images.device)
    t = torch.randint(*steps, (len(images),), generator=generator).to(images.device).repeat(2)
    noisy = scheduler.add_noise(images.repeat(2, 1, 1, 1), noise, t) + mu
    one, other = (noise - unet(noisy, t).sample.float()).chunk(2)
    return 0.5 * (one - other).square().flatten(1).sum(1).mean()


def differentiable_ddim(unet: Any, scheduler: Any, steps: int) -> Callable[[Tensor], Tensor]:
    """Initial states [n, 3, h, w] to images in [-1, 1] by DDIM, with gradients."""
    from diffusers import DDIMScheduler

    from bench.diffusion.sampling import adjusted

    chain: Any = DDIMScheduler.from_config(adjusted(scheduler.config, clip_sample=False))
    chain.set_timesteps(min(steps, scheduler.config.num_train_timesteps))

    def sample(x: Tensor) -> Tensor:
        for t in chain.timesteps:
            x = chain.step(unet(x, t).sample, t, x).prev_sample
        return x

    return sample
