"""Adversarial neuron perturbation and pruning: hooks against rewritten weights, ascent, masks, what is cut."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_unconditional
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model
from bench.reports import read_report
from defenses.anp import (
    Anp,
    Gates,
    affine,
    ascended,
    changed_outputs,
    clean_loss,
    convolutions,
    gates,
    masked,
    perturbation,
    pruned,
)

QUICK: dict[str, Any] = {"steps": 3, "batch": 4, "samples": 3, "sampling_steps": 2, "prune_steps": 2,
                         "prune_share": 1.0}


@pytest.fixture(scope="module")
def suspicious(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from bench.testing.pipelines import save_ddpm

    return resolve(str(save_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm")))


def photos(count: int = 12, size: int = 8) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(3)).to(torch.uint8)
    return ImageSet(pixels, tuple(f"{i}" for i in range(count)))


def random_gates(unet: Any, seed: int) -> Gates:
    draws = torch.manual_seed(seed)
    one, other = ([torch.rand(conv.out_channels, generator=draws) for conv in convolutions(unet)] for _ in range(2))
    return Gates(one, other)


def answer(unet: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = unet(torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0)), 7).sample
    return found


def test_gates_do_what_rewritten_weights_do_and_leave_no_trace(suspicious: Model) -> None:
    unet, _ = load_unconditional(suspicious)
    before, found = answer(unet), random_gates(unet, 1)
    masks = random_gates(unet, 2).gains
    perturbed, cut = copy.deepcopy(unet), copy.deepcopy(unet)
    for place, (one, other) in enumerate(zip(convolutions(perturbed), convolutions(cut), strict=True)):
        gain, shift = found.gains[place], found.biases[place]
        one.weight.data.mul_(gain[:, None, None, None])
        one.bias.data.mul_(gain).add_(shift)
        other.weight.data.mul_((masks[place] + gain)[:, None, None, None])
        other.bias.data.mul_(1 + shift)
    with changed_outputs(unet, affine(found)):
        assert torch.allclose(answer(unet), answer(perturbed), atol=1e-4)
    with changed_outputs(unet, masked(masks, found)):
        assert torch.allclose(answer(unet), answer(cut), atol=1e-4)
    assert torch.equal(answer(unet), before)


def test_perturbation_raises_the_loss_within_its_budget(suspicious: Model, tmp_path: Path) -> None:
    unet, scheduler = load_unconditional(suspicious)
    options, ctx = Anp(**{**QUICK, "steps": 12, "lr": 0.2, "budget": 1.2}), Context("key", tmp_path)
    found, _ = perturbation(unet, scheduler, photos().pixels, options, ctx)
    assert all(float(gate.abs().max()) <= 1.2 + 1e-6 for gate in found.all())

    def loss() -> float:
        with torch.no_grad():
            return float(clean_loss(unet, scheduler, photos().pixels, Anp(batch=12), ctx, "test")())

    before = loss()
    with changed_outputs(unet, affine(found)):
        assert loss() > 1.2 * before
    assert loss() == before


def test_mixed_precision_rounds_the_loss_of_gated_networks_and_changes_no_draw(
    suspicious: Model, tmp_path: Path,
) -> None:
    unet, scheduler = load_unconditional(suspicious)
    ctx, found = Context("key", tmp_path), random_gates(unet, 1)
    with torch.no_grad(), changed_outputs(unet, affine(found)):
        exact, rounded = (float(clean_loss(unet, scheduler, photos().pixels, Anp(batch=12, mixed_precision=mixed), ctx,
                                           "test")()) for mixed in (False, True))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)


def test_the_inner_step_goes_up_and_stays_within_eps(suspicious: Model, tmp_path: Path) -> None:
    unet, scheduler = load_unconditional(suspicious)
    ctx, masks = Context("key", tmp_path), gates(unet, 1.0, 0.0).gains

    def loss() -> Tensor:
        return clean_loss(unet, scheduler, photos().pixels, Anp(batch=12), ctx, "test")()

    found = ascended(unet, masks, loss, Anp(eps=0.05), torch.manual_seed(0))
    assert all(float(gate.abs().max()) <= 0.05 + 1e-6 for gate in found.all())
    opposite = Gates([-gate for gate in found.gains], [-gate for gate in found.biases])
    with torch.no_grad():
        losses = []
        for moved in (found, opposite):
            with changed_outputs(unet, masked(masks, moved)):
                losses.append(float(loss()))
    assert losses[0] > losses[1]


def test_channels_below_the_threshold_are_set_to_zero_and_counted(
    suspicious: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    from defenses import anp

    unet, scheduler = load_unconditional(suspicious)
    masks = gates(unet, 1.0, 0.0).gains
    masks[0][2], masks[1][:3] = 0.1, 0.0
    monkeypatch.setattr(anp, "trained_masks", lambda *_: masks)
    first, second = convolutions(unet)[:2]
    kept, bias = first.weight[0].clone(), first.bias.clone()
    facts = pruned(unet, scheduler, photos().pixels, Anp(**QUICK), Context("key", tmp_path))
    assert not first.weight[2].any() and not second.weight[:3].any() and second.weight[3].any()
    assert torch.equal(first.weight[0], kept) and torch.equal(first.bias, bias)
    cut = first.weight[0].numel() + 3 * second.weight[0].numel()
    assert facts == {"removed_share": cut / sum(w.numel() for w in unet.parameters()), "removed_channels": 4.0}


def repaired(defense: Anp, suspicious: Model, folder: Path) -> Model:
    folder.mkdir(exist_ok=True)
    return defense.repair(suspicious, photos(), None, Context("key", folder))


def test_it_prunes_alike_each_time_and_reports(suspicious: Model, tmp_path: Path) -> None:
    everything = Anp(**QUICK, mask_threshold=2.0, threshold=-9.0)
    one, two = (load_unconditional(repaired(everything, suspicious, tmp_path / place))[0] for place in "ab")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not any(conv.weight.any() for conv in convolutions(one))
    report = read_report(tmp_path / "a")
    assert report is not None and report.verdict is not None and report.verdict.flagged and report.trigger is None
    assert report.verdict.score == pytest.approx(1 - report.facts["variety_perturbed"] / report.facts["variety"])
    assert report.facts["removed_share"] > 0.3


def test_without_pruning_the_model_stays(suspicious: Model, tmp_path: Path) -> None:
    assert repaired(Anp(**QUICK, prune=False), suspicious, tmp_path / "a") is suspicious
    report = read_report(tmp_path / "a")
    assert report is not None and "removed_share" not in report.facts


@pytest.mark.parametrize(("options", "message"), [
    ({"budget": 0.0}, "budget=0.0"), ({"alpha": 1.5}, "alpha=1.5"), ({"prune_share": 0.0}, "prune_share"),
    ({"samples": 1}, "samples=1"), ({"eps": 0.0}, "eps=0.0"),
])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        Anp(**options)


def test_images_of_another_size_are_refused(suspicious: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="data.size=8"):
        Anp(**QUICK).repair(suspicious, photos(size=16), None, Context("key", tmp_path))


def test_defaults_are_the_published_ones() -> None:
    made = Anp()
    assert (made.budget, made.lr, made.epochs, made.batch, made.grad_clip) == (4, 1e-4, 5, 128, 1)
    assert (made.eps, made.alpha, made.prune_steps, made.prune_lr, made.mask_threshold) == (0.4, 0.2, 2000, 0.2, 0.2)
    assert facts_of(made).knows == ()
