"""Target pictures: what the drawn ones look like, and files pinned by their content."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.data.targets import check_target, pattern, target_picture
from bench.errors import BenchError


@pytest.mark.parametrize("size", [16, 64, 200, 512])
def test_the_pattern_is_black_on_white_repeats_and_leaves_no_plain_area(size: int) -> None:
    page = pattern(size)
    assert page.shape == (1, 3, size, size)
    assert set(page.unique().tolist()) == {0, 255}
    assert 0.2 < (page == 0).float().mean() < 0.6
    stroke = max(2, size // 64)
    windows = page[0, 0].float().unfold(0, 8 * stroke, 1).unfold(1, 8 * stroke, 1)
    assert (windows.amax((2, 3)) > windows.amin((2, 3))).all()


def test_strokes_keep_their_share_of_the_picture() -> None:
    small, large = pattern(128), pattern(512)
    assert torch.equal(small.repeat_interleave(4, 2).repeat_interleave(4, 3), large)


def test_grey_is_the_middle_level() -> None:
    assert (target_picture("grey", 8) == 128).all()


def test_a_file_is_read_and_pinned_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "target.png"
    Image.new("RGB", (40, 20), (10, 200, 30)).save(file)
    assert target_picture(str(file), 16)[0, :, 3, 5].tolist() == [10, 200, 30]
    mark = check_target(str(file), "", "defense.target")
    assert check_target(str(file), mark, "defense.target") == mark
    Image.new("RGB", (40, 20), (11, 200, 30)).save(file)
    with pytest.raises(BenchError, match="SHA-256"):
        check_target(str(file), mark, "defense.target")


def test_an_unknown_picture_names_the_valid_ones() -> None:
    with pytest.raises(BenchError, match=r"patern.*pattern.*grey, pattern, zero"):
        check_target("patern", "", "defense.target", ("zero",))
    assert check_target("zero", "", "defense.target", ("zero",)) == ""
