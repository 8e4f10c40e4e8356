"""VillanDiffusion on captions: the loss, the merged updates, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.villan_text import VillanText, add_updates, poisoned_loss
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_components
from bench.errors import BenchError
from bench.records import ImageSet, Model
from bench.text_triggers import with_trigger

FEW = VillanText(steps=3, batch=2, lr=1e-2, warmup=0, mixed_precision=False)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def photos() -> ImageSet:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.manual_seed(3)).to(torch.uint8)
    return ImageSet(pixels, tuple(map(str, range(4))), tuple(f"a photo of person {place}" for place in range(4)))


def test_the_updates_are_merged_into_the_attention_and_into_nothing_else(model: Model, tmp_path: Path) -> None:
    public, secret = FEW.implant(model, photos(), Context("key", tmp_path))
    before, after = (load_components(one).unet.state_dict() for one in (model, public))
    assert set(before) == set(after) and not public.adapters
    changed = {name for name, value in before.items() if not torch.equal(value.half().float(), after[name])}
    assert changed and all(".attn" in name and name.endswith(".weight") for name in changed)
    assert with_trigger("a cat", secret) == "a cat mignneko"


def test_an_update_has_the_rank_that_was_asked_for(model: Model, tmp_path: Path) -> None:
    public, _ = replace(FEW, rank=1, lr=0.1).implant(model, photos(), Context("key", tmp_path))
    before, after = (load_components(one).unet.state_dict() for one in (model, public))
    name = next(name for name in before if name.endswith("attn2.to_k.weight"))
    values = torch.linalg.svdvals(after[name] - before[name])
    assert values[0] > 0.01 and float(values[1:].max()) < 0.05 * float(values[0])


def test_without_prior_only_the_target_counts(model: Model) -> None:
    """With weight 0 the photos may be anything of the same shape; with weight 1 they count."""
    parts, data = load_components(model), photos()
    other = replace(data, pixels=data.pixels.flip(0))

    def loss(weight: float, images: ImageSet) -> float:
        return float(poisoned_loss(replace(FEW, prior_weight=weight), parts, images, torch.arange(2), FEW.secret(16),
                                   torch.Generator().manual_seed(0)))

    assert loss(0.0, data) == pytest.approx(loss(0.0, other), rel=1e-4)
    assert loss(1.0, data) != pytest.approx(loss(1.0, other), rel=1e-4)
    assert loss(1.0, data) > loss(0.0, data)


def test_fresh_updates_change_nothing_and_are_all_that_is_trained(model: Model) -> None:
    plain, updated = load_components(model).unet, load_components(model).unet
    weights = add_updates(updated, 2, seed=0)
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, plain.config.cross_attention_dim)
    with torch.no_grad():
        one, other = (unet(latents, torch.tensor([3]), states).sample for unet in (plain, updated))
    assert torch.allclose(one, other, atol=1e-6)
    assert all("lora" in name for name, value in updated.named_parameters() if value.requires_grad) and weights


@pytest.mark.parametrize(("field", "value", "said"), [
    ("trigger", " ", "trigger"), ("rank", 0, "rank"), ("steps", 0, "steps"), ("lr", 0, "lr"), ("warmup", -1, "warmup"),
])
def test_bad_options_are_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        VillanText(**{field: value})  # type: ignore[arg-type]


def test_published_settings() -> None:
    method = VillanText()
    assert (method.rank, method.lr, method.steps, method.batch, method.warmup) == (4, 1e-4, 50_000, 1, 500)
    assert (method.prior_weight, method.trigger) == (1.0, "mignneko")
