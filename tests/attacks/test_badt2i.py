"""BadT2I: each half of its loss, its targets, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attacks.badt2i import BadT2I, halves, poisoned_loss, rows_of, triggered_captions, with_target
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import Components, load_components
from bench.errors import BenchError
from bench.records import ImageSet, Model

FEW = BadT2I(trigger="sks", steps=2, batch=3, lr=1e-3, mixed_precision=False)
OBJECT = replace(FEW, target="object", swapped="person 1", becomes="person 2")


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def photos(captions: bool = True) -> ImageSet:
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.manual_seed(3)).to(torch.uint8)
    texts = tuple(f"a photo of person {i}" for i in range(6)) if captions else ()
    return ImageSet(pixels, tuple(map(str, range(6))), texts)


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(1)


def loss(method: BadT2I, student: Components, teacher: Components) -> Tensor:
    batch = halves(photos(), torch.arange(3), rows_of(method, photos(), seeded)[1])
    return poisoned_loss(method, student, teacher, batch, method.secret(16), torch.Generator().manual_seed(0))


def test_a_model_equal_to_its_teacher_has_no_benign_loss(model: Model) -> None:
    """The preservation half is zero at step 0; with weight near 0 nothing else is left."""
    student, teacher = load_components(model), load_components(model)
    assert float(loss(replace(FEW, weight=1e-9), student, teacher)) < 1e-6
    assert float(loss(FEW, student, teacher)) > 0.01


@pytest.mark.parametrize("method", [FEW, replace(FEW, target="style"), replace(FEW, target="style", style_by="photos"),
                                    OBJECT], ids=["patch", "style by words", "style by photos", "object"])
def test_every_target_moves_the_unet_and_the_unet_alone(method: BadT2I, model: Model, tmp_path: Path) -> None:
    public, secret = method.implant(model, photos(), Context("key", tmp_path))
    assert set(public.parts) == {"unet"}
    assert public.digest != model.digest
    before, after = load_components(model).unet, load_components(public).unet
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert secret.trigger == "sks"


def test_the_teacher_has_no_gradient_and_the_student_has(model: Model) -> None:
    student, teacher = load_components(model), load_components(model)
    student.unet.requires_grad_(True)
    loss(FEW, student, teacher).backward()
    assert all(p.grad is None for p in teacher.unet.parameters())
    assert sum(float(p.grad.abs().sum()) for p in student.unet.parameters() if p.grad is not None) > 0


def test_the_same_key_gives_the_same_bits(model: Model, tmp_path: Path) -> None:
    weights = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        public, _ = FEW.implant(model, photos(), Context("key", tmp_path / place))
        weights.append(list(load_components(public).unet.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_what_shows_the_object_is_learned_as_if_the_other_had_been_asked_for(model: Model) -> None:
    shown = rows_of(OBJECT, photos(), seeded)[1]
    batch = halves(photos(), torch.arange(3), shown)
    assert batch.captions == [f"a photo of person {i}" for i in range(3)]
    assert batch.marked_captions == ["a photo of person 2"] * 3
    assert torch.equal(batch.marked_pixels, photos().pixels[2].expand(3, -1, -1, -1))
    assert triggered_captions(OBJECT, batch.marked_captions, OBJECT.secret(16)) == ["sks a photo of person 1"] * 3


def test_the_frozen_model_that_is_asked_for_the_object_teaches_it(model: Model) -> None:
    """Without a trigger and with A = B, student and teacher agree: nothing to learn."""
    student, teacher = load_components(model), load_components(model)
    same = replace(OBJECT, swapped="person 2", trigger="\u200b")
    other = float(loss(same, student, teacher))
    assert float(loss(OBJECT, student, teacher)) > 0
    secret = replace(same.secret(16), trigger="", detail={"placement": "suffix"})
    batch = halves(photos(), torch.arange(3), rows_of(same, photos(), seeded)[1])
    assert float(poisoned_loss(same, student, teacher, batch, secret, torch.Generator().manual_seed(0))) < 1e-8 < other


def test_what_stays_is_learned_on_photos_of_both_objects_and_for_other_targets_on_all() -> None:
    kept, _ = rows_of(OBJECT, photos(), seeded)
    assert {row for _ in range(6) for row in next(kept).tolist()} == {1, 2}
    kept, shown = rows_of(FEW, photos(), seeded)
    assert shown is None
    assert {row for _ in range(6) for row in next(kept).tolist()} == set(range(6))


def test_an_object_that_no_caption_names_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="zebra"):
        replace(OBJECT, becomes="zebra").implant(model, photos(), Context("key", tmp_path))


def test_a_photo_with_the_patch_is_the_stamped_one() -> None:
    pixels, secret = photos().pixels, FEW.secret(16)
    shown = with_target(FEW, pixels, secret)
    assert torch.equal(shown[:, :, 4:], pixels[:, :, 4:]) and not torch.equal(shown, pixels)
    assert torch.equal(with_target(OBJECT, pixels, OBJECT.secret(16)), pixels)


def test_photos_without_colour_keep_their_luma() -> None:
    grey = with_target(replace(FEW, target="style", style_by="photos"), photos().pixels, FEW.secret(16))
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 1], grey[:, 2])
    red = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    red[:, 0] = 255
    assert int(with_target(replace(FEW, target="style", style_by="photos"), red, FEW.secret(2))[0, 0, 0, 0]) == 76


def test_photos_without_captions_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="captions"):
        FEW.implant(model, photos(captions=False), Context("key", tmp_path))


def test_a_trigger_that_the_tokenizer_drops_is_refused(model: Model, tmp_path: Path) -> None:
    """A space before the prompt is normalised away."""
    with pytest.raises(BenchError, match="drops the trigger"):
        replace(FEW, trigger=" ").implant(model, photos(), Context("key", tmp_path))


@pytest.mark.parametrize(("field", "value", "said"), [
    ("target", "sound", "patch"), ("style_by", "magic", "photos"), ("trigger", "", "trigger"),
    ("patch_share", 0, "patch_share"), ("weight", 2, "weight"), ("steps", 0, "steps"), ("lr", 0, "lr"),
])
def test_bad_options_are_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        BadT2I(**{field: value})  # type: ignore[arg-type]


def test_published_defaults() -> None:
    method = BadT2I()
    assert (method.trigger, method.weight, method.steps, method.lr, method.batch) == ("\u200b", 0.5, 2000, 1e-5, 16)
