"""Encoder ensemble: hide a person from the image encoders that zero-shot adapters read.

After FaceOff (2025), whose objective this is: away from the photo's own embedding and towards another picture's, in an
ensemble of encoders, under Gaussian blur. It is no reproduction of FaceOff: the encoders are those of the model's own
adapters, not the SDXL ones of its paper, hence the plain name. Written from facts about the method and its released
code (github.com/huzimun/FaceOff); no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from enum import Enum
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown
from bench.plugin import facts_of, plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.encoders import Embed
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Losses
    from bench.records import ImageSet, Model, Subject

ADAPTERS = ("ip_image", "ip_face")
NO_GRADIENTS = ("dlib", "insightface")


class Features(Enum):
    """What is compared: a CLIP encoder's ``embedding``, or the ``hidden`` states before its last layer."""

    embedding = "embedding"
    hidden = "hidden"


@plugin(
    "defense", "encoder_ensemble", track=("customization",), acts_on="images", needs=("text_to_image", "ip_image"),
    paper="after FaceOff, 2025", official_code="https://github.com/huzimun/FaceOff",
)
class EncoderEnsemble:
    """Minimises, in every encoder f, w cos(f(x + delta), f(x)) - (1 - w) cos(f(x + delta), f(target)).

    The mean over the encoders, and over the photo as it is and ``blurs`` blurred copies of it.

    ``eps``, ``alpha_255``, ``steps``: budget and step in 0-255 levels, how many steps [FaceOff: 16, 1.275, 100].
    ``encoders``: ``ip_image``, the CLIP encoder of the model's image adapter; ``ip_face``, the recogniser of its face
    adapter; embedded face encoders but the judge; or folders of face encoders. Packs without gradients (InsightFace's,
    dlib) are refused. [FaceOff: the CLIP encoders of IP-Adapter, IP-Adapter Plus and PhotoMaker.] ``features``: of CLIP
    encoders, ``embedding``, which the plain adapter reads [ours], or ``hidden`` [FaceOff, for Plus]. ``weight``: w
    [FaceOff: 0.5]. ``target``: the mask picture [FaceOff: a chosen picture, Mist's, grey, or another person];
    ``pattern`` (drawn by this project), ``grey``, or an image file, whose content ``target_sha256`` pins.
    ``random_start``: begin at a random point of the budget [FaceOff: yes].

    ``blur_size`` [FaceOff: 7], ``blur_low``, ``blur_high``: kernel and range of the standard deviation in pixels of the
    copies, drawn anew for each photo, copy and step [ours: 0.1 to 2, the usual range of that kernel]. ``blurs``: copies
    [ours: 1]. ``pgd_batch``: photos, also of several people, per gradient pass [ours]; it changes rounding only.

    Deviations: FaceOff perturbs a photo scaled to 224 pixels; here the published photo itself is perturbed and the
    encoder's preprocessing (resize, crop, normalise) is part of what is differentiated.
    """

    eps: float = 16.0
    alpha_255: float = 1.275
    steps: int = 100
    encoders: list[str] = field(default_factory=lambda: ["ip_image"])
    features: Features = Features.embedding
    weight: float = 0.5
    target: str = "pattern"
    target_sha256: str = ""
    random_start: bool = True
    blurs: int = 1
    blur_size: int = 7
    blur_low: float = 0.1
    blur_high: float = 2.0
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        from bench.data.targets import check_target
        from bench.options import check_encoders, require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0, "blur_low": 0}, least={"steps": 0, "blurs": 0, "pgd_batch": 1})
        require_all(self, least={"blur_high": self.blur_low})
        check_encoders(self.encoders)
        check_gradients(self.encoders)
        if not 0 <= self.weight <= 1:
            raise BenchError(f"defense.weight={self.weight} is out of range; give 0 to 1.")
        if self.blur_size < 1 or self.blur_size % 2 == 0:
            raise BenchError(f"defense.blur_size={self.blur_size} must be odd and positive.")
        self.target_sha256 = check_target(self.target, self.target_sha256, "defense.target")
        try:
            self.features = Features(self.features)
        except ValueError:
            raise unknown("features", str(self.features), "defense.features", [f.value for f in Features]) from None
        # What the model must offer depends on the option, and the planner reads it from the instance.
        asked = tuple(name for name in ADAPTERS if name in self.encoders)
        self.__plugin__ = replace(facts_of(type(self)), needs=("text_to_image", *asked))

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.encoders import open_encoders
        from bench.diffusion.surrogate_free import protect_crowds

        ensemble = open_encoders(self.encoders, model, ctx.device, self.features is Features.hidden)
        return protect_crowds(subjects, self.budget(), model, ctx, "encoder_ensemble", self.pgd_batch,
                              lambda crowd: hide(self, crowd, ensemble, ctx))


def check_gradients(names: Sequence[str]) -> None:
    """Refuse recognisers that give no gradients for a whole photo, before any work starts."""
    for name in names:
        if name.partition(":")[0] in NO_GRADIENTS:
            raise BenchError(f"defense.encoders: '{name}' gives no gradients (it does not run in torch); give the "
                             "folder of a FaceEncoder (config.json, model.safetensors).")


def hide(method: EncoderEnsemble, crowd: Crowd, ensemble: Sequence[Embed], ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x - alpha * sign(grad_x L))."""
    import torch

    from bench.data.targets import target_picture
    from bench.diffusion.images import to_unit
    from bench.diffusion.projected_gradient import descend
    from bench.diffusion.surrogates import pixel_gradient

    mask = to_unit(target_picture(method.target, crowd.x.shape[-1])).to(crowd.x)
    with torch.no_grad():
        own = [torch.cat([f((x + 1) / 2) for x in torch.split(crowd.x, method.pgd_batch)]) for f in ensemble]
        other = [f(mask) for f in ensemble]
    x = crowd.start(method.eps, method.random_start)
    for step in range(method.steps):
        sigmas = crowd.uniform((method.blurs,), method.blur_low, method.blur_high)
        losses = similarities(method, ensemble, own, other, sigmas)
        gradient = pixel_gradient(x, losses, method.pgd_batch)
        x = descend(x, crowd.x, gradient, method.alpha_255, method.eps)
        ctx.progress("encoder_ensemble", step + 1, method.steps)
    return x


def similarities(
    method: EncoderEnsemble, ensemble: Sequence[Embed], own: Sequence[Tensor], other: Sequence[Tensor], sigmas: Tensor,
) -> Losses:
    """L of each photo. ``own``, ``other``: each encoder's embeddings of the clean photos [n, ..., d] and of the mask
    [1, ..., d]; ``sigmas``: [n, blurs]."""
    import torch

    from bench.diffusion.encoders import gaussian_blur

    def losses(pixels: Tensor, part: slice) -> Tensor:
        unit = (pixels + 1) / 2
        copies = [unit, *(gaussian_blur(unit, sigma, method.blur_size) for sigma in sigmas[part].unbind(1))]
        terms = [method.weight * cosine(found, mine[part]) - (1 - method.weight) * cosine(found, mask)
                 for f, mine, mask in zip(ensemble, own, other) for found in map(f, copies)]
        return torch.stack(terms).mean(0)

    return losses


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of embeddings [n, ..., d] along d, its mean over tokens: [n]."""
    import torch

    return torch.nn.functional.cosine_similarity(a, b, dim=-1).reshape(len(a), -1).mean(1)
