"""Diff-Cleanse: every loss against numbers worked out here, the cluster rule, and the whole on tiny networks."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.distilling import antithetic_steps, repair_loss
from bench.diffusion.loading import load_unconditional
from bench.errors import BenchError
from bench.plugin import changed, facts_of
from bench.records import ImageSet, Model, Secret
from bench.reports import read_report
from defenses.diff_cleanse import (
    DiffCleanse,
    alike,
    combined,
    entropy,
    entropy_band,
    fast_sampler,
    hinge,
    image_losses,
    invert,
    largest_cluster,
    late_losses,
    quantised,
    range_loss,
    shared_cosine,
    similarity_loss,
    target_set,
)
from defenses.prune_random import PruneRandom

QUICK = {"iterations": 2, "noises": 4, "sampling_steps": 2, "prune_batch": 4, "synthetic_images": 6,
         "synthetic_steps": 2, "steps": 2, "batch": 4, "ratio": 0.3}


@pytest.fixture(scope="module")
def suspicious(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from bench.testing.pipelines import save_ddpm

    return resolve(str(save_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm")))


def photos(count: int = 10, size: int = 8) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(3)).to(torch.uint8)
    return ImageSet(pixels, tuple(f"{i}" for i in range(count)))


def secret(size: int = 8) -> Secret:
    return Secret(torch.full((3, size, size), 0.5), torch.zeros(3, size, size, dtype=torch.uint8))


def images(count: int, seed: int = 0, size: int = 4) -> Tensor:
    """In [0.2, 0.8], so that no loss on range or darkness is at work unless asked for."""
    return 0.2 + 0.6 * torch.rand(count, 3, size, size, generator=torch.manual_seed(seed), dtype=torch.float64)


def numeric(loss: Callable[[Tensor], Tensor], at: Tensor, place: tuple[int, ...], h: float = 1e-6) -> float:
    up, down = at.clone(), at.clone()
    up[place] += h
    down[place] -= h
    return float((loss(up) - loss(down)) / (2 * h))


def agrees(loss: Callable[[Tensor], Tensor], at: Tensor, places: list[tuple[int, ...]]) -> None:
    """The gradient equals finite differences, and is not zero at some place."""
    leaf = at.clone().requires_grad_(True)
    gradient, = torch.autograd.grad(loss(leaf), leaf)
    found = [float(gradient[place]) for place in places]
    assert found == pytest.approx([numeric(loss, at, place) for place in places], rel=1e-4, abs=1e-7)
    assert any(abs(value) > 1e-6 for value in found)


PLACES = [(0, 0, 0, 0), (1, 2, 3, 1), (2, 1, 2, 2)]


def test_similarity_pulls_the_rest_to_the_first_target() -> None:
    rest, targets = images(3), images(2, seed=1)
    agrees(lambda x: similarity_loss(x, targets), rest, PLACES)
    cosines = [float(x.flatten() @ targets[0].flatten() / x.norm() / targets[0].norm()) for x in rest]
    assert float(similarity_loss(rest, targets)) == pytest.approx(sum(1 - c for c in cosines))
    leaf = rest.clone().requires_grad_(True)
    gradient, = torch.autograd.grad(similarity_loss(leaf, targets), leaf)
    assert float(similarity_loss(rest - 0.05 * gradient, targets)) < float(similarity_loss(rest, targets))


def test_without_targets_every_pair_counts_once() -> None:
    rest = images(3)
    agrees(lambda x: similarity_loss(x, rest[:0]), rest, PLACES)
    flat = rest.flatten(1)
    pairs = [1 - float(torch.cosine_similarity(flat[i], flat[j], dim=0)) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert float(similarity_loss(rest, rest[:0])) == pytest.approx(sum(pairs))


def test_entropy_counts_the_brightest_values_and_its_hinge_has_the_right_sign() -> None:
    one, flat = torch.zeros(2, 3, 4, 4, dtype=torch.float64).unbind(0)
    one[0, 0, 0] = 1
    found = entropy(torch.stack([one, flat]))
    assert found.tolist() == pytest.approx([0.0, math.log(48)], abs=1e-6)
    near_ties = 0.5 + 0.004 * images(3)
    agrees(lambda x: hinge(entropy(x), 5.0, 6.0).sum(), near_ties, PLACES)
    agrees(lambda x: hinge(entropy(x), 0.1, 0.2).sum(), near_ties, PLACES)
    assert hinge(torch.tensor([0.5, 3.0, 7.0]), 0.8, 6.0).tolist() == pytest.approx([0.3, 0.0, 1.0])
    low, high = entropy_band(torch.stack([flat, flat]))
    assert (low, high) == pytest.approx((math.log(48) - 0.1, math.log(48) + 0.1))


def test_range_loss_pushes_bright_values_down_and_dark_ones_up() -> None:
    x = images(1)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = 0.98, 0.01
    leaf = x.clone().requires_grad_(True)
    gradient, = torch.autograd.grad(range_loss(leaf), leaf)
    assert float(gradient[0, 0, 0, 0]) == 1 and float(gradient[0, 1, 0, 0]) == -1 and int((gradient != 0).sum()) == 2
    assert float(range_loss(x)) == pytest.approx(0.03 + 0.04)


def test_the_whole_loss_has_the_stated_weights() -> None:
    """Two of four images form the target set: weight 4/2 on L_sim, 10 on the entropy outside the targets' band."""
    kept = images(1).expand(2, -1, -1, -1)
    x = torch.cat([images(2, seed=5), kept]).requires_grad_(True)
    targets = torch.tensor([False, False, True, True])
    similarity, others = image_losses(x, targets)
    rest = x[:2]
    assert float(similarity) == pytest.approx(2 * float(similarity_loss(rest, kept)))
    band = entropy_band(kept)
    assert float(others) == pytest.approx(10 * float(hinge(entropy(rest), *band).sum()) + float(range_loss(rest)))
    gradient, = torch.autograd.grad(similarity + others, x)
    assert (gradient[2:] == 0).all() and float(gradient[:2].abs().sum()) > 0
    _, alone = image_losses(x, torch.zeros(4, dtype=torch.bool))
    assert float(alone) == pytest.approx(20 * float(hinge(entropy(x), 0.8, 6.0).sum()))


def test_quantising_lets_gradients_through() -> None:
    pattern = torch.tensor([0.5, -0.3], requires_grad=True)
    rounded = quantised(pattern)
    assert (rounded * 255).tolist() == pytest.approx([128, -76], abs=1e-3)
    (rounded * torch.tensor([3.0, -2.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert pattern.grad is not None and pattern.grad.tolist() == [3, -2]


def test_the_largest_cluster_is_of_images_that_are_all_alike() -> None:
    """A chain a-b-c whose ends differ is a cluster of two; a pair of black images is none."""
    near = torch.zeros(6, 6, dtype=torch.bool)
    for one, other in ((0, 1), (1, 2), (3, 4), (4, 5), (3, 5)):
        near[one, other] = near[other, one] = True
    assert largest_cluster(near) == 3
    near[3, 5] = near[5, 3] = False
    assert largest_cluster(near) == 2 and int(target_set(near).sum()) == 6
    assert largest_cluster(near & False) == 0

    base = images(1)[0]
    drawn = torch.stack([base, base + 1e-4, 0.9 * base, images(1, seed=9)[0], base * 0, base * 0 + 0.01])
    found = alike(drawn, 0.999)
    assert found[:3, :3].sum() == 6 and not found[3:].any() and not found.diagonal().any()
    assert largest_cluster(found) == 3


@pytest.mark.parametrize("seed", range(8))
def test_the_shared_cosine_is_the_best_worst_pair_of_any_majority(seed: int) -> None:
    """Against all subsets of more than half; the verdict at any similarity is what the cluster rule says."""
    generator = torch.manual_seed(seed)
    drawn = (0.5 + 0.3 * torch.randn(7, 3, 4, 4, generator=generator)).clamp(0, 1)
    drawn[seed % 7] = 0.01
    kept = [place for place in range(7) if place != seed % 7]
    flat = torch.nn.functional.normalize(drawn.double().flatten(1), dim=1)
    best = max(min(float(flat[a] @ flat[b]) for a, b in itertools.combinations(subset, 2))
               for subset in itertools.combinations(kept, 4))
    found = shared_cosine(drawn, 0.5)
    assert found == pytest.approx(best, abs=1e-12)
    for similarity in (found - 1e-6, found + 1e-6):
        assert (largest_cluster(alike(drawn, similarity)) > 3.5) is (found > similarity)


def test_no_majority_shares_a_cosine_where_most_images_are_black() -> None:
    drawn = torch.zeros(6, 3, 4, 4)
    drawn[:3] = images(1)[0]
    assert shared_cosine(drawn, 0.5) == 0 and shared_cosine(drawn, 0.4) == pytest.approx(1)


def brightness_door(target: Tensor) -> Callable[[Tensor], Tensor]:
    """A hand-made backdoored sampler: noise becomes an image, and the higher its mean, the more of the target."""
    def sample(x: Tensor) -> Tensor:
        opened = torch.sigmoid(20 * (x.flatten(1).mean(1) - 0.5))[:, None, None, None]
        return (1 - opened) * (0.5 + 0.15 * x.tanh()) + opened * target

    return sample


def test_inversion_opens_a_hand_made_backdoor_and_finds_none_where_there_is_none(tmp_path: Path) -> None:
    noises = torch.randn(8, 3, 6, 6, generator=torch.manual_seed(0))
    target = 0.75 + 0.1 * torch.rand(3, 6, 6, generator=torch.manual_seed(1))
    options, ctx = DiffCleanse(noises=8, iterations=60), Context("key", tmp_path)
    found = invert(brightness_door(target), noises, options, ctx)
    assert found.losses[-1] < 0.1 * found.losses[0]
    assert largest_cluster(alike(found.images, 0.999)) == 8 and found.iterations < 60
    assert torch.equal(quantised(found.pattern), found.pattern)

    fixed = images(8, size=6).float()
    unmoved = invert(lambda x: fixed.clone(), noises, DiffCleanse(noises=8, iterations=5), ctx)
    assert largest_cluster(alike(unmoved.images, 0.999)) == 0 and unmoved.iterations == 5
    assert found.cosine > 0.999 > unmoved.cosine == shared_cosine(fixed, 0.5)


def test_inversion_keeps_the_largest_cluster_that_it_passed(tmp_path: Path) -> None:
    """The third look at the sampler shows six of eight images alike, every other one none; the search starts black."""
    apart, looked = images(8, size=6).float(), []

    def sample(x: Tensor) -> Tensor:
        looked.append(x)
        drawn = apart.clone()
        if len(looked) == 3:
            drawn[:6] = drawn[:1]
        return drawn

    noises = torch.randn(8, 3, 6, 6, generator=torch.manual_seed(0))
    found = invert(sample, noises, DiffCleanse(noises=8, iterations=5, start="black"), Context("key", tmp_path))
    assert len(looked) == 6 and found.iterations == 5
    assert torch.equal(looked[0], noises - 1)
    assert largest_cluster(alike(found.images, 0.999)) == 6 and found.cosine > 0.999
    assert torch.allclose(looked[2], noises + found.pattern) and not torch.equal(looked[2], looked[5])


@pytest.mark.parametrize("sampler", ["unipc", "ddim", "ddpm"])
def test_fast_sampling_repeats_and_sees_the_pattern(suspicious: Model, tmp_path: Path, sampler: str) -> None:
    unet, scheduler = load_unconditional(suspicious)
    options = DiffCleanse(sampler=sampler, sampling_steps=3, noises=2)
    sample = fast_sampler(unet, scheduler, options, Context("key", tmp_path))
    x = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0))
    first, again, moved = sample(x), sample(x), sample(x + 0.5)
    assert torch.equal(first, again) and not torch.equal(first, moved)
    assert float(first.min()) >= 0 and float(first.max()) <= 1


def test_late_losses_cover_the_last_tenth_with_the_trigger_in_the_noise(suspicious: Model) -> None:
    """The oracle forms x_t = sqrt(abar) x + sqrt(1 - abar) (eps + r) itself and counts the steps 18 and 19 of 20."""
    unet, scheduler = load_unconditional(suspicious)
    x, noise = torch.rand(2, 2, 3, 8, 8, generator=torch.manual_seed(0)).unbind(0)
    trigger = secret().trigger
    assert isinstance(trigger, Tensor)
    with torch.no_grad():
        found = [float(loss) for loss in late_losses(unet, scheduler, x, noise, trigger, 0.9)]
        expected = []
        for t in (18, 19):
            bar = scheduler.alphas_cumprod[t]
            noisy = bar.sqrt() * x + (1 - bar).sqrt() * (noise + trigger)
            expected.append(float((unet(noisy, torch.tensor([t, t])).sample - noise).square().mean()))
    assert found == pytest.approx(expected, rel=1e-4)


def test_sum_and_diff_rank_by_the_stated_formulas() -> None:
    from torch import nn

    from bench.diffusion.pruning import prune

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False))
    weights = {name: torch.rand_like(weight) for name, weight in network.named_parameters()}
    clean, backdoor = (dict(zip(weights, found)) for found in (
        [torch.rand_like(w) for w in weights.values()], [torch.rand_like(w) for w in weights.values()]))

    def by_hand(gradients: dict[str, Tensor]) -> Tensor:
        own = (network[0].weight * gradients["0.weight"]).abs().flatten(1).sum(1)  # type: ignore[operator]
        read = (network[1].weight * gradients["1.weight"]).abs().transpose(0, 1).flatten(1).sum(1)  # type: ignore[operator]
        return ((own + read) / (own + read).mean()).detach()

    expected = {"sum": -(by_hand(backdoor) + by_hand(clean)), "diff": by_hand(clean) - by_hand(backdoor)}
    for importance, wanted in expected.items():
        seen: list[Tensor | None] = []
        score = combined(network, clean, backdoor, importance)
        prune(network, torch.zeros(1, 2, 4, 4), lambda group: seen.append(score(group)), 0.3,  # noqa: B023
              ignored=(network[1],))  # type: ignore[func-returns-value]
        assert seen[0] is not None and torch.allclose(seen[0], wanted, rtol=1e-4)
    assert not torch.equal(expected["sum"].argsort(), expected["diff"].argsort())


def test_the_distillation_term_moves_weights(suspicious: Model) -> None:
    """Against a teacher that differs, the term adds to the gradient; against the student itself it is zero."""
    unet, scheduler = load_unconditional(suspicious)
    other, _ = load_unconditional(suspicious)
    with torch.no_grad():
        other.conv_out.bias += 0.5
    x = torch.rand(4, 3, 8, 8, generator=torch.manual_seed(0))

    def gradient(teacher: object, weight: float) -> Tensor:
        unet.requires_grad_(True).zero_grad()
        repair_loss(unet, teacher, scheduler, x, weight, torch.manual_seed(1)).backward()  # type: ignore[no-untyped-call]
        found: Tensor = unet.conv_out.bias.grad.clone()
        return found

    alone = gradient(other, 0.0)
    assert torch.allclose(gradient(unet, 1.0), alone, atol=1e-4)
    # || student - (student + 0.5) ||^2 summed over 64 pixels: its derivative in the bias is -2 * 0.5 * 64.
    assert torch.allclose(gradient(other, 1.0) - alone, torch.full((3,), -64.0), rtol=1e-3)


def test_antithetic_steps_are_as_often_early_as_late() -> None:
    steps = antithetic_steps(100, 7, torch.manual_seed(0))
    assert len(steps) == 7 and torch.equal(steps[4:], 99 - steps[:3])


def repaired(defense: DiffCleanse | PruneRandom, suspicious: Model, folder: Path, told: Secret | None = None) -> Model:
    folder.mkdir(exist_ok=True)
    return defense.repair(suspicious, photos(), told, Context("key", folder))


@pytest.mark.parametrize("repair_data", ["synthetic", "real"])
def test_a_model_found_backdoored_is_pruned_and_repaired_alike_each_time(
    suspicious: Model, tmp_path: Path, repair_data: str,
) -> None:
    """A cosine threshold that every pair passes makes any model look backdoored."""
    defense = DiffCleanse(similarity=1e-9, repair_data=repair_data, **QUICK)  # type: ignore[arg-type]
    models = [repaired(defense, suspicious, tmp_path / place) for place in ("a", "b")]
    nets = [load_unconditional(model)[0] for model in models]
    before = load_unconditional(suspicious)[0]
    assert nets[0].time_embedding.linear_1.out_features < before.time_embedding.linear_1.out_features
    assert all(torch.equal(one, two) for one, two in zip(*(net.parameters() for net in nets)))
    report = read_report(tmp_path / "a")
    assert report is not None and report.verdict is not None and report.verdict.flagged
    assert report.verdict.score == 1 and report.trigger is not None and report.trigger.shape == (3, 8, 8)
    counts = [sum(w.numel() for w in net.parameters()) for net in (nets[0], before)]
    assert report.facts["removed_share"] == pytest.approx(1 - counts[0] / counts[1])
    assert report.facts["updates"] == 2 and models[0].digest != suspicious.digest


def test_a_model_found_clean_is_returned_as_it_is_unless_told_otherwise(suspicious: Model, tmp_path: Path) -> None:
    strict = {**QUICK, "similarity": 0.9999999}
    kept = repaired(DiffCleanse(**strict), suspicious, tmp_path / "a")  # type: ignore[arg-type]
    report = read_report(tmp_path / "a")
    assert kept is suspicious and report is not None and report.verdict is not None
    assert not report.verdict.flagged and report.facts["removed_share"] == 0
    assert json.loads((tmp_path / "a/report.json").read_text())["verdict"]["score"] == 0
    repaired(DiffCleanse(score="cosine", **strict), suspicious, tmp_path / "c")  # type: ignore[arg-type]
    graded = read_report(tmp_path / "c")
    assert graded is not None and graded.verdict is not None
    assert not graded.verdict.flagged and 0 < graded.verdict.score < strict["similarity"]
    anyway = repaired(DiffCleanse(always=True, **strict), suspicious, tmp_path / "b")  # type: ignore[arg-type]
    assert anyway.digest != suspicious.digest


def test_the_true_trigger_is_a_declared_ablation(suspicious: Model, tmp_path: Path) -> None:
    told = DiffCleanse(trigger="known", **QUICK)  # type: ignore[arg-type]
    assert facts_of(told).knows == ("trigger",) and facts_of(DiffCleanse()).knows == ()
    with pytest.raises(BenchError, match="trigger=known needs"):
        repaired(told, suspicious, tmp_path / "a")
    with pytest.raises(BenchError, match="trigger=known needs"):
        repaired(told, suspicious, tmp_path / "b", replace(secret(), trigger="word"))
    model = repaired(told, suspicious, tmp_path / "c", secret())
    report = read_report(tmp_path / "c")
    assert report is not None and report.verdict is None and report.trigger is None
    assert model.digest != suspicious.digest


def test_it_does_not_look_at_a_secret_that_it_did_not_declare(suspicious: Model, tmp_path: Path) -> None:
    defense = DiffCleanse(always=True, **QUICK)  # type: ignore[arg-type]
    one, two = (load_unconditional(repaired(defense, suspicious, tmp_path / place, told))[0]
                for place, told in (("a", None), ("b", secret())))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_random_pruning_removes_as_much_and_by_chance(suspicious: Model, tmp_path: Path) -> None:
    options = {name: QUICK[name] for name in ("synthetic_images", "synthetic_steps", "steps", "batch", "ratio")}
    repaired(PruneRandom(**options), suspicious, tmp_path / "a")  # type: ignore[arg-type]
    repaired(DiffCleanse(always=True, **QUICK), suspicious, tmp_path / "b")  # type: ignore[arg-type]
    reports = [read_report(tmp_path / place) for place in "ab"]
    assert all(report is not None for report in reports)
    shares = [report.facts["removed_share"] for report in reports if report is not None]
    assert shares[0] == pytest.approx(shares[1]) and shares[0] > 0
    assert facts_of(PruneRandom).control and not facts_of(DiffCleanse).control


@pytest.mark.parametrize(("options", "message"), [
    ({"trigger": "guess"}, "inverted"), ({"importance": "max"}, "diff"), ({"sampler": "euler"}, "unipc"),
    ({"noises": 1}, "noises=1"), ({"iterations": 0}, "iterations=0"), ({"ratio": 1.0}, "ratio=1.0"),
    ({"from_step": 1.0}, "from_step=1.0"), ({"repair_data": "fake"}, "synthetic"), ({"real_share": 1.5}, "real_share"),
    ({"ema": 1.0}, "ema=1.0"), ({"lr": 0.0}, "lr=0.0"), ({"steps": 0}, "steps=0"), ({"distill": -1.0}, "distill"),
])
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        DiffCleanse(**options)  # type: ignore[arg-type]


def test_real_images_of_another_size_are_refused(suspicious: Model, tmp_path: Path) -> None:
    defense = PruneRandom(repair_data="real", steps=1)
    with pytest.raises(BenchError, match="data.size=8"):
        defense.repair(suspicious, photos(size=16), None, Context("key", tmp_path))


def test_defaults_are_the_published_ones() -> None:
    made = DiffCleanse()
    assert (made.noises, made.iterations, made.inversion_lr, made.similarity) == (16, 100, 0.1, 0.999)
    assert (made.sampler, made.sampling_steps, made.gradient_scale, made.pattern_entropy) == ("unipc", 20, 1e3, 0)
    assert (made.importance, made.ratio, made.respect_groupnorm, made.from_step) == ("sum", 0.02, True, 0.9)
    assert (made.repair_data, made.real_share, made.epochs, made.batch, made.lr) == ("synthetic", 0.1, 40, 128, 2e-4)
    assert (made.ema, made.grad_clip, made.distill, made.always, made.trigger) == (0.999, 1, 1, False, "inverted")
    shared = set(vars(PruneRandom())) & set(vars(made)) - {"__plugin__"}
    assert {name: getattr(made, name) for name in shared} == {name: getattr(PruneRandom(), name) for name in shared}
    assert "clean_data" in facts_of(DiffCleanse(repair_data="real")).needs and changed(made) == {}
