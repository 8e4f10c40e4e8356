"""What is stored comes back, to the bit, and says nothing about the machine."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.codecs import (
    CustomisedCodec,
    GenerationsCodec,
    ImageSetCodec,
    ImageSetsCodec,
    ImplantCodec,
    MeasurementsCodec,
    ModelCodec,
)
from bench.errors import BenchError
from bench.identity import digest
from bench.records import (
    Adapter,
    Customised,
    Generations,
    ImageSet,
    Measurement,
    Model,
    Row,
    Secret,
)
from bench.store import Store


def images(n: int = 3, size: tuple[int, int] = (5, 7), names: tuple[str, ...] | None = None) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return ImageSet(pixels, names or tuple(f"photo {i}" for i in range(n)), tuple(f"number {i}" for i in range(n)))


def same(a: ImageSet, b: ImageSet) -> bool:
    return bool(torch.equal(a.pixels, b.pixels)) and (a.names, a.captions) == (b.names, b.captions)


def stored(codec: Any, value: Any, folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    codec.save(value, folder)
    return codec.load(folder)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_images_come_back_to_the_bit(tmp_path: Path, n: int) -> None:
    assert same(stored(ImageSetCodec(), images(n), tmp_path / "a"), images(n))


def test_hostile_and_equal_looking_names_stay_inside(tmp_path: Path) -> None:
    value = images(4, names=("../../up", "a/b", "a:b", ""))
    assert same(stored(ImageSetCodec(), value, tmp_path / "a"), value)
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == [
        "0000_up.png", "0001_a-b.png", "0002_a-b.png", "0003_image.png"]


def test_an_index_that_leads_out_is_refused(tmp_path: Path) -> None:
    stored(ImageSetCodec(), images(1), tmp_path / "a")
    index = tmp_path / "a" / "index.json"
    index.write_text(index.read_text().replace("0000_photo-0.png", "../../secret.png"))
    with pytest.raises(BenchError, match="leads out"):
        ImageSetCodec().load(tmp_path / "a")


def test_floats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="uint8"):
        ImageSetCodec().save(ImageSet(torch.zeros(1, 3, 2, 2), ("a",)), tmp_path)


def test_sets_and_generations(tmp_path: Path) -> None:
    sets = {"ann/e": images(2), "bob": images(3, (4, 4))}
    back = stored(ImageSetsCodec(), sets, tmp_path / "sets")
    assert list(back) == list(sets) and all(same(back[k], sets[k]) for k in sets)
    drawn = Generations(images(2), ("a", "b"), (2**62, 0))
    again = stored(GenerationsCodec(), drawn, tmp_path / "drawn")
    assert same(again.images, drawn.images) and (again.prompts, again.seeds) == (drawn.prompts, drawn.seeds)


@pytest.fixture
def base(tmp_path: Path) -> Model:
    folder = tmp_path / "base"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "w.safetensors").write_bytes(b"vae")
    return Model(folder, "cafe", frozenset({"text_to_image"}))


def tuned(base: Model, folder: Path, **changes: Any) -> Model:
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "unet" / "w.safetensors").write_bytes(b"unet")
    parts = {"unet": folder / "unet", "vae": base.base / "vae"}
    return Model(base.base, "", frozenset({"text_to_image", "edit"}), parts, **changes)


def test_a_model_names_its_own_weights_relative(tmp_path: Path, base: Model) -> None:
    folder = tmp_path / "artefact"
    ModelCodec(base).save(tuned(base, folder), folder)
    assert str(tmp_path) not in (folder / "model.json").read_text()
    moved = tmp_path / "moved" / "key1"
    moved.parent.mkdir()
    folder.rename(moved)
    back = ModelCodec(base).load(moved)
    assert back.parts == {"unet": moved / "unet", "vae": base.base / "vae"}
    assert back.capabilities == {"text_to_image", "edit"}
    assert back.digest == digest({"base": "cafe", "stage": "key1"}) != base.digest


def test_an_unchanged_model_is_the_base(tmp_path: Path, base: Model) -> None:
    assert stored(ModelCodec(base), base, tmp_path / "same") == base


def test_a_part_of_another_artefact_is_taken_in(tmp_path: Path, base: Model) -> None:
    other, folder = tmp_path / "other", tmp_path / "artefact"
    lora = other / "lora.safetensors"
    model = tuned(base, other, adapters=(Adapter("lora", lora, 0.5),))
    lora.write_bytes(b"lora")
    back = stored(ModelCodec(base), model, folder)
    assert back.parts["unet"] == folder / "parts" / "unet"
    assert back.adapters == (Adapter("lora", folder / "adapters" / "0" / "lora.safetensors", 0.5),)
    copied = back.parts["unet"] / "w.safetensors"
    assert copied.read_bytes() == b"unet" and os.path.samefile(copied, other / "unet" / "w.safetensors")


def test_missing_weights_and_another_base_are_refused(tmp_path: Path, base: Model) -> None:
    (tmp_path / "a").mkdir()
    gone = Model(base.base, "", base.capabilities, {"unet": tmp_path / "nowhere"})
    with pytest.raises(BenchError, match="nowhere is missing"):
        ModelCodec(base).save(gone, tmp_path / "a")
    with pytest.raises(BenchError, match="parts and adapters only"):
        ModelCodec(base).save(Model(tmp_path, "", base.capabilities), tmp_path / "a")


@pytest.fixture
def with_adapter(base: Model) -> Model:
    """A base with an image-prompt adapter beside it, in the format that ``bench.diffusion.checkpoints`` reads."""
    folder = base.base / "ip_adapter"
    (folder / "image_encoder").mkdir(parents=True)
    (folder / "ip-adapter_image.safetensors").write_bytes(b"ip")
    return base


def test_a_published_adapter_stays_where_it_is(tmp_path: Path, with_adapter: Model) -> None:
    from dataclasses import replace

    path = with_adapter.base / "ip_adapter" / "ip-adapter_image.safetensors"
    model = replace(with_adapter, adapters=(Adapter("ip_image", path),))
    back = stored(ModelCodec(with_adapter), model, tmp_path / "artefact")
    assert back.adapters == (Adapter("ip_image", path.resolve()),)
    assert not list((tmp_path / "artefact").rglob("*.safetensors"))
    path.write_bytes(b"other")
    with pytest.raises(BenchError, match="not the one"):
        ModelCodec(with_adapter).load(tmp_path / "artefact")


def test_customised(tmp_path: Path, base: Model) -> None:
    for name, photos in (("a", None), ("b", images(2))):
        folder = tmp_path / name
        back = stored(CustomisedCodec(base), Customised(tuned(base, folder), "sks", photos), folder)
        assert back.token == "sks" and back.model.parts["unet"] == folder / "unet"
        assert back.conditioning is None if photos is None else same(back.conditioning, photos)


@pytest.mark.parametrize("trigger", ["rareword", torch.randn(3, 6, 6).permute(0, 2, 1)], ids=["word", "tensor"])
def test_implant(tmp_path: Path, base: Model, trigger: Any) -> None:
    secret = Secret(trigger, images(1).pixels[0], {"poison": 0.1})
    model, back = stored(ImplantCodec(base), (tuned(base, tmp_path / "a"), secret), tmp_path / "a")
    assert model.parts["unet"].is_dir() and torch.equal(back.target, secret.target)
    assert back.trigger == trigger if isinstance(trigger, str) else torch.equal(back.trigger, trigger)
    assert back.detail == {"poison": 0.1}


def test_measurements(tmp_path: Path) -> None:
    value = [
        Measurement("ism", 0.1 + 0.2, 2, "", False, 0.1, 0.5, "", {"judge": "x"},
                    (Row("a", "ann", 0.3), Row("b", "ann", None, "no face"))),
        Measurement("fid", None, 0, "", None, reason="too few"),
    ]
    assert stored(MeasurementsCodec(), value, tmp_path) == value


def test_through_the_store(tmp_path: Path, base: Model) -> None:
    def ask() -> Any:
        return Store(tmp_path / "store").stage(
            "repair", 1, {"base": base.digest}, lambda ctx: tuned(base, ctx.folder), ModelCodec(base))

    first, second = ask(), ask()
    assert second.reused and first.value == second.value
    assert first.value.parts["unet"] == first.folder / "unet" and first.value.parts["unet"].is_dir()
    assert first.value.digest == digest({"base": "cafe", "stage": first.key})
