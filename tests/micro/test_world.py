"""The drawn world: determinism, what a view may change, edits, captions and splits."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench.micro import world


@pytest.fixture
def view() -> world.View:
    plain = world.sample_view(np.random.default_rng(3))
    return replace(
        plain,
        glasses="no",
        background="grey",
        expression="neutral",
        shirt="white",
        light_strength=0.0,
        exposure=1.0,
    )


def _haired(style: str) -> world.Identity:
    return next(
        who for who in map(world.identity, range(500)) if who.hair_style == style and who.beard == "none"
    )


def _changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(a.astype(int) - b.astype(int)).max(-1) > 24)


def test_a_picture_is_a_function_of_identity_and_view(view: world.View) -> None:
    first, second = (world.draw(world.identity(12), view) for _ in range(2))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert _changed(first, world.draw(world.identity(13), view)).mean() > 0.1


def test_pictures_at_twice_the_size_show_the_same(view: world.View) -> None:
    small, large = world.draw(world.identity(5), view), world.draw(world.identity(5), view, size=128)
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 6


def test_skin_survives_every_view() -> None:
    who = world.identity(8)
    rng = np.random.default_rng(0)
    for _ in range(8):
        plain = replace(world.sample_view(rng), light_strength=0.0, exposure=1.0)
        distance = np.abs(world.draw(who, plain).astype(int) - np.array(who.skin)).max(-1)
        assert (distance < 12).sum() > 100


@pytest.mark.parametrize("name", sorted(world.EDITS))
def test_an_edit_sets_its_field_and_no_other(name: str, view: world.View) -> None:
    who = _haired("spiky")
    after = world.apply_edit(who, view, name)
    edit = world.EDITS[name]
    before_of, after_of = (who, after[0]) if edit.of == "identity" else (view, after[1])
    assert getattr(after_of, edit.field) == edit.value
    other = [f.name for f in fields(before_of) if f.name != edit.field]
    assert all(getattr(before_of, f) == getattr(after_of, f) for f in other)
    assert (after[1] if edit.of == "identity" else after[0]) == (view if edit.of == "identity" else who)


def test_adding_glasses_alters_only_the_eyes_region(view: world.View) -> None:
    who = _haired("short")
    level = replace(view, roll=0.0, yaw=0.0, pitch=0.0, shift=(0.0, 0.0), scale=1.0)
    changed = _changed(world.draw(who, level), world.draw(*world.apply_edit(who, level, "add glasses")))
    rows = np.flatnonzero(changed.any(1))
    assert changed.sum() > 20
    eyes = 32 + who.eye_height * 0.3 * 64
    assert abs(rows.mean() - eyes) < 3 and np.ptp(rows) < 20


def test_a_new_background_leaves_the_face_alone(view: world.View) -> None:
    who = _haired("short")
    before, after = world.draw(who, view), world.draw(*world.apply_edit(who, view, "make the background red"))
    changed = _changed(before, after)
    assert changed[:4].all()
    assert not changed[30:38, 28:36].any()


def test_an_edit_that_already_holds_is_no_change(view: world.View) -> None:
    who = _haired("bald")
    assert not world.is_change(who, view, "make the person bald")
    assert not world.is_change(who, view, "make the hair red")
    assert not world.is_change(who, view, "remove the glasses")
    assert world.is_change(who, view, "add glasses")


def test_an_unknown_edit_names_the_valid_ones(view: world.View) -> None:
    with pytest.raises(ValueError, match="add glasses"):
        world.apply_edit(world.identity(0), view, "add wings")


def test_the_full_caption_says_every_attribute(view: world.View) -> None:
    for index in range(30):
        who = world.identity(index)
        facts = world.attributes(who, view)
        text = world.caption(who, view)
        silent = {"none", "no", "neutral"}
        assert all(value in text for value in facts.values() if value not in silent)


def test_captions_never_say_what_is_not_there() -> None:
    rng = np.random.default_rng(1)
    for index in range(200):
        who, view = world.identity(index), world.sample_view(rng)
        text = world.caption(who, view, rng)
        assert ("glasses" not in text) or view.glasses != "no"
        assert ("beard" in text) <= (who.beard == "beard")
        assert ("hair" not in text) or who.hair_style != "bald"


def test_splits_share_no_person() -> None:
    ranges = sorted(world.SPLITS.values(), key=lambda r: r.start)
    assert all(left.stop <= right.start for left, right in pairwise(ranges))


def test_a_dataset_is_cached_and_equal_after_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_MICRO_CACHE", str(tmp_path))
    drawn, read = (world.dataset("card", 12, views_per_identity=4) for _ in range(2))
    assert len(list(tmp_path.glob("*.npz"))) == 1
    assert (
        np.array_equal(drawn.pixels, read.pixels)
        and drawn.captions == read.captions
        and drawn.attributes == read.attributes
    )
    assert drawn.identity.tolist() == [64_000] * 4 + [64_001] * 4 + [64_002] * 4
    assert set(drawn.identity) <= set(world.SPLITS["card"])


def test_an_unknown_split_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="fid_reference"):
        world.dataset("nobody", 4)


def test_identities_are_far_apart_and_views_near() -> None:
    """In the numbers of the face, not in pixels: two people differ in many of them."""
    numbers = np.array(
        [
            [getattr(world.identity(i), f) for f in ("width", "bottom", "eye_spacing", "nose_length", "jaw")]
            for i in range(200)
        ]
    )
    spread = (numbers - numbers.mean(0)) / numbers.std(0)
    distance = np.linalg.norm(spread[:, None] - spread[None], axis=-1) + 10 * np.eye(200)
    assert distance.min() > 0.05 and np.median(distance) > 2
