"""Aligned face crops that gradients pass through.

A crop is a similarity transform of the photo: five landmarks go to fixed places of a 112 x 112 picture, the template
that ArcFace and its successors were trained with (Deng et al., CVPR 2019). Drawn portraits need no landmarks: there the
whole photo is the crop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import unknown
from bench.faces import recogniser

ALIGNMENTS = ("whole", "insightface:<pack>")
TEMPLATE_SIDE = 112
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where left eye, right eye, nose and the corners of the mouth lie in a 112-pixel crop (x, y)."""


def similarity_transform(points: Tensor, template: Tensor) -> Tensor:
    """The least-squares similarity [2, 3] that takes ``points`` [k, 2] to ``template`` [k, 2] (Umeyama, PAMI 1991)."""
    mean_p, mean_t = points.mean(0), template.mean(0)
    p, t = points - mean_p, template - mean_t
    u, s, vh = torch.linalg.svd(t.T @ p / len(points))
    sign = torch.ones(2, dtype=points.dtype)
    sign[1] = torch.sign(torch.det(u) * torch.det(vh))
    rotation = u @ torch.diag(sign) @ vh
    scale = (s * sign).sum() / p.square().sum(1).mean()
    return torch.cat([scale * rotation, (mean_t - scale * rotation @ mean_p)[:, None]], dim=1)


def face_transforms(pixels: Tensor, how: str, side: int) -> tuple[Tensor, Tensor]:
    """Transforms float32 [n, 2, 3] from photo to crop pixels, and where a face was found, bool [n].

    ``pixels``: uint8 [n, 3, h, w]. ``how``: ``whole``, or ``insightface:<pack>`` for the landmarks of its detector.
    Where no face is found the transform is that of the whole photo.
    """
    scale = side / pixels.shape[-1]
    # Pixel centres: the centre of the first pixel lies half a pixel inside, in the photo as in the crop.
    whole = torch.tensor([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2]]).repeat(len(pixels), 1, 1)
    if how == "whole":
        return whole, torch.ones(len(pixels), dtype=torch.bool)
    if not how.startswith("insightface"):
        raise unknown("alignment", how, "defense.alignment", ALIGNMENTS)
    pack = recogniser(how)
    marks = [_landmarks(photo, pack) for photo in pixels]
    template = torch.tensor(TEMPLATE) * side / TEMPLATE_SIDE
    found = [w if m is None else similarity_transform(m, template) for w, m in zip(whole, marks, strict=True)]
    return torch.stack(found), torch.tensor([m is not None for m in marks])


def _landmarks(photo: Tensor, pack: Any) -> Tensor | None:
    """Five landmarks [5, 2] of the largest face of a photo, uint8 [3, h, w]."""
    faces = pack.analysis.get(photo.flip(0).permute(1, 2, 0).contiguous().numpy())
    if not faces:
        return None
    largest = max(faces, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
    return torch.as_tensor(largest.kps, dtype=torch.float32)


def crop_faces(x: Tensor, transforms: Tensor, side: int) -> Tensor:
    """Crops [n, 3, side, side] of photos [n, 3, h, w], bilinear; differentiable in ``x``."""
    return _sampled(x, _inverse(transforms), (side, side))


def paste_back(crops: Tensor, transforms: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops warped back to where they came from, [n, 3, h, w]; zero outside of them."""
    return _sampled(crops, transforms, size)


def _inverse(transforms: Tensor) -> Tensor:
    linear = torch.linalg.inv(transforms[:, :, :2])
    return torch.cat([linear, -linear @ transforms[:, :, 2:]], dim=2)


def _sampled(x: Tensor, back: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures of ``size`` whose pixel p shows the place ``back`` p of ``x``; zero beyond its edge."""
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    here = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1).to(x)
    places = torch.einsum("nij,hwj->nhwi", back.to(x), here)
    grid = (2 * places + 1) / torch.tensor([x.shape[3], x.shape[2]]).to(x) - 1
    return nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
