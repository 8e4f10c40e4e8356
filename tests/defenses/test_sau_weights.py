"""SAU in weight space: the attention term has a gradient and the right goal, and training closes the gap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.context import Context
from bench.diffusion.attention import recorded
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import Components, load_components
from bench.diffusion.trigger_tokens import Alignment
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model, Secret
from defenses.sau_weights import Lesson, SauWeights, attention_error, distillation_loss, goal_maps, prepare

SECRET = Secret("sks", torch.zeros(3, 16, 16, dtype=torch.uint8))
CAPTIONS = ("a cat", "a dog")
FEW = SauWeights(prompts=2, steps=2, batch=2, lr=1e-3, map_side=8)


def photos(captions: tuple[str, ...] = CAPTIONS) -> ImageSet:
    return ImageSet(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ("0", "1"), captions)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss(method: SauWeights, parts: Components, teacher: Components, lesson: Lesson) -> torch.Tensor:
    return distillation_loss(method, parts, teacher.unet, lesson, seeded())


def test_the_attention_term_alone_trains_the_student_and_never_the_teacher(model: Model) -> None:
    parts, teacher = load_components(model), load_components(model)
    parts.unet.requires_grad_(True)
    teacher.unet.requires_grad_(True)
    loss(replace(FEW, noise_weight=0.0), parts, teacher, prepare(parts, CAPTIONS, SECRET)).backward()
    keys = parts.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    assert keys.weight.grad is not None and float(keys.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in teacher.unet.parameters())


def test_without_a_trigger_student_and_teacher_agree(model: Model) -> None:
    parts, teacher = load_components(model), load_components(model)
    lesson = prepare(parts, CAPTIONS, SECRET)
    length = lesson.plain.shape[1]
    same = Alignment((), tuple(range(length)), tuple(range(length)))
    assert float(loss(FEW, parts, teacher, Lesson(lesson.plain, lesson.plain, (same, same)))) < 1e-10
    assert float(loss(FEW, parts, teacher, lesson)) > 1e-6


def test_goals_are_the_teachers_maps_moved_and_zero_or_noise_for_the_trigger() -> None:
    taught = torch.rand(1, 4, 5, generator=seeded())
    places = (Alignment((1, 2), (0, 3, 4), (0, 1, 2)),)
    goal = goal_maps(FEW, taught, places, seeded())
    assert torch.equal(goal[0, :, [0, 3, 4]], taught[0, :, :3])
    assert float(goal[0, :, [1, 2]].abs().sum()) == 0
    noisy = goal_maps(replace(FEW, trigger_maps="noise"), taught.repeat(1, 200, 1), places, seeded())
    assert float(noisy[0, :, [1, 2]].mean()) == pytest.approx(1 / 5, rel=0.05)
    assert torch.equal(noisy[0, :4, [0, 3, 4]], taught[0, :, :3])


def test_the_error_of_maps_is_a_plain_mean_where_nothing_is_resized() -> None:
    one, other = torch.rand(2, 16, 3, generator=seeded()), torch.rand(2, 16, 3, generator=seeded(1))
    assert torch.allclose(attention_error({"a": one}, {"a": other}, 4), (one - other).square().mean())
    flat = {"a": torch.full((1, 4, 2), 0.5), "b": torch.full((1, 16, 2), 0.1)}
    zero = {name: torch.zeros_like(maps) for name, maps in flat.items()}
    assert float(attention_error(flat, zero, 8)) == pytest.approx((0.25 + 0.01) / 2)


@pytest.mark.parametrize(("without", "lr"), [("noise_weight", 3e-3), ("attention_weight", 3e-4)],
                         ids=["attention alone", "noise alone"])
def test_each_term_brings_the_triggered_prompt_to_the_clean_one(
    without: str, lr: float, model: Model, tmp_path: Path,
) -> None:
    """Each by itself: on random networks the maps' differences are a hundredth of the noise predictions'."""
    method = replace(FEW, steps=30, lr=lr, **{without: 0.0})
    trained = load_components(method.repair(model, photos(), SECRET, Context("key", tmp_path)))
    before, lesson = load_components(model), prepare(load_components(model), CAPTIONS, SECRET)
    assert float(loss(method, trained, before, lesson)) < 0.8 * float(loss(method, before, before, lesson))
    if method.attention_weight:
        assert trigger_attention(trained, lesson) < 0.8 * trigger_attention(before, lesson)


def trigger_attention(parts: Components, lesson: Lesson) -> float:
    """How much all places attend to the trigger's tokens."""
    with torch.no_grad(), recorded(parts.unet) as maps:
        parts.unet(torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]), lesson.triggered)
    return sum(float(found[:, :, list(lesson.places[0].added)].sum()) for found in maps.cross.values())


def test_the_unet_alone_changes_and_the_same_key_gives_the_same_bits(model: Model, tmp_path: Path) -> None:
    found = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        found.append(FEW.repair(model, photos(), SECRET, Context("key", tmp_path / place)))
    assert set(found[0].parts) == {"unet"} and found[0].digest != model.digest
    first, again = (list(load_components(m).unet.parameters()) for m in found)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_it_knows_the_trigger_and_refuses_what_it_cannot_do(model: Model, tmp_path: Path) -> None:
    assert facts_of(SauWeights).knows == ("trigger",)
    ctx = Context("key", tmp_path)
    with pytest.raises(BenchError, match="told"):
        FEW.repair(model, photos(), None, ctx)
    with pytest.raises(BenchError, match="captions"):
        FEW.repair(model, photos(()), SECRET, ctx)
    with pytest.raises(BenchError, match="drops"):
        FEW.repair(model, photos(), replace(SECRET, trigger=" "), ctx)
    for field, value in (("trigger_maps", "magic"), ("lr", 0), ("steps", 0), ("map_side", 0)):
        with pytest.raises(BenchError, match=field):
            SauWeights(**{field: value})  # type: ignore[arg-type]


def test_published_settings() -> None:
    method = SauWeights()
    assert (method.lr, method.decay, method.prompts, method.epochs, method.batch) == (1e-6, 0.01, 100, 100, 1)
    assert (method.attention_weight, method.noise_weight, method.map_side) == (0.5, 0.5, 128)
