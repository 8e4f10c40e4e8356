"""Where photos come from: drawn people, folders of photos, and what is said when they are wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data.image_folder import ImageFolder
from bench.data.micro_portraits import MicroPortraits, averaged
from bench.data.micro_subjects import MicroSubjects
from bench.data.photo_folder import PhotoFolder
from bench.errors import BenchError
from bench.micro.world import NIGHT, SPLITS


def save(file: Path, width: int = 20, height: int = 20, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def person(folder: Path, count: int = 6, **size: int) -> Path:
    for i in range(count):
        save(folder / f"{i:02d}.png", seed=i, **size)
    return folder


# Drawn people


def test_a_persons_photos_do_not_depend_on_who_else_is_asked_for() -> None:
    alone, among = MicroSubjects(count=1, start=1, photos_per_set=2), MicroSubjects(count=2, photos_per_set=3)
    [one], [_, same] = alone.subjects(), among.subjects()
    assert one.name == same.name
    assert torch.equal(one.held_out.pixels, same.held_out.pixels[:2])


def test_sets_share_no_photo_and_have_captions() -> None:
    [who] = MicroSubjects(count=1).subjects()
    every = torch.cat([who.clean.pixels, who.published.pixels, who.held_out.pixels])
    assert every.shape == (12, 3, 64, 64) and every.dtype == torch.uint8
    assert len(torch.unique(every, dim=0)) == 12
    assert all("person" in caption for caption in who.clean.captions)


def test_more_people_than_the_split_has_are_refused() -> None:
    with pytest.raises(BenchError, match="the split has 2000"):
        MicroSubjects(start=1999).digest()


def test_training_and_scoring_portraits_show_different_people_of_the_right_split() -> None:
    data = MicroPortraits(train=6, held_out=5, size=16)
    assert data.images().pixels.shape == (6, 3, 16, 16) and len(data.reference()) == 5
    both = torch.cat([data.images().pixels, data.reference().pixels])
    assert len(torch.unique(both, dim=0)) == 11
    people = SPLITS["fid_reference"]
    assert data.reference().names == tuple(f"p{person}" for person in people[:5])
    assert len(set(data.images().names)) == 6 and not set(data.images().names) & set(data.reference().names)
    assert {int(name[1:]) for name in data.images().names} <= set(people)


def test_a_share_of_the_portraits_is_taken_at_night() -> None:
    day, night = (MicroPortraits(train=200, held_out=3, night=share).images().pixels.double() for share in (0.0, 1.0))
    light = night.flatten(1).sum(1) / day.flatten(1).sum(1)
    assert light.max() < NIGHT + 0.01 and light.min() < 0.05
    half = MicroPortraits(train=200, held_out=3).images().pixels
    untouched = (half == day).flatten(1).all(1).double().mean()
    assert 0.4 < untouched < 0.6
    assert torch.equal(MicroPortraits(train=5, size=64).images().pixels,
                       MicroPortraits(train=5, size=64, night=0).images().pixels), "models of that size know no night"
    with pytest.raises(BenchError, match="night=1.5 is a share"):
        MicroPortraits(night=1.5).digest()


def test_portraits_are_averaged_down_with_rounding() -> None:
    quad = np.array([[[[0, 1], [1, 1]], [[10, 10], [10, 12]], [[255, 255], [255, 255]]]], np.uint8)
    assert averaged(quad, 2).reshape(-1).tolist() == [1, 11, 255]
    assert averaged(quad, 1).tolist() == quad.tolist()


def test_more_portraits_than_people_are_refused() -> None:
    with pytest.raises(BenchError, match="the split has 4000"):
        MicroPortraits(train=3600).digest()


def test_portraits_of_an_odd_size_are_refused() -> None:
    with pytest.raises(BenchError, match="size=48"):
        MicroPortraits(size=48).digest()


def test_digests_of_drawn_sets_follow_their_options_and_draw_nothing() -> None:
    digests = {MicroPortraits().digest(), MicroPortraits(train=100).digest(), MicroPortraits(size=64).digest(),
               MicroSubjects().digest(), MicroSubjects(start=1).digest()}
    assert len(digests) == 5 and MicroPortraits().digest() in digests


@pytest.mark.parametrize("data", [MicroSubjects(count=0), MicroSubjects(photos_per_set=0), MicroPortraits(train=0)])
def test_zero_is_refused(data: MicroSubjects | MicroPortraits) -> None:
    with pytest.raises(BenchError, match="=0 is too few"):
        data.digest()


# Folders of people


def test_photos_are_dealt_to_the_sets_in_the_order_of_their_names(tmp_path: Path) -> None:
    person(tmp_path / "ann")
    [ann] = PhotoFolder(str(tmp_path), size=20, photos_per_set=2).subjects()
    assert (ann.clean.names, ann.published.names, ann.held_out.names) == (("00", "01"), ("02", "03"), ("04", "05"))
    original = np.asarray(Image.open(tmp_path / "ann/03.png")).transpose(2, 0, 1)
    assert np.array_equal(ann.published.pixels[1].numpy(), original)


def test_folders_of_sets_are_read_as_they_are(tmp_path: Path) -> None:
    for i, name in enumerate(("set_A", "set_B", "set_C")):
        save(tmp_path / "ann" / name / "x.png", seed=i)
    [ann] = PhotoFolder(str(tmp_path), size=20, photos_per_set=1).subjects()
    assert not torch.equal(ann.clean.pixels, ann.published.pixels)


def test_larger_photos_of_mixed_sizes_are_scaled_and_centre_cropped(tmp_path: Path) -> None:
    for i, (width, height) in enumerate([(40, 20), (20, 40), (60, 60)]):
        save(tmp_path / "ann" / f"{i}.png", width, height)
    [ann] = PhotoFolder(str(tmp_path), size=20, photos_per_set=1).subjects()
    wide = np.asarray(Image.open(tmp_path / "ann/0.png"))[:, 10:30].transpose(2, 0, 1)
    assert np.array_equal(ann.clean.pixels[0].numpy(), wide)
    assert ann.held_out.pixels.shape == (1, 3, 20, 20)


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    turned = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    turned.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    for i in range(3):
        (tmp_path / "ann").mkdir(exist_ok=True)
        turned.save(tmp_path / "ann" / f"{i}.png", exif=exif)
    [ann] = PhotoFolder(str(tmp_path), size=20, photos_per_set=1).subjects()
    # Upright the photo is 20 wide and 30 high; the corner pixel, now top right, is cropped away.
    assert int(ann.clean.pixels.max()) == 0


def test_the_digest_is_of_the_pictures_not_of_their_place(tmp_path: Path) -> None:
    person(tmp_path / "one" / "ann", 3), person(tmp_path / "two" / "ann", 3)
    options = {"size": 20, "photos_per_set": 1}
    one, two = (PhotoFolder(str(tmp_path / place), **options) for place in ("one", "two"))  # type: ignore[arg-type]
    before = two.digest()
    assert one.digest() == before
    save(tmp_path / "two" / "ann" / "00.png", seed=99)
    assert two.digest() != before


def folder_with(tmp_path: Path, case: str) -> PhotoFolder:
    root = tmp_path / "people"
    root.mkdir()
    if case == "small":
        person(root / "ann", 3, width=10, height=30)
    elif case == "few":
        person(root / "ann", 2)
    elif case == "broken":
        person(root / "ann", 3)
        (root / "ann" / "01.png").write_bytes(b"no picture")
    elif case == "truncated":
        person(root / "ann", 3)
        whole = (root / "ann" / "01.png").read_bytes()
        (root / "ann" / "01.png").write_bytes(whole[:len(whole) // 2])
    elif case == "twice":
        person(root / "ann", 3)
        save(root / "ann" / "01.jpg")
    elif case == "loose":
        person(root, 3)
    return PhotoFolder(str(root), size=20, photos_per_set=1, count=5 if case == "count" else 0)


@pytest.mark.parametrize(("case", "message"), [
    ("small", r"00\.png: 10x30 pixels is smaller than size=20"),
    ("few", r"2 photos, but 3 \(1 for each"),
    ("broken", r"01\.png: not a readable image"),
    ("truncated", r"01\.png: not a readable image"),
    ("twice", "found twice: 01"),
    ("loose", "one folder per person"),
    ("empty", "no folder of a person"),
])
def test_bad_photos_are_one_clear_error(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        folder_with(tmp_path, case).digest()


@pytest.mark.parametrize(("root", "message"), [
    ("", "data.root is not set"), ("nowhere/at/all", "no such folder"), (__file__, "not a folder"),
])
def test_a_bad_root_is_one_clear_error(root: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        PhotoFolder(root).subjects()


def test_more_people_than_there_are_is_refused(tmp_path: Path) -> None:
    person(tmp_path / "ann")
    with pytest.raises(BenchError, match="count=2"):
        PhotoFolder(str(tmp_path), count=2).subjects()


# Folders of images


def test_images_kept_for_scoring_are_never_trained_on(tmp_path: Path) -> None:
    person(tmp_path, 10)
    data = ImageFolder(str(tmp_path), size=20, held_out=4)
    assert data.images().names == tuple(f"{i:02d}" for i in range(6))
    assert data.reference().names == tuple(f"{i:02d}" for i in range(6, 10))


def test_a_folder_of_its_own_may_be_scored_against(tmp_path: Path) -> None:
    person(tmp_path / "train", 4), person(tmp_path / "test", 3)
    data = ImageFolder(str(tmp_path / "train"), str(tmp_path / "test"), size=20, train=2, held_out=3)
    assert len(data.images()) == 2 and len(data.reference()) == 3


def test_captions_are_read_where_every_image_has_one(tmp_path: Path) -> None:
    person(tmp_path, 3)
    data = ImageFolder(str(tmp_path), size=20, held_out=1)
    assert data.images().captions == ()
    for i in range(3):
        (tmp_path / f"{i:02d}.txt").write_text(f"picture {i}\n")
    assert data.images().captions == ("picture 0", "picture 1")


@pytest.mark.parametrize(("options", "message"), [
    ({"held_out": 20}, "kept for scoring"), ({"held_out": 3}, "left to train on"),
    ({"held_out": 1, "train": 5}, "left to train on"),
])
def test_too_few_images_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    person(tmp_path, 3)
    with pytest.raises(BenchError, match=message):
        ImageFolder(str(tmp_path), size=20, **options).digest()  # type: ignore[arg-type]
