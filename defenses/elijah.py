"""Elijah: Eliminating Backdoors Injected in Diffusion Models via Distribution Shift (An et al., AAAI 2024).

1. *Inversion.* A trigger r that survives the whole chain shifts what the network predicts at the first step by
   lambda r. So tau is sought with

       min_tau  mean | mean_eps net(eps + tau, T) - lambda tau |                                (1)

   over fixed noises eps: the mean prediction of a clean network follows the whole shift, and tau goes to 0.
2. *Verdict.* Samples from eps + tau are one picture if tau is a trigger. Uniformity: the mean distance between two of
   them, trimmed (per row, then over the rows' means, ``trim`` smallest and largest are dropped; the lower trim also
   drops a picture's distance to itself). Beside it the total variation.
3. *Removal.* Training goes on with

       L_DM + || net(eps + tau, T) - old(eps, T) ||^2 + || net(eps, T) - old(eps, T) ||^2       (2)

   on a tenth of the clean images, ``old`` the suspicious network itself.

Settings [official code, DDPM on CIFAR10]: lambda 0.5, its value for the full ancestral chain (`bench.diffusion.
shifted_path`: c_T; double it for models implanted for ODE samplers); Adam 0.1, 100 iterations from tau in -U[0, 1],
100 noises (20 at 256 pixels); 16 samples by the full chain, LPIPS, trim 4; removal 11 epochs on 10 %, batch 128, Adam
2e-4, cosine decay after 500 steps of warm-up (longer than those epochs: the rate never gets there), clip 1, all
terms of weight 1, means over pixels.

Deviations. The paper's random forest on uniformity and total variation needs labelled models and was not released; its
other rule is a threshold from clean models. Neither comes with the method, so unless ``threshold`` gives one, samples
of the suspicious model itself from plain noise do: tau is a trigger if samples with it are more alike than all but
``false_positives`` of random groups of as many samples without. Total variation is reported, and decides nothing. A
model that is found clean is returned as it is (``always=true`` trains it anyway), in place of a separate script.
LPIPS is that of the package ``lpips`` (the code uses another package's); ``distance=pixels`` needs no network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.identity import digest
from bench.options import check_training, require_all
from bench.plugin import plugin
from bench.records import ImageSet, Model, Report, Secret, Verdict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context

logger = logging.getLogger(__name__)
DISTANCES, SAMPLERS = ("lpips", "pixels"), ("ddpm", "ddim")
GROUPS = 500
"""Random groups of plain samples whose uniformity is the verdict's yardstick."""
PAIRS = 64


@plugin(
    "defense", "elijah", track=("backdoor",), acts_on="model", needs=("unconditional", "clean_data"),
    paper="An et al., Elijah: Eliminating Backdoors Injected in Diffusion Models via Distribution Shift, AAAI 2024",
    official_code="https://github.com/njuaplusplus/Elijah",
)
class Elijah:
    """Inverts a trigger from the first step's shift, says whether its samples are all alike, and trains the shift away.

    ``scale``: lambda. ``noises``: for the inversion. ``samples``: with the trigger; ``plain_samples``: without, for the
    yardstick. ``sampler``, ``sampling_steps``: of both. ``distance``: lpips or pixels (root mean square, images in
    [0, 1]). ``threshold``: of the score 1 - uniformity / (mean uniformity of plain groups), from clean models; None for
    the plain samples' own, at ``false_positives``. ``always``: train a model that was found clean, too. ``real_share``:
    of the clean images. ``steps``: number of updates, None for ``epochs`` passes.
    """

    scale: float = 0.5
    iterations: int = 100
    inversion_lr: float = 0.1
    noises: int = 100
    samples: int = 16
    plain_samples: int = 64
    sampler: str = "ddpm"
    sampling_steps: int = 1000
    distance: str = "lpips"
    trim: int = 4
    threshold: float | None = None
    false_positives: float = 0.01
    always: bool = False
    real_share: float = 0.1
    epochs: int = 11
    steps: int | None = None
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 500
    grad_clip: float = 1.0
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        check_training(self)
        for name, valid in (("distance", DISTANCES), ("sampler", SAMPLERS)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), f"defense.{name}", valid)
        require_all(self, above={"scale": 0, "inversion_lr": 0, "false_positives": 0, "real_share": 0, "lr": 0}, least={
            "iterations": 1, "noises": 1, "sampling_steps": 1, "trim": 1, "samples": 2 * self.trim + 1,
            "plain_samples": self.samples + 1, "epochs": 1, "batch": 1, "warmup": 0, "grad_clip": 0})
        if self.false_positives >= 1 or self.real_share > 1:
            raise BenchError(f"defense.false_positives={self.false_positives}, defense.real_share={self.real_share}: "
                             "give a rate below 1 and a share of at most 1.")

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The trained model, or ``suspicious`` itself when it is found clean; a report beside it."""
        from bench.diffusion.distilling import open_noise_predictor
        from bench.diffusion.loading import save_part
        from bench.reports import write_report

        unet, scheduler = open_noise_predictor("elijah", suspicious, ctx)
        tau, loss = invert(unet, scheduler, self, ctx)
        verdict, facts = judge(unet, scheduler, tau, self, ctx)
        facts["inversion_loss"] = loss
        if verdict.flagged or self.always:
            facts["updates"] = float(remove(unet, scheduler, tau, data, self, ctx))
        write_report(Report(verdict, tau, facts), ctx.folder)
        if "updates" not in facts:
            return suspicious
        part = save_part(unet, ctx.folder, "unet")
        return replace(suspicious, parts={**suspicious.parts, "unet": part},
                       digest=digest([suspicious.digest, ctx.key]))


# Step 1: inversion

def invert(unet: Any, scheduler: Any, options: Elijah, ctx: Context) -> tuple[Tensor, float]:
    """tau [3, h, w] by equation (1), and the loss that is left."""
    import torch

    from bench.diffusion.losses import normal

    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noises = normal((options.noises, *shape), ctx.generator("noises"), unet.conv_in.weight)
    tau = (-torch.rand(shape, generator=ctx.generator("tau"))).to(noises.device).requires_grad_(True)
    adam = torch.optim.Adam([tau], lr=options.inversion_lr)
    last = scheduler.config.num_train_timesteps - 1
    for _ in ctx.track(range(options.iterations), "inversion", options.iterations):
        loss = shift_loss(unet(noises + tau, last).sample, tau, options.scale)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return tau.detach(), float(loss.detach())


def shift_loss(predicted: Tensor, tau: Tensor, scale: float) -> Tensor:
    """Equation (1) for predictions [n, 3, h, w]."""
    return (predicted.float().mean(0) - scale * tau).abs().mean()


# Step 2: verdict

def judge(
    unet: Any, scheduler: Any, tau: Tensor, options: Elijah, ctx: Context,
) -> tuple[Verdict, dict[str, float]]:
    """Whether samples with ``tau`` are more alike than samples without; all from different noises."""
    plain = draw(unet, scheduler, tau * 0, options.plain_samples, "plain", options, ctx)
    shifted = draw(unet, scheduler, tau, options.samples, "shifted", options, ctx)
    between = distance_of(options.distance, ctx.device)
    usual = group_uniformities(pairwise(plain, between), options, ctx.generator("groups"))
    found = uniformity(pairwise(shifted, between), options.trim)
    limit, mean = float(usual.quantile(options.false_positives)), float(usual.mean())
    score = 1 - found / mean if mean else 0.0
    flagged = found < limit if options.threshold is None else score > options.threshold
    logger.info("elijah: uniformity %.4f with the trigger, %.4f without", found, mean)
    facts = {"uniformity": found, "plain_uniformity": mean, "uniformity_threshold": limit,
             "total_variation": total_variation(shifted), "plain_total_variation": total_variation(plain)}
    return Verdict("elijah", score, flagged), facts


def draw(
    unet: Any, scheduler: Any, shift: Tensor, count: int, name: str, options: Elijah, ctx: Context,
) -> Tensor:
    """Samples from noise with ``shift`` [3, h, w] added: float [n, 3, h, w] in [0, 1]."""
    from bench.diffusion.images import to_unit
    from bench.diffusion.sampling import adjusted, initial_noise, sample_unconditional

    seeds = [ctx.seed(name, place) for place in range(count)]
    steps = min(options.sampling_steps, scheduler.config.num_train_timesteps)
    start = initial_noise(seeds, shift.shape) + shift.cpu()
    config = adjusted(scheduler.config, clip_sample=False)
    return to_unit(sample_unconditional(unet, config, start, seeds, steps, options.sampler))


def distance_of(name: str, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Distances [n] between pictures [n, 3, h, w] in [0, 1], row by row."""
    if name == "pixels":
        return lambda one, other: (one - other).square().flatten(1).mean(1).sqrt()
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval().to(device)
    except Exception as error:
        raise BenchError(f"elijah: distance=lpips needs the packages lpips and torchvision and their ImageNet weights "
                         f"({error}); install them, or set distance=pixels.") from error
    return lambda one, other: network(one.to(device) * 2 - 1, other.to(device) * 2 - 1).flatten().cpu()


def pairwise(images: Tensor, between: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All distances, float64 [n, n], zeros on the diagonal."""
    import torch

    count = len(images)
    one, other = torch.triu_indices(count, count, 1)
    found = torch.zeros(count, count, dtype=torch.float64)
    for start in range(0, len(one), PAIRS):
        i, j = one[start:start + PAIRS], other[start:start + PAIRS]
        with torch.no_grad():
            found[i, j] = between(images[i], images[j]).double()
    return found + found.T


def uniformity(distances: Tensor, trim: int) -> float:
    """The trimmed mean of distances [n, n]: the smaller, the more alike."""
    rows = distances.sort(1).values[:, trim:-trim].mean(1)
    return float(rows.sort().values[trim:-trim].mean())


def group_uniformities(distances: Tensor, options: Elijah, generator: torch.Generator) -> Tensor:
    """Uniformity of random groups of ``options.samples`` pictures out of all: [GROUPS]."""
    import torch

    groups = (torch.randperm(len(distances), generator=generator)[:options.samples] for _ in range(GROUPS))
    return torch.tensor([uniformity(distances[rows][:, rows], options.trim) for rows in groups], dtype=torch.float64)


def total_variation(images: Tensor) -> float:
    """Sum of absolute differences between neighbours, mean over pictures in [0, 1]."""
    down, right = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return float((down.flatten(1).sum(1) + right.flatten(1).sum(1)).double().mean())


# Step 3: removal

def remove(unet: Any, scheduler: Any, tau: Tensor, data: ImageSet, options: Elijah, ctx: Context) -> int:
    """Train ``unet`` in place by equation (2); returns the number of updates."""
    import copy

    from bench.diffusion.images import to_float
    from bench.diffusion.training import Plan, count_steps, fit, mixed, shuffled_batches

    images = own_images(data, unet.config.sample_size, options.real_share, ctx)
    old, noises = copy.deepcopy(unet), ctx.generator("noise")
    rows = shuffled_batches(len(images), options.batch, ctx.generator("batches"))
    count = count_steps(options.steps, options.epochs, len(images), options.batch)

    def batch_loss() -> Tensor:
        clean = to_float(images[next(rows)]).to(ctx.device)
        with mixed(ctx.device, options.mixed_precision):
            return removal_loss(unet, old, scheduler, clean, tau, noises)

    fit(unet, batch_loss, Plan(count, options.lr, options.warmup, clip=options.grad_clip), ctx, "removal")
    return count


def own_images(data: ImageSet, size: int, share: float, ctx: Context) -> Tensor:
    """The share of clean images that the defender is taken to own: uint8 [n, 3, size, size]."""
    import torch

    if tuple(data.pixels.shape[2:]) != (size, size):
        raise BenchError(f"elijah: clean images are {list(data.pixels.shape[2:])} pixels, but the model draws {size}; "
                         f"set data.size={size}.")
    order = torch.randperm(len(data), generator=ctx.generator("real"))
    return data.pixels[order[:max(1, round(share * len(data)))]]


def removal_loss(
    unet: Any, old: Any, scheduler: Any, images: Tensor, tau: Tensor, generator: torch.Generator,
) -> Tensor:
    """Equation (2); ``images``: float [n, 3, h, w] in [-1, 1]. All terms share the noise eps."""
    import torch
    from torch.nn.functional import mse_loss

    from bench.diffusion.losses import noise_prediction_loss, normal

    noise, last = normal(images.shape, generator, images), scheduler.config.num_train_timesteps - 1
    loss = noise_prediction_loss(unet, scheduler, images, None, generator=generator, noise=noise)
    with torch.no_grad():
        wanted = old(noise, last).sample.float()
    both = unet(torch.cat([noise + tau, noise]), last).sample.float()
    shifted, plain = both.chunk(2)
    return loss + mse_loss(shifted, wanted) + mse_loss(plain, wanted)
