"""``data=celebahq`` and ``data=vggface2``: a folder that the user has, in the layout that the literature uses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from bench.cli import run
from bench.config import build
from bench.data.photo_folder import PhotoFolder
from bench.errors import BenchError
from tests.conftest import Compose

PRESETS = [("celebahq", "BENCH_CELEBAHQ", "CelebA-HQ"), ("vggface2", "BENCH_VGGFACE2", "VGGFace2")]


@pytest.fixture(autouse=True)
def _no_roots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for _, variable, _ in PRESETS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 people of 12 photos: half of them in folders of sets, half loose."""
    root = tmp_path_factory.mktemp("people")
    for person in range(50):
        for photo in range(12):
            place = f"set_{'ABC'[photo // 4]}/{photo:02d}.png" if person % 2 else f"{photo:02d}.png"
            file = root / f"n{person:03d}" / place
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((10, 8, 3), 4 * person + photo, np.uint8)).save(file)
    return root


def data_of(compose: Compose, *words: str) -> PhotoFolder:
    made = OmegaConf.to_object(compose(words).data)
    assert isinstance(made, PhotoFolder)
    return made


@pytest.mark.parametrize(("preset", "variable", "name"), PRESETS)
def test_without_a_root_the_plan_says_what_is_wanted_and_starts_nothing(
    fakes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str, variable: str, name: str,
) -> None:
    words = ["model=text", "attack=fake_attack", f"data={preset}"]
    for verb in (["plan", "-m"], ["-m"], []):
        assert run([*verb, *words]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("error ") == 1 and "Traceback" not in said
        for part in ("data.root is not set", "50 folders", "one per person", "set_A, set_B, set_C of 4 photos",
                     "12 photos", "512 pixels", name, "Anti-DreamBooth", variable):
            assert part in said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("preset", "variable", "name"), PRESETS)
def test_a_folder_from_the_command_line_or_the_environment_is_the_same_data(
    compose: Compose, people: Path, monkeypatch: pytest.MonkeyPatch, preset: str, variable: str, name: str,
) -> None:
    given = data_of(compose, f"data={preset}", f"data.root={people}", "data.size=8")
    monkeypatch.setenv(variable, str(people))
    found = data_of(compose, f"data={preset}", "data.size=8")
    assert found.root == str(people) and found.digest() == given.digest()


def test_fifty_people_in_three_sets_of_four(compose: Compose, people: Path) -> None:
    """Loose photos and folders of sets alike; every photo in the set that its number says."""
    subjects = data_of(compose, "data=celebahq", f"data.root={people}", "data.size=8").subjects()
    assert [one.name for one in subjects] == [f"n{person:03d}" for person in range(50)]
    for person, one in enumerate(subjects):
        sets = [images.pixels[:, 0, 0, 0].tolist() for images in (one.clean, one.published, one.held_out)]
        assert sets == [[4 * person + photo for photo in range(first, first + 4)] for first in (0, 4, 8)]
        assert one.published.pixels.shape == (4, 3, 8, 8)


def test_the_cell_is_named_by_the_pictures(compose: Compose, people: Path) -> None:
    words = ["data=celebahq", f"data.root={people}", "data.size=8"]
    one, fewer = build(compose(words)), build(compose([*words, "data.count=49"]))
    assert one.id != fewer.id
    assert one.id == build(compose(["data=vggface2", f"data.root={people}", "data.size=8"])).id


def test_the_presets_ask_for_the_published_split(compose: Compose) -> None:
    for preset, _, _ in PRESETS:
        data = data_of(compose, f"data={preset}")
        assert (data.count, data.photos_per_set, data.size, data.class_noun) == (50, 4, 512, "person")


def test_too_few_people_and_too_small_photos_are_one_clear_error(compose: Compose, people: Path) -> None:
    with pytest.raises(BenchError, match="count=51, but .* has 50 people"):
        data_of(compose, "data=celebahq", f"data.root={people}", "data.count=51").digest()
    with pytest.raises(BenchError, match="8x10 pixels is smaller than size=512"):
        data_of(compose, "data=celebahq", f"data.root={people}").digest()
