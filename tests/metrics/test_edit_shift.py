"""Shift of edits: what is compared with what, and which way each measure points."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.errors import BenchError
from bench.records import Measurement
from metrics.edit_shift import EditShift, next_seed
from tests.metrics.edits import drawn, evidence, noisy, originals

NAMES = ("edit_psnr", "edit_ssim", "edit_vifp", "edit_fsim", "edit_feature_distance")


def shift(edited: Tensor, benign: Tensor, folder: Path, count: int = 3) -> dict[str, Measurement]:
    shown = evidence(drawn(count), edited, benign)
    return {m.name: m for m in EditShift().measure(shown, Context("key", folder))}


def other_seeds(levels: int) -> Tensor:
    """Benign edits: of each photo itself, and itself under noise."""
    pictures = originals(drawn(3))
    pictures[1::2] = noisy(pictures[1::2], levels, seed=5)
    return pictures


def test_all_five_and_their_control_in_order(tmp_path: Path) -> None:
    benign = other_seeds(20)
    found = shift(noisy(benign, 8), benign, tmp_path)
    assert list(found) == [*NAMES, *(f"{name}@seeds" for name in NAMES)]
    assert {name: found[name].higher_is_better for name in NAMES} == {
        **dict.fromkeys(NAMES, False), "edit_feature_distance": True}
    assert {found[f"{name}@seeds"].higher_is_better for name in NAMES} == {None}
    assert all(m.value is not None and m.n == 6 and len({r.cluster for r in m.rows}) == 3 for m in found.values())
    assert [row.sample for row in found["edit_psnr"].rows][:3] == ["p67000_0", "p67000_1", "p67001_0"]


def test_an_edit_that_did_not_move_is_the_same_by_every_measure(tmp_path: Path) -> None:
    benign = other_seeds(20)
    found = shift(benign, benign, tmp_path)
    assert found["edit_psnr"].value is None and "infinite" in found["edit_psnr"].reason
    assert [found[name].value for name in NAMES[1:4]] == pytest.approx([1, 1, 1], abs=1e-4)
    assert found["edit_feature_distance"].value == 0
    assert found["edit_psnr@seeds"].value is not None


def test_a_larger_move_is_larger_by_every_measure_and_picture(tmp_path: Path) -> None:
    benign = other_seeds(20)
    near, far = (shift(noisy(benign, levels), benign, tmp_path) for levels in (6, 24))
    for name in NAMES:
        sign = 1 if near[name].higher_is_better else -1
        rows = zip(near[name].rows, far[name].rows, strict=True)
        assert all(sign * a.value < sign * b.value for a, b in rows if a.value is not None and b.value is not None)


def test_the_control_is_what_a_seed_does_and_no_defense_moves_it(tmp_path: Path) -> None:
    calm, wild = other_seeds(6), other_seeds(30)
    one, other = (shift(noisy(benign, 4), benign, tmp_path) for benign in (calm, wild))
    again = shift(noisy(calm, 40), calm, tmp_path)
    for name in NAMES:
        key, sign = f"{name}@seeds", 1 if one[name].higher_is_better else -1
        assert sign * one[key].value < sign * other[key].value
        assert one[key] == again[key]


def test_psnr_of_a_known_move(tmp_path: Path) -> None:
    benign = originals(drawn(3)) // 2 + 50
    found = shift(benign + 5, benign, tmp_path)
    assert found["edit_psnr"].value == pytest.approx(20 * torch.log10(torch.tensor(255 / 5)).item())


def test_the_next_seed_of_the_same_photo_and_after_the_last_the_first() -> None:
    pictures = torch.arange(6)[:, None, None, None]
    assert next_seed(pictures, 3).flatten().tolist() == [1, 2, 0, 4, 5, 3]


def test_other_evidence_is_refused(backdoor: object, tmp_path: Path) -> None:
    shown = backdoor(torch.zeros(3, 32, 32, dtype=torch.uint8))  # type: ignore[operator]
    with pytest.raises(BenchError, match="edit_shift: needs the evidence of an editing cell"):
        EditShift().measure(shown, Context("key", tmp_path))
