"""Perceptual distance of protected photos to their originals: of CLIP features on the core install, or real LPIPS.

The form is that of Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
equation 1: features of several layers, scaled to unit length at every place, their squared difference averaged over
places and summed over channels. Equation 1 weighs channels by a vector learned from people's judgements; LPIPS is the
distance with the published weights, here from the package ``lpips``. ``feature_distance`` has no learned weights (all
one) and averages over layers, in a vision transformer whose patches are the places. It is not LPIPS, and no study says
how it agrees with people: compare it only with itself, on the same extractor.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import CustomizationEvidence, Evidence, Measurement, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from bench.context import Context

    Distance = Callable[[Tensor, Tensor], Tensor]

LPIPS_NETWORKS = ("alex", "vgg")
SMALLEST = 32
"""LPIPS' networks halve a picture four times and more: below this side the last layers see next to nothing."""
BATCH = 32


@plugin("metric", "perceptual", track=("customization",),
        paper="Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018",
        official_code="https://github.com/richzhang/PerceptualSimilarity")
class Perceptual:
    """How visible protection is: ``feature_distance`` (of CLIP features) or ``lpips`` to the original; 0 is the same.

    ``network``: micro-clip or the folder of a CLIPModel gives ``feature_distance``; alex or vgg gives ``lpips``, which
    needs the packages lpips and torchvision (the extra ``gpu``) and their ImageNet weights, fetched at first use.
    Photos are compared at their own size by LPIPS, at the model's by CLIP.
    """

    network: str = "micro-clip"

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """One mean over photos of set B; the interval is over subjects."""
        from bench.measuring import mean_of

        if not isinstance(evidence, CustomizationEvidence):
            raise BenchError("perceptual: needs the evidence of a customization cell.")
        name, distance, facts = self._distance(ctx.device)
        rows: list[Row] = []
        for subject in evidence.subjects:
            before, after = subject.published, evidence.protected[subject.name]
            rows += [Row(f"{subject.name}/{photo}", subject.name, value) for photo, value in
                     zip(after.names, distances(before.pixels, after.pixels, distance), strict=True)]
        return [mean_of(name, rows, "distance", False, facts)]

    def _distance(self, device: str) -> tuple[str, Distance, dict[str, Any]]:
        if self.network in LPIPS_NETWORKS:
            return "lpips", *lpips_distance(self.network, device)
        return "feature_distance", *clip_distance(self.network, device)


def distances(before: Tensor, after: Tensor, distance: Distance) -> list[float]:
    """The distance of each photo, uint8 [n, 3, h, w], to the same one before."""
    import torch

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
    import torch
    from torch.nn.functional import normalize

    each = [(normalize(a, dim=2) - normalize(b, dim=2)).square().sum(2).mean(1)
            for a, b in zip(before, after, strict=True)]
    return torch.stack(each).mean(0)


def lpips_distance(network: str, device: str) -> tuple[Distance, dict[str, Any]]:
    """LPIPS with the published weights of ``network``, and what a comparison must share."""
    model = _lpips(network, device)

    def distance(before: Tensor, after: Tensor) -> Tensor:
        if min(before.shape[2:]) < SMALLEST:
            raise BenchError(f"perceptual: network={network} needs photos of at least {SMALLEST} pixels, these are "
                             f"{list(before.shape[2:])}; micro-clip takes any size.")
        x, y = (part.to(device).float() / 127.5 - 1 for part in (before, after))
        found: Tensor = model(x, y).flatten().cpu()
        return found

    return distance, {"extractor": f"lpips-{network}", "version": str(model.version)}


@lru_cache(maxsize=1)
def _lpips(network: str, device: str) -> Any:
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter when it was built for another torch
        raise BenchError(f"perceptual: network={network} needs the packages lpips and torchvision ({error}); install "
                         "them with `pip install lpips torchvision`, or use micro-clip.") from error
    try:
        model = lpips.LPIPS(net=network, verbose=False)
    except Exception as error:
        raise BenchError(f"perceptual: the ImageNet weights of network={network} could not be loaded ({error}); "
                         "torchvision downloads them at first use into its cache, TORCH_HOME.") from error
    return model.requires_grad_(False).eval().to(device)
