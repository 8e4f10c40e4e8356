"""How far one picture lies from another, picture by picture: PSNR, SSIM, VIF and deep features.

Pictures are uint8 [n, 3, h, w]; value i compares picture i of both sides. FSIM has a file of its own (`bench.fsim`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.errors import BenchError

Distance = Callable[[Tensor, Tensor], Tensor]

WINDOW = 11
"""Side of SSIM's Gaussian window (sigma 1.5), the original's."""
SSIM_FACTS = {"window": f"gaussian, {WINDOW} pixels, sigma 1.5", "data_range": 1}
VIF_SMALLEST = 41
"""Below this side nothing is left of the coarsest of VIF's four scales."""
VIF_FACTS = {"domain": "pixels", "channels": "luma", "scales": 4, "noise_variance": 2.0}
LPIPS_NETWORKS = ("alex", "vgg")
SMALLEST = 32
"""LPIPS' networks halve a picture four times and more: below this side the last layers see next to nothing."""
BATCH = 32


def peak_ratio(before: Tensor, after: Tensor) -> list[float | None]:
    """PSNR = 10 log10(255^2 / MSE) of each picture in dB, None where nothing changed."""
    errors = (after.double() - before.double()).square().flatten(1).mean(1).tolist()
    return [10 * math.log10(255**2 / error) if error else None for error in errors]


def similarity(before: Tensor, after: Tensor) -> list[float | None]:
    """SSIM (Wang et al., IEEE TIP 2004) of each picture, None where the window is larger than the picture."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    from bench.diffusion.images import to_unit

    if min(before.shape[2:]) < WINDOW:
        return [None] * len(before)
    values = structural_similarity_index_measure(
        to_unit(after), to_unit(before), gaussian_kernel=True, sigma=1.5, data_range=1.0, reduction="none")
    found: list[float | None] = list(values.tolist())  # type: ignore[union-attr]
    return found


def information(before: Tensor, after: Tensor) -> list[float | None]:
    """VIF in the pixel domain (Sheikh and Bovik, IEEE TIP 15(2), 2006) of each picture's brightness: the share of the
    information in ``before`` that ``after`` still holds; 1 for the same, more where contrast rose. None where a picture
    is smaller than 41 pixels, or flat before, so that there is no information to keep."""
    from torchmetrics.functional.image import visual_information_fidelity

    from bench.fsim import luma

    if min(before.shape[2:]) < VIF_SMALLEST:
        return [None] * len(before)
    pairs = zip(luma(after)[:, None, None], luma(before)[:, None, None], strict=True)
    values = [float(visual_information_fidelity(new, old, sigma_n_sq=2.0)) for new, old in pairs]
    return [value if math.isfinite(value) else None for value in values]


def deep_distance(network: str, device: str) -> tuple[str, Distance, dict[str, Any]]:
    """A distance by what it is called: ``lpips`` for alex and vgg, else ``feature_distance`` of a CLIPModel, micro-clip
    or a folder. The form is equation 1 of Zhang et al., CVPR 2018; what both are, and how they differ, is said at the
    metric ``perceptual``. With it, what a comparison must share."""
    if network in LPIPS_NETWORKS:
        return "lpips", *lpips_distance(network, device)
    return "feature_distance", *clip_distance(network, device)


def distances(before: Tensor, after: Tensor, distance: Distance) -> list[float]:
    """The distance of each picture, uint8 [n, 3, h, w], to the same one before."""
    with torch.no_grad():
        parts = [distance(before[i:i + BATCH], after[i:i + BATCH]) for i in range(0, len(before), BATCH)]
    values: list[float] = torch.cat(parts).double().tolist()
    return values


def clip_distance(network: str, device: str) -> tuple[Distance, dict[str, Any]]:
    """The distance of a CLIP vision tower's patch features, and what a comparison must share."""
    from bench.features import clip

    model = clip(network, device)
    layers = model.model.config.vision_config.num_hidden_layers
    facts = {**model.facts, "layers": f"1 to {layers}, patches only, unit length"}
    return lambda before, after: feature_distance(model.layers(before), model.layers(after)), facts


def feature_distance(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Equation 1 with all weights one, averaged over layers: [n] from features [n, places, channels] per layer."""
    from torch.nn.functional import normalize

    each = [(normalize(a, dim=2) - normalize(b, dim=2)).square().sum(2).mean(1)
            for a, b in zip(before, after, strict=True)]
    return torch.stack(each).mean(0)


def lpips_distance(network: str, device: str) -> tuple[Distance, dict[str, Any]]:
    """LPIPS with the published weights of ``network``, and what a comparison must share."""
    model = _lpips(network, device)

    def distance(before: Tensor, after: Tensor) -> Tensor:
        if min(before.shape[2:]) < SMALLEST:
            raise BenchError(f"perceptual distance: network={network} needs photos of at least {SMALLEST} pixels, "
                             f"these are {list(before.shape[2:])}; micro-clip takes any size.")
        x, y = (part.to(device).float() / 127.5 - 1 for part in (before, after))
        found: Tensor = model(x, y).flatten().cpu()
        return found

    return distance, {"extractor": f"lpips-{network}", "version": str(model.version)}


@lru_cache(maxsize=1)
def _lpips(network: str, device: str) -> Any:
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter when it was built for another torch
        raise BenchError(f"perceptual distance: network={network} needs the packages lpips and torchvision ({error}); "
                         "install them with `pip install lpips torchvision`, or use micro-clip.") from error
    try:
        model = lpips.LPIPS(net=network, verbose=False)
    except Exception as error:
        raise BenchError(f"perceptual distance: the ImageNet weights of network={network} could not be loaded "
                         f"({error}); torchvision downloads them at first use into its cache, TORCH_HOME.") from error
    return model.requires_grad_(False).eval().to(device)
