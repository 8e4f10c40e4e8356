"""MetaCloak: perturb photos against surrogates at many points of their training, seen through random transformations.

Liu et al., "MetaCloak: Preventing Unauthorized Subject-driven Text-to-image Diffusion-based Synthesis via
Meta-learning", CVPR 2024 (arXiv:2311.13127). Written from the paper's abstract and from facts about the released code;
no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.options import Variant, require_all, variant
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.finetuning import Lesson, Surrogate
    from bench.diffusion.losses import LatentDistribution
    from bench.diffusion.surrogates import Losses, Studio, Teaching
    from bench.records import ImageSet, Model, Subject


@plugin(
    "defense", "metacloak", track=("customization",), acts_on="images", needs=("text_to_image", "text_encoder"),
    knows=("prompt",), paper="MetaCloak, CVPR 2024, arXiv:2311.13127",
    official_code="https://github.com/liuyixin-louis/MetaCloak",
)
class MetaCloak:
    """Maximises E_T[L_ldm(T(x + delta); theta, c)] over a pool of surrogates theta, meta-learned: each surrogate goes
    on learning the photos while they are perturbed.

    Pool: one DreamBooth run of ``pool_steps`` steps on the clean set B; its weights at the start and just before every
    ``interval``-th step (0, 199, 399, 599, 799, 999). Then, ``trials`` times, for each of these: take its weights, and
    ``interval // surrogate_steps`` times: ``pgd_steps`` steps x <- Pi_eps(x + alpha * sign(grad_x L_ldm(T(x); theta,
    c))) and ``surrogate_steps`` DreamBooth steps of theta on the photos so far.

    T: a square crop with a side of ``min_crop`` to 1 times the photo's, resized back; Gaussian blur with a kernel of
    ``blur_kernel`` pixels and sigma uniform in ``blur_low`` to ``blur_high`` pixels; a mirror image with probability
    ``flip``. Each photo draws its own T at every step.

    ``eps``, ``alpha_255``: 11 levels and a tenth of it [released script]. ``trials``, ``pool_steps``, ``interval``,
    ``surrogate_steps``, ``pgd_steps``: 4, 1000, 200, 2, 6, that is 14,400 pixel steps [released script]. ``lr``,
    ``batch``, ``prior_weight``, ``class_images``: 5e-7, 1, 1, 200 [released script]; ``class_steps``: ours. ``blur_*``,
    ``flip``: 7, 0.1 to 2, 0.5 [released script and the defaults of its library]. ``min_crop``: ours; the released code
    gives no range. ``pgd_batch``: photos per gradient pass; it saves memory, and beyond rounding changes nothing.

    ``variant``: ``described`` trains 32-bit weights on photos in the range that the autoencoder expects, and limits
    the gradient's norm to 1. ``released`` trains bfloat16 weights, in which steps of 5e-7 are almost all rounded away;
    shows the surrogates photos in 0 to 255 where the autoencoder expects -1 to 1 (class images are in range); limits
    nothing, because it clips over an iterator that its optimiser has already used up; and does not crop (it cuts 512
    pixels out of 512).

    Deviations from the released code: there, one T serves all photos of a step, and the steps on a pool surrogate
    always take the first two class images; here both are drawn anew. It cuts fractions of levels off when it saves;
    here photos are rounded. Pixels stay in 32 bits, and weights are copied in place. The text of the paper was read as
    its abstract, so ``described`` is the released algorithm without its slips.
    """

    eps: float = 11.0
    alpha_255: float = 1.1
    trials: int = 4
    pool_steps: int = 1000
    interval: int = 200
    surrogate_steps: int = 2
    pgd_steps: int = 6
    min_crop: float = 0.9
    blur_kernel: int = 7
    blur_low: float = 0.1
    blur_high: float = 2.0
    flip: float = 0.5
    lr: float = 5e-7
    batch: int = 1
    prior_weight: float = 1.0
    class_images: int = 200
    class_steps: int = 50
    train_text_encoder: bool = True
    token: str = "sks"
    pgd_batch: int = 4
    variant: Variant = Variant.described

    def __post_init__(self) -> None:
        Budget(self.eps)
        above: dict[str, float] = {"alpha_255": 0, "lr": 0, "min_crop": 0, "blur_low": 0}
        least: dict[str, float] = {
            "trials": 0, "pool_steps": 0, "pgd_steps": 0, "prior_weight": 0, "flip": 0, "interval": 1, "batch": 1,
            "surrogate_steps": 1, "class_images": 1, "class_steps": 1, "pgd_batch": 1, "blur_high": self.blur_low,
        }
        require_all(self, above, least)
        _require_transformations(self)
        self.variant = variant(self.variant)

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each from a pool of its own."""
        from bench.diffusion.surrogates import protect_each

        workshop = open_workshop(self, model, ctx)
        return protect_each(subjects, self.budget(), model, ctx, "metacloak",
                            lambda subject, x: cloak(self, subject, x, workshop, ctx))

    def teaching(self) -> Teaching:
        from bench.diffusion.surrogates import Teaching

        clip = 1.0 if self.variant is Variant.described else None
        return Teaching(self.lr, self.batch, self.prior_weight, self.class_images, self.class_steps,
                        self.train_text_encoder, self.token, clip)


def _require_transformations(method: MetaCloak) -> None:
    for name in ("min_crop", "flip"):
        if getattr(method, name) > 1:
            raise BenchError(f"defense.{name}={getattr(method, name)} is out of range; give at most 1.")
    if method.blur_kernel < 1 or method.blur_kernel % 2 == 0:
        raise BenchError(f"defense.blur_kernel={method.blur_kernel} has no centre; give an odd number of pixels.")


@dataclass
class Workshop:
    """``theta``: the surrogate, resident for the whole run; ``start``: the published weights."""

    studio: Studio
    theta: Surrogate
    start: list[Tensor]


def open_workshop(method: MetaCloak, model: Model, ctx: Context) -> Workshop:
    """Load the model once, in the variant's precision."""
    from bench.diffusion.pairs import load
    from bench.diffusion.surrogates import Studio, weights_of

    half = method.variant is Variant.released
    studio = Studio(model, method.teaching(), ctx, load(model, ctx.device, half), fused=not half)
    theta = studio.surrogate(studio.components)
    return Workshop(studio, theta, weights_of(theta))


def cloak(method: MetaCloak, subject: Subject, x: Tensor, workshop: Workshop, ctx: Context) -> Tensor:
    """Photos ``x`` [n, 3, h, w] in [-1, 1] after all trials, within the budget; floats."""
    theta, generator, perturbed = workshop.theta, ctx.generator(subject.name), x
    ids = workshop.studio.ids(subject)
    pool = train_pool(method, subject, x, workshop, generator)
    outer, done = method.interval // method.surrogate_steps, 0
    for _ in range(method.trials):
        for weights in pool:
            theta.copy_from(weights)                                               # theta <- theta_i
            for _ in range(outer):
                perturbed = raise_loss(method, workshop, perturbed, x, ids, generator)      # x up E_T L_ldm(T(x))
                lesson = lesson_of(method, subject, perturbed, workshop, generator)
                theta.learn(lesson, method.surrogate_steps)                        # theta down L_db(theta, x)
                done += 1
                ctx.progress(f"metacloak {subject.name}", done, method.trials * len(pool) * outer)
    return perturbed


def train_pool(
    method: MetaCloak, subject: Subject, x: Tensor, workshop: Workshop, generator: torch.Generator,
) -> list[list[Tensor]]:
    """Weights along one DreamBooth run on the clean photos: at its start and before every ``interval``-th step."""
    from bench.diffusion.surrogates import weights_of

    theta = workshop.theta
    theta.copy_from(workshop.start)
    lesson = lesson_of(method, subject, x, workshop, generator)
    pool, taken = [weights_of(theta)], 0
    for step in range(method.interval - 1, method.pool_steps, method.interval):
        if step > taken:
            theta.learn(lesson, step - taken, fresh=taken == 0)
            taken = step
            pool.append(weights_of(theta))
    return pool


def lesson_of(
    method: MetaCloak, subject: Subject, x: Tensor, workshop: Workshop, generator: torch.Generator,
) -> Lesson:
    """DreamBooth batches of the photos as they are now, in the range that the variant shows the autoencoder."""
    shown = x if method.variant is Variant.described else (x + 1) * 127.5
    latents: LatentDistribution = workshop.studio.encode(shown)
    return workshop.studio.lesson(subject, latents, generator)


def raise_loss(
    method: MetaCloak, workshop: Workshop, x: Tensor, origin: Tensor, ids: Tensor, generator: torch.Generator,
) -> Tensor:
    """``pgd_steps`` steps x <- Pi_eps(x + alpha * sign(grad_x L_ldm(T(x); theta, c))), T and noise new in each."""
    import torch

    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import denoising_losses, draw, pixel_gradient

    vae, unet, scheduler = workshop.studio.vae, workshop.theta.unet, workshop.theta.scheduler
    with torch.no_grad():
        states = workshop.theta.states(ids)
    for _ in range(method.pgd_steps):
        transformation = draw_transformation(method, x, generator)
        losses = denoising_losses(vae, unet, scheduler, states, draw(vae, scheduler, x, generator))
        seen = through(transformation, losses)
        x = ascend(x, origin, pixel_gradient(x, seen, method.pgd_batch), method.alpha_255, method.eps)
    return x


@dataclass(frozen=True)
class Transformation:
    """T of n photos. ``windows``: [n, 2, 3], from places of the result to places of the photo, both in [-1, 1], mirror
    included; ``kernels``: [n, k], each a Gaussian of sum 1."""

    windows: Tensor
    kernels: Tensor

    def __call__(self, x: Tensor, part: slice) -> Tensor:
        """T(x) of the photos ``part``, [m, 3, h, w]; differentiable in ``x``."""
        return blur(crop(x, self.windows[part]), self.kernels[part])


def through(transformation: Transformation, losses: Losses) -> Losses:
    """The losses of transformed photos."""
    return lambda pixels, part: losses(transformation(pixels, part), part)


def draw_transformation(method: MetaCloak, x: Tensor, generator: torch.Generator) -> Transformation:
    """Side and place of the window, sigma and side of the mirror of every photo."""
    import torch

    side, across, down, sharpness, mirror = torch.rand(5, len(x), generator=generator)
    smallest = method.min_crop if method.variant is Variant.described else 1.0
    scale = smallest + (1 - smallest) * side
    windows = torch.zeros(len(x), 2, 3)
    windows[:, 0, 0] = scale * torch.where(mirror < method.flip, -1.0, 1.0)
    windows[:, 1, 1] = scale
    windows[:, :, 2] = (1 - scale)[:, None] * (2 * torch.stack([across, down], 1) - 1)
    sigma = method.blur_low + (method.blur_high - method.blur_low) * sharpness
    return Transformation(windows.to(x.device), gaussians(sigma, method.blur_kernel).to(x.device))


def gaussians(sigma: Tensor, size: int) -> Tensor:
    """exp(-u^2 / (2 sigma^2)) at ``size`` whole pixels around 0, normalised; [n, size] of sigmas [n]."""
    import torch

    places = torch.arange(size) - size // 2
    return torch.softmax(-(places[None] / sigma[:, None]).square() / 2, dim=1)


def crop(x: Tensor, windows: Tensor) -> Tensor:
    """Each photo's window, resized to the photo's size, bilinear."""
    from torch.nn.functional import affine_grid, grid_sample

    grid = affine_grid(windows, list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


def blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Each photo [3, h, w] under its own separable kernel [k]; edges are mirrored."""
    from torch.nn.functional import conv2d, pad

    n, channels, height, width = x.shape
    reach = kernels.shape[1] // 2
    rows = kernels.repeat_interleave(channels, 0)[:, None, :]
    planes = pad(x, (reach,) * 4, mode="reflect").reshape(1, n * channels, height + 2 * reach, width + 2 * reach)
    planes = conv2d(planes, rows[:, :, None, :], groups=n * channels)
    return conv2d(planes, rows[:, :, :, None], groups=n * channels).reshape(x.shape)
