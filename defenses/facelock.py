"""FaceLock: after the editor's autoencoder, the face is another one, and the photo looks changed.

Wang et al., "Edit Away and My Face Will not Stay: Personal Biometric Defense against Malicious Generative Editing",
CVPR 2025 (arXiv:2411.16832). Written from the paper's objective and from facts about the released code; no line of that
code is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.encoders import Embed
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Losses
    from bench.records import ImageSet, Model, Subject

AUTOENCODER = "autoencoder"
NETWORKS = ("alex", "vgg", "squeeze")
Distance = Callable[["Tensor", "Tensor"], "Tensor"]
"""How different pictures [n, 3, h, w] in [-1, 1] look, [n]."""


@plugin(
    "defense", "facelock", track=("editing",), acts_on="images", needs=("latents",),
    paper="FaceLock, CVPR 2025, arXiv:2411.16832", official_code="https://github.com/taco-group/FaceLock",
)
class FaceLock:
    """Lowers a face recogniser's similarity of the photo's reconstruction to the photo; only the autoencoder is needed.

    Maximised, with x' = x + delta and D(E(x')) its reconstruction, cut to the range of images:
    -[i >= 0.35 N] cos(F(D(E(x'))), F(x)) + ``latent_weight`` || E(x') - E(x) ||^2 + [i > 0.25 N] d(D(E(x')), x) at step
    i of N: first the latents move, then the looks, then the face. E is the unscaled mean; the square is a mean.

    ``eps``, ``alpha_255``, ``steps``: budget and first step in 0-255 levels, how many steps [released: 0.03 and 0.01 on
    the [-1, 1] scale, so 3.825 and 1.275 levels; 100]. Step i has the length alpha (1 - 0.99 i / N), after a start
    uniform in the budget [released]. ``latent_weight`` [released: 0.2], ``face_from``, ``looks_from`` [released: 0.35,
    0.25]. ``encoders``: F, the mean over several [released: one recogniser of CVLFace]: embedded face encoders but the
    judge, folders of face encoders, or ``insightface:<pack>``; ``alignment``, ``face_size``: how its crop is found,
    ``whole`` photo or ``insightface:<pack>``, in the original. ``perceptual``: d: LPIPS with the network ``alex``,
    ``vgg`` or ``squeeze`` [released: LPIPS], which needs torchvision; or ``autoencoder``, the same formula on the
    features of the editor's own encoder, all weights one [ours]. ``pgd_batch``: photos per pass [ours]; it changes
    rounding only.

    Deviations: in 32 bits, there 16; a photo's landmarks are found once, in the original, there at every step.
    """

    eps: float = 3.825
    alpha_255: float = 1.275
    steps: int = 100
    latent_weight: float = 0.2
    face_from: float = 0.35
    looks_from: float = 0.25
    encoders: list[str] = field(default_factory=lambda: ["insightface:buffalo_l"])
    alignment: str = "insightface:buffalo_l"
    face_size: int = 112
    perceptual: str = "alex"
    pgd_batch: int = 4

    def __post_init__(self) -> None:
        from bench.options import check_encoders, require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0}, least={
            "steps": 0, "latent_weight": 0, "face_from": 0, "looks_from": 0, "face_size": 16, "pgd_batch": 1})
        check_encoders(self.encoders)
        if self.perceptual not in (AUTOENCODER, *NETWORKS):
            raise unknown("value", self.perceptual, "defense.perceptual", (AUTOENCODER, *NETWORKS))

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.encoders import face_encoder
        from bench.diffusion.loading import load_modules
        from bench.diffusion.surrogate_free import protect_crowds

        vae = load_modules(model, ctx.device)["vae"]
        recognisers = [face_encoder(name, ctx.device) for name in self.encoders]
        looks = autoencoder_distance(vae) if self.perceptual == AUTOENCODER else lpips(self.perceptual, ctx.device)
        return protect_crowds(subjects, self.budget(), model, ctx, "facelock", self.pgd_batch,
                              lambda crowd: lock(self, crowd, Tools(vae, recognisers, looks), ctx))

    def step_length(self, step: int) -> float:
        """In levels: alpha at the first step, falling linearly to almost alpha / 100 at the last."""
        return self.alpha_255 * (1 - 0.99 * step / self.steps)

    def weights(self, step: int) -> Weights:
        """What counts at step i."""
        return Weights(float(step >= self.face_from * self.steps), self.latent_weight,
                       float(step > self.looks_from * self.steps))


@dataclass(frozen=True)
class Tools:
    """``recognisers``: F; ``looks``: d."""

    vae: Any
    recognisers: Sequence[Embed]
    looks: Distance


@dataclass(frozen=True)
class Weights:
    """Of the three terms."""

    face: float
    latent: float
    looks: float


@dataclass(frozen=True)
class Clean:
    """Of the original photos: themselves, E(x), each recogniser's F(x), and where their faces lie."""

    x: Tensor
    latents: Tensor
    faces: Sequence[Tensor]
    transforms: Tensor


def lock(method: FaceLock, crowd: Crowd, tools: Tools, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x + alpha_i * sign(grad_x L_i))."""
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import pixel_gradient

    clean = known(method, crowd.x, tools)
    x = crowd.start(method.eps, True)
    for step in range(method.steps):
        losses = objectives(method, tools, clean, method.weights(step))
        x = ascend(x, crowd.x, pixel_gradient(x, losses, method.pgd_batch), method.step_length(step), method.eps)
        ctx.progress("facelock", step + 1, method.steps)
    return x


def known(method: FaceLock, x: Tensor, tools: Tools) -> Clean:
    """What does not change over the steps."""
    import torch

    from bench.diffusion.images import to_uint8
    from bench.face_crops import face_transforms

    transforms = face_transforms(to_uint8(x), method.alignment, method.face_size)[0].to(x)
    with torch.no_grad():
        faces = embedded(method, x, transforms, tools)
        return Clean(x, encoded(tools.vae, x), faces, transforms)


def encoded(vae: Any, x: Tensor) -> Tensor:
    """E(x): the posterior's mean, unscaled."""
    mean: Tensor = vae.encode(x).latent_dist.mean
    return mean


def embedded(method: FaceLock, x: Tensor, transforms: Tensor, tools: Tools) -> list[Tensor]:
    """F of the faces in x, for each recogniser: [n, d]."""
    from bench.face_crops import crop_faces

    crops = ((crop_faces(x, transforms, method.face_size) + 1) / 2).clamp(0, 1)
    return [embed(crops) for embed in tools.recognisers]


def objectives(method: FaceLock, tools: Tools, clean: Clean, weights: Weights) -> Losses:
    """What is maximised, of each photo. Terms without weight are not computed."""
    import torch

    from bench.diffusion.editors import distances

    def losses(pixels: Tensor, part: slice) -> Tensor:
        latents = encoded(tools.vae, pixels)
        found = weights.latent * distances(latents, clean.latents[part])
        if weights.face == weights.looks == 0:
            return found
        picture = tools.vae.decode(latents).sample.clamp(-1, 1)
        if weights.looks:
            found = found + weights.looks * tools.looks(picture, clean.x[part])
        if weights.face:
            faces = embedded(method, picture, clean.transforms[part], tools)
            cosines = torch.stack([(a * b[part]).sum(1) for a, b in zip(faces, clean.faces, strict=True)])
            found = found - weights.face * cosines.mean(0)
        return found

    return losses


def autoencoder_distance(vae: Any) -> Distance:
    """The form of LPIPS (Zhang et al., CVPR 2018, eq. 1) on what each block of the encoder says of each place: unit
    length over channels, squared difference, mean over places; summed over blocks."""
    from torch.nn.functional import normalize

    def features(x: Tensor) -> list[Tensor]:
        found, state = [], vae.encoder.conv_in(x)
        for block in vae.encoder.down_blocks:
            state = block(state)
            found.append(normalize(state, dim=1))
        return found

    def distance(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(features(a), features(b), strict=True)
        parts = [(one - other).square().sum(1).flatten(1).mean(1) for one, other in pairs]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    return distance


def lpips(network: str, device: str) -> Distance:
    """LPIPS with the published weights."""
    try:
        import lpips as package
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter when it was built for another torch
        raise BenchError(f"defense.perceptual={network} needs the packages lpips and torchvision ({error}); install "
                         f"them, or take {AUTOENCODER}.") from error
    model = package.LPIPS(net=network, verbose=False).requires_grad_(False).eval().to(device)
    return lambda a, b: model(a, b).flatten()
