"""Aligned crops: the transform is the least-squares one, a warp and its inverse meet, the judge is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.diffusion.encoders import face_encoder
from bench.errors import BenchError
from bench.face_crops import (
    TEMPLATE,
    crop_faces,
    face_transforms,
    paste_back,
    similarity_transform,
)
from bench.faces import FaceEncoder, FaceEncoderConfig, save_face_encoder


def test_the_transform_recovers_a_known_similarity() -> None:
    angle, scale, shift = 0.3, 2.5, torch.tensor([7.0, -4.0])
    linear = scale * torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).float()
    template = torch.tensor(TEMPLATE)
    points = (template - shift) @ torch.linalg.inv(linear).T
    found = similarity_transform(points, template)
    assert torch.allclose(found[:, :2], linear, atol=1e-4)
    assert torch.allclose(found[:, 2], shift, atol=1e-3)


def test_the_transform_has_the_least_squared_error_of_all_similarities() -> None:
    torch.manual_seed(0)
    points, template = torch.randn(5, 2), torch.tensor(TEMPLATE)
    best = similarity_transform(points, template)

    def error(m: torch.Tensor) -> float:
        return float((points @ m[:, :2].T + m[:, 2] - template).square().sum())

    # Numpy's own least squares over (a, b, tx, ty) with the similarity [[a, -b], [b, a]].
    x, y = points.numpy().T
    one, zero = np.ones(5), np.zeros(5)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    a, b, tx, ty = np.linalg.lstsq(rows, template.numpy().T.reshape(-1), rcond=None)[0]
    assert error(best) == pytest.approx(error(torch.tensor([[a, -b, tx], [b, a, ty]]).float()), rel=1e-4)


def test_the_whole_photo_is_its_own_crop_at_its_own_size() -> None:
    x = torch.rand(2, 3, 16, 16)
    transforms, found = face_transforms((x * 255).byte(), "whole", 16)
    assert found.all()
    assert torch.allclose(crop_faces(x, transforms, 16), x, atol=1e-5)
    assert torch.allclose(paste_back(x, transforms, (16, 16)), x, atol=1e-5)


def test_a_crop_pasted_back_lands_where_it_came_from() -> None:
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    smooth = torch.stack([xs, ys, xs * ys])[None]
    transforms = torch.tensor([[[0.8, -0.2, 4.0], [0.2, 0.8, -6.0]]])
    back = paste_back(crop_faces(smooth, transforms, 40), transforms, (64, 64))
    inside = paste_back(torch.ones(1, 3, 40, 40), transforms, (64, 64)) > 0.999
    assert 300 < inside[0, 0].sum() < 40 * 40 / 0.68
    # Bilinear values of crop pixels that lie outside the photo are cut to zero; stay two pixels inside.
    inside[..., :3, :] = inside[..., -3:, :] = False
    inside[..., :, :3] = inside[..., :, -3:] = False
    assert (back - smooth)[inside].abs().max() < 0.03


def test_a_gradient_reaches_the_photo_through_crop_and_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_face_encoder(FaceEncoder(FaceEncoderConfig(widths=(8, 8, 8, 8), dimension=8, size=32)).eval(), tmp_path)
    embed = face_encoder(str(tmp_path), "cpu")
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    transforms, _ = face_transforms((x.detach() * 255).byte(), "whole", 24)
    gradient = torch.autograd.grad(embed(crop_faces(x, transforms, 24))[:, 0].sum(), x)[0]
    assert gradient.abs().sum() > 0


def test_an_unknown_alignment_is_refused() -> None:
    with pytest.raises(BenchError, match=r"alignment.*whole"):
        face_transforms(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "sideways", 8)
