"""EditShield: shift the photo's latents away from where they were, robustly under what an editor may do to the photo.

Chen et al., "EditShield: Protecting Unauthorized Image Editing by Instruction-guided Diffusion Models", ECCV 2024
(arXiv:2311.12066). Written from the paper's objective and from facts about the released code; no line of that code is
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.options import Variant, require_all, variant
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Draws, Losses
    from bench.records import ImageSet, Model, Subject

TRANSFORMS = ("none", "crop", "blur", "rotate")
PIXEL_WEIGHT = 0.1
SMOOTH_WEIGHT = 0.1
"""Weights of the released terms that hold the photo back, on the [0, 1] scale."""
BLUR_SIZE, BLUR_SIGMA = 5, 1.5
"""Of the released Gaussian, in pixels."""
SHIFT = 1 / 16
"""A random crop or angle moves the picture by up to this share of its side, at the edge of the picture."""


@plugin(
    "defense", "editshield", track=("editing",), acts_on="images", needs=("latents",),
    paper="EditShield, ECCV 2024, arXiv:2311.12066", official_code="https://github.com/Allen-piexl/Editshield",
)
class EditShield:
    """Maximises the shift of the photo's latents; only the autoencoder's encoder is needed.

    ``variant=described``: max over ||delta||_inf <= eps of E_g || E(g(x + delta)) - E(g(x)) ||^2, sign steps of
    ``alpha_255`` after a random start, g drawn from ``transform`` anew at every step (expectation over transformation):
    ``none``, ``crop`` (a random window, scaled up), ``blur`` (a Gaussian), ``rotate`` (a small random angle).

    ``variant=released``: Adam at ``lr`` on pixels in [0, 1], no projection (its ``pgd_eps`` is never read), down
    -|| [z_t, z](x') - [z_t, z](x) ||^2 + 0.1 || x' - x ||^2 as means, where z is a draw of the encoder's posterior and
    z_t its noised, scaled self, both drawn anew at every step for x' but once for x; the encoder, which expects [-1,
    1], is given [0, 1]. With ``blur`` it adds
    0.1 || G(x') - G(x) ||^2. Its crop and rotation change the photo once, before the optimisation, and so are the same
    as ``none`` on square photos: refused here. Steps of Adam are at most about ``lr``, which keeps 30 of them within
    7.65 levels; ours are cut to ``eps`` levels when the file is written, for a budget is a promise about the file.

    ``steps``, ``lr`` [released: 30, Adam's default 0.001]. ``eps`` [released, unused: 0.05 on [0, 1], 12.75 levels],
    ``alpha_255`` [released, unused: 1]. Crops and angles move the picture's edge by up to 1/16 of its side [ours].
    ``pgd_batch``: photos per pass [ours]; it changes rounding only.

    Deviations: in 32 bits, there in bfloat16. The random start, uniform in the budget, is ours: the described shift has
    no gradient at delta = 0.
    """

    eps: float = 12.75
    alpha_255: float = 1.0
    steps: int = 30
    lr: float = 1e-3
    transform: str = "blur"
    variant: Variant = Variant.described
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        Budget(self.eps)
        require_all(self, above={"alpha_255": 0, "lr": 0}, least={"steps": 0, "pgd_batch": 1})
        self.variant = variant(self.variant)
        if self.transform not in TRANSFORMS:
            raise unknown("transform", self.transform, "defense.transform", TRANSFORMS)
        if self.variant is Variant.released and self.transform in ("crop", "rotate"):
            raise BenchError(f"defense.transform={self.transform}: the released code transforms a photo once, before "
                             "it optimises, which does nothing here; take none or blur, or "
                             "defense.variant=described.")

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.loading import load_modules, load_schedule
        from bench.diffusion.surrogate_free import protect_crowds

        vae, scheduler = load_modules(model, ctx.device)["vae"], load_schedule(model)
        shift = shift_described if self.variant is Variant.described else shift_released
        return protect_crowds(subjects, self.budget(), model, ctx, "editshield", self.pgd_batch,
                              lambda crowd: shift(self, crowd, vae, scheduler, ctx))


def shift_described(method: EditShield, crowd: Crowd, vae: Any, scheduler: Any, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x + alpha * sign(grad_x L))."""
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import pixel_gradient

    x = crowd.start(method.eps, True)
    for step in range(method.steps):
        places = crowd.uniform((3,), -1, 1)
        gradient = pixel_gradient(x, shifts(method, vae, crowd.x, places), method.pgd_batch)
        x = ascend(x, crowd.x, gradient, method.alpha_255, method.eps)
        ctx.progress("editshield", step + 1, method.steps)
    return x


def shifts(method: EditShield, vae: Any, clean: Tensor, places: Tensor) -> Losses:
    """|| E(g(x)) - E(g(x_0)) ||^2 of each photo, mean over the latent; ``places``: what g is drawn from, [n, 3]."""
    import torch

    from bench.diffusion.editors import distances
    from bench.diffusion.losses import latent_distribution

    def losses(pixels: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            wanted = latent_distribution(vae, transformed(method.transform, clean[part], places[part])).mean
        found = latent_distribution(vae, transformed(method.transform, pixels, places[part])).mean
        return distances(found, wanted)

    return losses


def transformed(name: str, x: Tensor, places: Tensor) -> Tensor:
    """g(x), the same size. ``places``: [n, 3] in [-1, 1): what a crop's corner and size, or an angle, come from."""
    if name == "blur":
        return blurred(x)
    if name == "none":
        return x
    return warped(x, cropping(places) if name == "crop" else rotation(places[:, 0]))


def blurred(x: Tensor) -> Tensor:
    """The released Gaussian."""
    from bench.diffusion.encoders import gaussian_blur

    return gaussian_blur(x, x.new_full((len(x),), BLUR_SIGMA), BLUR_SIZE)


def cropping(places: Tensor) -> Tensor:
    """Windows that lose up to 2 * SHIFT of the side, anywhere: [n, 2, 3]."""
    import torch

    lost = (places[:, 2] + 1) * SHIFT
    shift = places[:, :2] * lost[:, None]
    return torch.cat([torch.diag_embed((1 - lost)[:, None].expand(-1, 2)), shift[:, :, None]], dim=2)


def rotation(places: Tensor) -> Tensor:
    """Turns by up to the angle that moves the middle of an edge by 2 * SHIFT half sides: [n, 2, 3]."""
    import torch

    angle = places * 2 * SHIFT
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)


def warped(x: Tensor, transforms: Tensor) -> Tensor:
    """Photos seen through affine maps [n, 2, 3] of coordinates in [-1, 1]; mirrored beyond the edge."""
    from torch.nn.functional import affine_grid, grid_sample

    grid = affine_grid(transforms, list(x.shape), align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


# -- As released -------------------------------------------------------------------------------------------------------


def shift_released(method: EditShield, crowd: Crowd, vae: Any, scheduler: Any, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] after ``steps`` steps of Adam on pixels in [0, 1], with no projection."""
    import torch

    from bench.diffusion.editors import without_gradient
    from bench.diffusion.surrogates import pixel_gradient

    clean = (crowd.x + 1) / 2
    first = crowd.draw(vae, scheduler)
    wanted = without_gradient(clean, lambda x, part: embedded(vae, scheduler, x, first, part), method.pgd_batch)
    x = clean.clone()
    adam = torch.optim.Adam([x], lr=method.lr)
    for step in range(method.steps):
        losses = released_losses(method, vae, scheduler, clean, wanted, crowd.draw(vae, scheduler))
        x.grad = pixel_gradient(x, losses, method.pgd_batch)
        adam.step()
        ctx.progress("editshield", step + 1, method.steps)
    return x * 2 - 1


def embedded(vae: Any, scheduler: Any, unit: Tensor, draws: Draws, part: slice) -> Tensor:
    """[z_t, z] of photos in [0, 1], which the released code gives to the encoder as they are: z_t scaled, z not."""
    import torch

    from bench.diffusion.losses import latent_distribution

    z = draws.latents(latent_distribution(vae, unit), part)
    noisy = scheduler.add_noise(z, draws.noise[part], draws.timesteps[part])
    return torch.cat([noisy, z / vae.config.scaling_factor], dim=1)


def released_losses(
    method: EditShield, vae: Any, scheduler: Any, clean: Tensor, wanted: Tensor, draws: Draws,
) -> Losses:
    """-|| [z_t, z](x') - [z_t, z](x) ||^2 + 0.1 || x' - x ||^2 (+ 0.1 || G(x') - G(x) ||^2), means, of each photo."""
    from bench.diffusion.editors import distances

    def losses(unit: Tensor, part: slice) -> Tensor:
        found = -distances(embedded(vae, scheduler, unit, draws, part), wanted[part])
        found = found + PIXEL_WEIGHT * distances(unit, clean[part])
        if method.transform == "blur":
            found = found + SMOOTH_WEIGHT * distances(blurred(unit), blurred(clean[part]))
        return found

    return losses
