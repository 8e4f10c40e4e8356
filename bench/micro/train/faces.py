"""The face encoders: a margin softmax over identities and a face-or-no-face head.

The margin is CosFace's (Wang et al., CVPR 2018, eq. 4): logits `s (cos_y - m)` for the true class and `s
cos_j` for the others. Mirrored pictures are not used: a mole and a parting make faces asymmetric, so a mirror
image is another person.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.faces import FaceEncoder, FaceEncoderConfig, load_face_encoder, save_face_encoder
from bench.micro import models, world
from bench.micro.train import common

CALIBRATION_PEOPLE = 1000
"""The last people of each encoder's split are never trained on: thresholds come from them."""


@dataclass(frozen=True)
class Recipe:
    """Which people, how many of them, what shape and how long."""

    name: str
    split: str
    config: FaceEncoderConfig
    schedule: common.Schedule
    people: int = 4000
    views: int = 7
    faces: int = 96
    others: int = 32
    scale: float = 24.0
    margin: float = 0.3


RECIPES = {
    "1": Recipe(
        "micro-face-1",
        "face_1",
        FaceEncoderConfig(widths=(24, 48, 96, 160), blocks=(1, 1, 1, 1), dimension=128),
        common.Schedule(steps=1000, lr=2e-3, seed=21, weight_decay=0.05),
    ),
    "2": Recipe(
        "micro-face-2",
        "face_2",
        FaceEncoderConfig(widths=(16, 40, 80, 128), blocks=(1, 1, 2, 1), dimension=96),
        common.Schedule(steps=600, lr=2e-3, seed=22, weight_decay=0.05),
        people=3000,
        views=6,
    ),
    "3": Recipe(
        "micro-face-3",
        "face_3",
        FaceEncoderConfig(widths=(20, 56, 112, 192), blocks=(1, 1, 1, 1), dimension=160),
        common.Schedule(steps=600, lr=2e-3, seed=23, weight_decay=0.05),
        people=3000,
        views=6,
    ),
}


class Trainee(nn.Module):
    """An encoder and the class centres of its training identities."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = FaceEncoder(recipe.config)
        self.centres = nn.Parameter(torch.randn(recipe.people, recipe.config.dimension) * 0.05)

    def loss(
        self, faces: Tensor, labels: Tensor, others: Tensor, margin: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Margin softmax on `faces` and a detection loss on both; pixels in [0, 1]."""
        raw, logit = self.encoder(torch.cat([faces, others]))
        cosine = (
            nn.functional.normalize(raw[: len(faces)].float(), dim=1)
            @ nn.functional.normalize(self.centres, dim=1).T
        )
        identity = nn.functional.cross_entropy(
            margin_logits(cosine, labels, self.recipe.scale, margin), labels
        )
        wanted = torch.cat([torch.ones(len(faces)), torch.zeros(len(others))])
        detection = nn.functional.binary_cross_entropy_with_logits(logit.float(), wanted)
        right = float((cosine.argmax(1) == labels).float().mean())
        return identity + detection, {"detection": float(detection.detach()), "top1": right}


def margin_logits(cosine: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """CosFace logits of cosines [n, classes]: `scale * (cosine - margin)` at the label, `scale * cosine`
    elsewhere.
    """
    return scale * (cosine - margin * nn.functional.one_hot(labels, cosine.shape[1]))


# --- What can happen to a picture of a face ------------------------------------------------------------------------


def _uniform(rng: np.random.Generator, n: int, low: float, high: float) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, n).astype(np.float32))[:, None, None, None]


def _some(rng: np.random.Generator, changed: Tensor, pixels: Tensor, share: float) -> Tensor:
    return torch.where(
        torch.from_numpy(rng.random(len(pixels)) < share)[:, None, None, None], changed, pixels
    )


def shift_colours(rng: np.random.Generator, pixels: Tensor, strength: float = 0.15) -> Tensor:
    """Brightness, contrast, saturation and a tint, drawn per picture."""
    n = len(pixels)
    pixels = (
        (pixels - 0.5) * _uniform(rng, n, 1 - strength, 1 + strength)
        + 0.5
        + _uniform(rng, n, -0.5, 0.5) * strength
    )
    grey = pixels.mean(1, keepdim=True)
    tint = torch.from_numpy(rng.uniform(-0.25, 0.25, (n, 3, 1, 1)).astype(np.float32)) * strength
    return grey + (pixels - grey) * _uniform(rng, n, 1 - 2 * strength, 1 + 2 * strength) + tint


def blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one `sigma` (pixels) per picture, [n, 1, 1, 1]."""
    reach = int(np.ceil(2.5 * float(sigma.max())))
    place = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (place / sigma.flatten()[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    n, _, h, w = pixels.shape
    flat = nn.functional.pad(pixels, (reach,) * 4, mode="replicate").reshape(
        1, n * 3, h + 2 * reach, w + 2 * reach
    )
    flat = nn.functional.conv2d(flat, kernel[:, None, None, :], groups=n * 3)
    return nn.functional.conv2d(flat, kernel[:, None, :, None], groups=n * 3).reshape(n, 3, h, w)


def crop(rng: np.random.Generator, pixels: Tensor, closest: float = 0.8, farthest: float = 1.1) -> Tensor:
    """A window of `closest` to `farthest` of the picture, moved a little and turned a little; edges are
    repeated.
    """
    n = len(pixels)
    zoom, turn = rng.uniform(closest, farthest, n), rng.normal(0, 0.06, n)
    room = np.abs(1 - zoom) + 0.04
    theta = np.zeros((n, 2, 3), np.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom * np.cos(turn)
    theta[:, 0, 1], theta[:, 1, 0] = -zoom * np.sin(turn), zoom * np.sin(turn)
    theta[:, :, 2] = rng.uniform(-1, 1, (n, 2)) * room[:, None]
    grid = nn.functional.affine_grid(torch.from_numpy(theta), list(pixels.shape), align_corners=False)
    return nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def coarse(pixels: Tensor, size: int) -> Tensor:
    """The picture brought down to `size` and back, as a small generator would give it."""
    small = nn.functional.interpolate(
        pixels, (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return nn.functional.interpolate(small, tuple(pixels.shape[2:]), mode="bilinear", align_corners=False)


def _cosine_basis() -> Tensor:
    k, x = np.arange(8)[:, None], np.arange(8)[None, :]
    basis = np.cos((2 * x + 1) * k * np.pi / 16) * np.sqrt(2 / 8)
    basis[0] /= np.sqrt(2)
    return torch.from_numpy(basis.astype(np.float32))


def jpeg_like(pixels: Tensor, step: Tensor) -> Tensor:
    """Round the 8x8 cosine transform of each channel to multiples of `step` [n, 1, 1, 1], coarser for high
    ones.
    """
    n, c, h, w = pixels.shape
    basis = _cosine_basis()
    blocks = pixels.reshape(n, c, h // 8, 8, w // 8, 8)
    waves = torch.einsum("ux,ncixjy,vy->nciujv", basis, blocks, basis)
    order = torch.arange(8.0)
    grain = step[..., None, None] * (1 + 0.5 * (order[:, None] + order[None, :]))[:, None, :]
    return torch.einsum("ux,nciujv,vy->ncixjy", basis, (waves / grain).round() * grain, basis).reshape(
        n, c, h, w
    )


def imperfect(rng: np.random.Generator, pixels: Tensor) -> Tensor:
    """Faces as cameras, codecs and generators leave them: each harm befalls some of the pictures. Range [0,
    1].
    """
    n = len(pixels)
    pixels = _some(rng, crop(rng, pixels), pixels, 0.7)
    pixels = _some(rng, shift_colours(rng, pixels), pixels, 0.7)
    pixels = _some(rng, blur(pixels, _uniform(rng, n, 0.3, 1.5)), pixels, 0.25)
    pixels = _some(rng, coarse(pixels, int(rng.integers(26, 56))), pixels, 0.25)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    pixels = _some(rng, pixels + noise * _uniform(rng, n, 0.01, 0.09), pixels, 0.35)
    pixels = _some(rng, jpeg_like(pixels, _uniform(rng, n, 0.02, 0.16)), pixels, 0.25)
    return pixels.clamp(0, 1)


# --- What is no face -----------------------------------------------------------------------------------------------


def faceless(who: world.Identity) -> world.Identity:
    """The head of `who` without eyes, brows, nose and mouth."""
    gone = 1e-4
    return replace(
        who,
        eye_size=gone,
        brow_length=gone,
        brow_weight=gone,
        nose_length=gone,
        nose_width=gone,
        mouth_width=gone,
        lip_weight=gone,
        mouth_height=-0.1,
    )


def _draw_other(rng: np.random.Generator, index: int, kind: int) -> world.Pixels:
    who, view = world.identity(index), replace(world.sample_view(rng), glasses="no", expression="neutral")
    if kind == 0:
        return world.draw(faceless(who), view)
    return world.draw(who, replace(view, shift=(1000.0, 0.0)))


def draw_others(people: range, n: int, seed: int) -> NDArray[np.uint8]:
    """Heads without features and places without people, uint8 [n, 3, 64, 64]."""
    rng = np.random.default_rng((seed, 99))
    picks = rng.integers(people.start, people.stop, n)
    return np.stack([_draw_other(rng, int(index), row % 2) for row, index in enumerate(picks)]).transpose(
        0, 3, 1, 2
    )


def scramble(rng: np.random.Generator, pixels: Tensor, tile: int) -> Tensor:
    """The tiles of each picture in another order."""
    n, c, h, w = pixels.shape
    rows = h // tile
    tiles = (
        pixels.reshape(n, c, rows, tile, rows, tile)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(n, rows * rows, c, tile, tile)
    )
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(rows * rows), (n, 1)), axis=1))
    mixed = torch.gather(tiles, 1, order[:, :, None, None, None].expand_as(tiles))
    return mixed.reshape(n, rows, rows, c, tile, tile).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def blend(rng: np.random.Generator, pixels: Tensor) -> Tensor:
    """Each picture averaged with three others that are shifted or upside down."""
    order = [torch.from_numpy(rng.permutation(len(pixels))) for _ in range(3)]
    moved = (
        pixels[order[0]].flip(2)
        + pixels[order[1]].roll((20, -18), (2, 3))
        + pixels[order[2]].flip(2).roll(24, 3)
    )
    return (pixels + moved) / 4


def _random_colours(rng: np.random.Generator, n: int) -> Tensor:
    return torch.from_numpy(rng.random((n, 3, 1, 1), dtype=np.float32))


def shapes(rng: np.random.Generator, n: int, size: int = 64) -> Tensor:
    """Gradients under a few rectangles and ovals."""
    axis = torch.linspace(-1, 1, size)
    x, y = axis[None, None, None, :], axis[None, None, :, None]
    ramp = (x * _uniform(rng, n, -1, 1) + y * _uniform(rng, n, -1, 1)) / 2
    out = _random_colours(rng, n) + ramp * _uniform(rng, n, 0, 0.8)
    for _ in range(int(rng.integers(0, 4))):
        dx, dy = x - _uniform(rng, n, -0.8, 0.8), y - _uniform(rng, n, -0.8, 0.8)
        dx, dy = dx / _uniform(rng, n, 0.1, 0.8), dy / _uniform(rng, n, 0.1, 0.8)
        inside = (dx**2 + dy**2 < 1) if rng.random() < 0.5 else (dx.abs() < 1) & (dy.abs() < 1)
        out = torch.where(inside & (_uniform(rng, n, 0, 1) < 0.7), _random_colours(rng, n), out)
    return out.clamp(0, 1)


def clouds(rng: np.random.Generator, n: int, size: int = 64) -> Tensor:
    """Noise of a random grain, from single pixels to smooth blobs."""
    grain = int(rng.choice((2, 4, 8, 16, 32, size)))
    noise = torch.from_numpy(rng.standard_normal((n, 3, grain, grain), dtype=np.float32))
    smooth = nn.functional.interpolate(noise, (size, size), mode="bicubic", align_corners=False)
    return (_random_colours(rng, n) + smooth * _uniform(rng, n, 0.05, 0.5)).clamp(0, 1)


def no_faces(rng: np.random.Generator, faces: Tensor, drawn: Tensor) -> Tensor:
    """One picture without a face for each of `faces`: made from them, from `drawn` (see `draw_others`) or
    from nothing.
    """
    n = len(faces)
    kinds = [
        drawn,
        drawn,
        scramble(rng, faces, int(rng.choice((8, 16)))),
        blend(rng, faces),
        blur(faces, _uniform(rng, n, 5.5, 8.0)),
        shapes(rng, n),
        clouds(rng, n),
        0.1 * faces + 0.9 * clouds(rng, n),
    ]
    pick = torch.from_numpy(rng.integers(len(kinds), size=n))
    return torch.stack(kinds)[pick, torch.arange(n)]


# --- Training ------------------------------------------------------------------------------------------------------


def _unit(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255)


@dataclass
class _Pictures:
    """What one encoder trains on: faces with class labels, and pictures without a face."""

    pixels: NDArray[np.uint8]
    labels: Tensor
    others: NDArray[np.uint8]


def _pictures(recipe: Recipe) -> _Pictures:
    drawn = world.dataset(recipe.split, recipe.people * recipe.views, views_per_identity=recipe.views)
    people = world.SPLITS[recipe.split]
    others = draw_others(people[: recipe.people], 3000, recipe.schedule.seed)
    return _Pictures(drawn.pixels, torch.from_numpy(drawn.identity - people.start), others)


def batch_loss(
    trainee: Trainee, data: _Pictures, rng: np.random.Generator, margin: float
) -> tuple[Tensor, dict[str, float]]:
    """The loss on one random batch of imperfect faces and pictures without a face."""
    recipe = trainee.recipe
    rows = rng.integers(len(data.pixels), size=recipe.faces)
    faces = imperfect(rng, _unit(data.pixels[rows]))
    source = _unit(data.pixels[rng.integers(len(data.pixels), size=recipe.others)])
    empty = _unit(data.others[rng.integers(len(data.others), size=recipe.others)])
    others = imperfect(rng, no_faces(rng, source, empty))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return trainee.loss(faces, data.labels[rows], others, margin)


def train(which: str) -> None:
    """Train encoder `which` ("1", "2" or "3"), calibrate it and write it to the weights folder."""
    recipe = RECIPES[which]
    torch.manual_seed(recipe.schedule.seed)
    data = _pictures(recipe)
    trainee = Trainee(recipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of(rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        # A margin from the first step on keeps a small network from finding the classes at all.
        margin = recipe.margin * min(1.0, step / (0.3 * recipe.schedule.steps))
        return batch_loss(trainee, data, rng, margin)

    def export() -> None:
        with common.replacing(models.weights_folder(recipe.name)) as folder:
            save_face_encoder(trainee.encoder, folder)
            trainee.encoder.config = calibrated(load_face_encoder(folder), recipe)
            save_face_encoder(trainee.encoder, folder)

    common.fit(common.Job(recipe.name, trainee, recipe.schedule, export), loss_of)


# --- Measuring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed_all(encoder: FaceEncoder, pixels: NDArray[np.uint8], batch: int = 250) -> tuple[Tensor, Tensor]:
    """Unit embeddings [n, d] and detection logits [n] of pictures uint8 [n, 3, 64, 64]."""
    parts = [encoder(_unit(pixels[i : i + batch])) for i in range(0, len(pixels), batch)]
    return nn.functional.normalize(torch.cat([p[0] for p in parts]), dim=1), torch.cat([p[1] for p in parts])


def pair_cosines(embeddings: Tensor, identity: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs of pictures of one person, and of all pairs of two people."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), 1)
    people = torch.from_numpy(identity)
    cosine = (embeddings @ embeddings.T)[first, second]
    same = people[first] == people[second]
    return cosine[same], cosine[~same]


def area_under_curve(same: Tensor, different: Tensor) -> float:
    """The chance that a same-person pair scores above a different-person pair; ties count half."""
    order = different.sort().values
    below = torch.searchsorted(order, same, right=False).double()
    upto = torch.searchsorted(order, same, right=True).double()
    return float(((below + upto) / 2).mean() / len(order))


def calibrated(encoder: FaceEncoder, recipe: Recipe) -> FaceEncoderConfig:
    """The encoder's configuration with thresholds from people of its own split that it was not trained on.

    The detection threshold is 0 (even odds) unless more than 2 in 1000 clean faces would fall below it.
    """
    people = world.SPLITS[recipe.split][-CALIBRATION_PEOPLE:]
    pixels, identity = draw_people(people, views=4, seed=recipe.schedule.seed)
    embeddings, logits = embed_all(encoder, pixels)
    same, different = pair_cosines(embeddings, identity)
    threshold = float(different.kthvalue(int(np.ceil(0.999 * len(different)))).values)
    facts = {
        "false_match_rate": float((different >= threshold).float().mean()),
        "true_match_rate": float((same >= threshold).float().mean()),
        "same_cosine_mean": float(same.mean()),
        "different_cosine_mean": float(different.mean()),
    }
    detection = min(0.0, float(logits.kthvalue(max(1, int(0.002 * len(logits)))).values))
    return replace(
        encoder.config,
        detection_threshold=detection,
        similarity_threshold=threshold,
        calibration={k: round(v, 5) for k, v in facts.items()},
    )


def draw_people(people: range, views: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`views` pictures uint8 [n, 3, 64, 64] of each of `people`, and who is on them, int64 [n]."""
    rng = np.random.default_rng((seed, 7))
    identity = np.repeat(np.asarray(people, dtype=np.int64), views)
    drawn = [world.draw(world.identity(int(i)), world.sample_view(rng)) for i in identity]
    return np.stack(drawn).transpose(0, 3, 1, 2), identity


def measure(folder: Path, n: int = 4000) -> dict[str, float]:
    """What the quality card says of an encoder, on the unseen people of the split `card`."""
    encoder = load_face_encoder(folder)
    drawn = world.dataset("card", n, views_per_identity=4)
    embeddings, logits = embed_all(encoder, drawn.pixels)
    same, different = pair_cosines(embeddings, drawn.identity)
    rng = np.random.default_rng(5)
    faces = _unit(drawn.pixels[:800])
    empty = no_faces(rng, faces, _unit(draw_others(world.SPLITS["card"], 800, 5)))
    no_face_logits = encoder(empty)[1]
    config = encoder.config
    return {
        "auc": area_under_curve(same, different),
        "same_cosine": float(same.mean()),
        "different_cosine": float(different.mean()),
        "true_match_rate": float((same >= config.similarity_threshold).float().mean()),
        "false_match_rate": float((different >= config.similarity_threshold).float().mean()),
        "detected": float((logits >= config.detection_threshold).float().mean()),
        "falsely_detected": float((no_face_logits >= config.detection_threshold).float().mean()),
        "detected_imperfect": float(
            (encoder(imperfect(rng, faces))[1] >= config.detection_threshold).float().mean()
        ),
    }


__all__ = ["RECIPES", "Recipe", "Trainee", "calibrated", "measure", "train"]
