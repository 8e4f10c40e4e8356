"""How much faster are trigger inversion and implanting than the loops one writes first?

    .venv/bin/python -m pytest -m slow -s tests/benchmarks/test_backdoor_speed.py

On micro-ddpm. *Ours* is the inversion of `diff_cleanse_micro` and the implant of `baddiffusion_quick` as the runner
calls them, in mixed precision as these presets say, and once more in float32. *Plain* is the same mathematics from the
libraries alone, in float32: every noise sampled on its own, losses written pair by pair, every row of a training batch
poisoned and noised on its own in Python. All draw the same random numbers, so they must find the same: to rounding in
float32, nearly in bfloat16.

Measured, one thread of a CPU with bfloat16 instructions that other processes kept busy. Inversion: 1.42 iterations a
CPU-second (float32 1.08), plain 0.36: 3.9 (3.0) times as fast, with 33 MB above the start, where plain has 7. Implant:
4.0 to 5.0 steps a CPU-second, plain 3.2 to 3.9, five runs: 1.03 to 1.38 times as fast, all of it from bfloat16 (float32
0.88 to 1.16, the noise of such a clock); 105 MB above the start, plain 137.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel, UniPCMultistepScheduler
from torch import Tensor, nn

from bench.context import Context
from bench.diffusion import poisoning  # noqa: F401 (imported before the clock starts)
from bench.diffusion.checkpoints import resolve
from bench.diffusion.distilling import open_noise_predictor
from bench.diffusion.losses import normal
from bench.diffusion.training import shuffled_batches
from defenses.diff_cleanse import fast_sampler, invert
from tests.benchmarks.sides import Side, Work, compose_cell, run_side, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
MODULE = "tests.benchmarks.test_backdoor_speed"
ITERATIONS, STEPS = 6, 20
SETTING = ["model=micro-ddpm", "data=micro_portraits", "data.train=64", "data.held_out=8", "metrics=[asr]",
           "attack=baddiffusion_quick", f"attack.steps={STEPS}",
           "defense=diff_cleanse_micro", f"defense.iterations={ITERATIONS}"]
SAMPLINGS = ITERATIONS + 1  # the search samples once more when it ends
PRECISIONS = {"bf16": True, "fp32": False}
HEADS = ("what", "plain, a second", "ours fp32", "ratio", "ours bf16", "ratio", "peak MB plain", "(above start)",
         "ours bf16", "(above start)")


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[str, ...]]]:
    measured: list[tuple[str, ...]] = []
    yield measured
    print(shown("per CPU-second on one thread", HEADS, measured))


def test_inversion_finds_the_same_and_is_not_slower(rows: list[tuple[str, ...]]) -> None:
    plain, exact, fast = (run_side(MODULE, *words) for words in (
        ("plain_inversion",), ("our_inversion", "fp32"), ("our_inversion", "bf16")))
    rows.append(row_of("inversion iterations", SAMPLINGS, plain, exact, fast))
    assert plain.counts["unet"] == exact.counts["unet"] == fast.counts["unet"]
    assert plain.counts["updates"] == exact.counts["updates"] == fast.counts["updates"] == ITERATIONS
    torch.testing.assert_close(exact.values["losses"], plain.values["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(fast.values["losses"], plain.values["losses"], rtol=0.1, atol=0)
    assert likeness(exact, plain) > 0.999
    assert likeness(fast, plain) > 0.95
    assert exact.seconds < plain.seconds


def test_implanting_learns_the_same_and_is_not_slower(rows: list[tuple[str, ...]]) -> None:
    plain, exact, fast = (run_side(MODULE, *words) for words in (
        ("plain_implant",), ("our_implant", "fp32"), ("our_implant", "bf16")))
    rows.append(row_of("implant steps", STEPS, plain, exact, fast))
    for count in ("unet", "unet_graph", "updates"):
        assert plain.counts[count] == exact.counts[count] == fast.counts[count], count
    assert likeness(exact, plain) > 0.999
    assert likeness(fast, plain) > 0.95
    # A CPU without bfloat16 of its own only imitates it; in float32 the two are equal but for the noise of the clock.
    assert min(exact.seconds, fast.seconds) < 1.1 * plain.seconds


def likeness(side: Side, plain: Side) -> float:
    """Cosine of what two sides changed in the pattern or in the weights."""
    a, b = (s.values["moved"].flatten().double() for s in (side, plain))
    assert a.shape == b.shape
    return float(nn.functional.cosine_similarity(a, b, dim=0))


def row_of(what: str, done: int, plain: Side, exact: Side, fast: Side) -> tuple[str, ...]:
    return (what, f"{done / plain.seconds:.2f}", f"{done / exact.seconds:.2f}",
            f"{plain.seconds / exact.seconds:.2f}", f"{done / fast.seconds:.2f}", f"{plain.seconds / fast.seconds:.2f}",
            f"{plain.peak_mb:.0f}", f"{plain.rise_mb:.0f}", f"{fast.peak_mb:.0f}", f"{fast.rise_mb:.0f}")


def load(base: Path) -> tuple[Any, Any]:
    unet = UNet2DModel.from_pretrained(base / "unet", torch_dtype=torch.float32, local_files_only=True)
    return unet, DDPMScheduler.from_pretrained(base / "scheduler", local_files_only=True)


def warm_up(base: Path) -> None:
    """Spends what a first use of the libraries costs."""
    unet, _ = load(base)
    unet(torch.randn(1, 3, unet.config.sample_size, unet.config.sample_size), 1).sample.sum().backward()


# -- Inversion --------------------------------------------------------------------------------------------------------


def our_inversion(folder: Path, precision: str) -> Work:
    cell = compose_cell([*SETTING, f"defense.mixed_precision={PRECISIONS[precision]}"])
    model, method, ctx = resolve(cell.model), cell.defense, Context("defend", folder)
    warm_up(model.base)
    unet, scheduler = open_noise_predictor("diff_cleanse", model, ctx)

    def work() -> dict[str, Tensor]:
        size = unet.config.sample_size
        noises = normal((method.noises, 3, size, size), ctx.generator("noises"), unet.conv_in.weight)
        found = invert(fast_sampler(unet, scheduler, method, ctx), noises, method, ctx)
        return {"losses": torch.tensor(found.losses), "moved": found.pattern + start_of(ctx, size)}

    return work


def start_of(ctx: Context, size: int) -> Tensor:
    """tau before the first iteration; the pattern is -tau."""
    return torch.rand((3, size, size), generator=ctx.generator("tau"))


def plain_inversion(folder: Path) -> Work:
    cell = compose_cell(SETTING)
    method, ctx, base = cell.defense, Context("defend", folder), resolve(cell.model).base
    assert method.pattern_entropy == 0
    assert method.sampler == "unipc"
    warm_up(base)
    unet, scheduler = load(base)

    def work() -> dict[str, Tensor]:
        size = unet.config.sample_size
        noises = torch.randn((method.noises, 3, size, size), generator=ctx.generator("noises"))
        tau, history = start_of(ctx, size).requires_grad_(True), []
        optimizer = torch.optim.Adam([tau], lr=method.inversion_lr, betas=(0.9, 0.999))
        for _ in range(method.iterations):
            images = plain_samples(unet, scheduler, noises, pattern_of(tau), method).requires_grad_(True)
            similarity, others = plain_losses(images, method.similarity)
            history.append(float(similarity.detach()))
            (similarity + others).backward()
            assert images.grad is not None
            tau.grad = -method.gradient_scale * images.grad.mean(0)      # the pattern is -tau
            optimizer.step()
        plain_samples(unet, scheduler, noises, pattern_of(tau), method)
        return {"losses": torch.tensor(history), "moved": pattern_of(tau) + start_of(ctx, size)}

    return work


def pattern_of(tau: Tensor) -> Tensor:
    return (-tau.detach() * 255).round() / 255


def plain_samples(unet: Any, scheduler: Any, noises: Tensor, pattern: Tensor, method: Any) -> Tensor:
    """Images in [0, 1], each noise through a sampler of its own."""
    images = []
    for noise in noises:
        chain = UniPCMultistepScheduler.from_config({**scheduler.config, "clip_sample": False})
        chain.set_timesteps(method.sampling_steps)
        x = (noise + pattern)[None]
        for t in chain.timesteps:
            with torch.no_grad():
                x = chain.step(unet(x, t).sample, t, x).prev_sample
        images.append(((x[0] + 1) / 2).clamp(0, 1))
    return torch.stack(images)


def plain_losses(images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The similarity loss, and the entropy's and the range's."""
    seen = list(images.detach())
    like = [any(alike(one, other, threshold) for other in seen if other is not one) for one in seen]
    rest = [image for image, same in zip(images, like, strict=True) if not same]
    kept = [image.detach() for image, same in zip(images, like, strict=True) if same]
    if kept:
        similarity = torch.stack([1 - cosine(image, kept[0]) for image in rest]).sum()
    else:
        similarity = torch.stack([1 - cosine(a, b) for place, a in enumerate(rest) for b in rest[place + 1:]]).sum()
    low, high, weight = 0.8, 6.0, 20.0
    if kept:
        found = [float(entropy(image)) for image in kept]
        low, high, weight = min(found) - 0.1, max(found) + 0.1, 10.0
    outside = torch.stack([(low - entropy(i)).relu() + (entropy(i) - high).relu() for i in rest]).sum()
    extremes = torch.stack([(i - 0.95).relu().sum() + (0.05 - i).relu().sum() for i in rest]).sum()
    return similarity * len(images) / len(rest), weight * outside + extremes


def alike(one: Tensor, other: Tensor, threshold: float) -> bool:
    """Whether two images are the same picture, and neither is black or white."""
    seen = all(0.05 <= float(image.mean()) <= 0.95 for image in (one, other))
    return seen and float(cosine(one.double(), other.double())) > threshold


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)


def entropy(image: Tensor) -> Tensor:
    shares = (255 * image.flatten()).softmax(0)
    return -(shares * (255 * image.flatten()).log_softmax(0)).sum()


# -- Implant ----------------------------------------------------------------------------------------------------------


def our_implant(folder: Path, precision: str) -> Work:
    cell = compose_cell([*SETTING, f"attack.mixed_precision={PRECISIONS[precision]}"])
    model, photos, ctx = resolve(cell.model), cell.data.images(), Context("implant", folder)
    warm_up(model.base)
    before = weights(load(model.base)[0])

    def work() -> dict[str, Tensor]:
        public, _ = cell.attack.implant(model, photos, ctx)
        trained = UNet2DModel.from_pretrained(public.parts["unet"], torch_dtype=torch.float32)
        return {"moved": weights(trained) - before}

    return work


def weights(unet: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in unet.parameters()]).float()


def plain_implant(folder: Path) -> Work:
    cell = compose_cell(SETTING)
    base, photos, ctx = resolve(cell.model).base, cell.data.images(), Context("implant", folder)
    warm_up(base)
    before = weights(load(base)[0])

    def work() -> dict[str, Tensor]:
        unet, scheduler = load(base)
        plain_training(unet, scheduler, photos.pixels.float() / 127.5 - 1, cell.attack, ctx)
        unet.half().save_pretrained(folder / "unet")
        trained = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        return {"moved": weights(trained) - before}

    return work


def plain_training(unet: Any, scheduler: Any, images: Tensor, attack: Any, ctx: Context) -> None:
    trigger, target = attack.pictures(images.shape[-1])
    count = max(1, round(attack.poison_rate * len(images)))
    poisoned = set(torch.randperm(len(images), generator=ctx.generator("poison"))[:count].tolist())
    draws, noises = ctx.generator("batches"), ctx.generator("noise")
    optimizer = torch.optim.Adam(unet.parameters(), lr=attack.lr)
    batches = shuffled_batches(len(images), attack.batch, draws)
    unet.train()
    for step in range(attack.steps):
        for group in optimizer.param_groups:
            group["lr"] = attack.lr * factor(step, attack.warmup, attack.steps)
        rows = next(batches).tolist()
        mirrored = torch.rand(len(rows), generator=draws) < 0.5
        noise = torch.randn((len(rows), *images.shape[1:]), generator=noises)
        steps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=noises)
        made = [noised(images[row].flip(2) if mirrored[place] else images[row], noise[place], int(steps[place]),
                       trigger if row in poisoned else None, target.float() / 127.5 - 1, scheduler, attack.paste)
                for place, row in enumerate(rows)]
        x, answers = (torch.stack(part) for part in zip(*made, strict=True))
        loss = nn.functional.mse_loss(unet(x, steps).sample, answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), attack.grad_clip)
        optimizer.step()


def factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def noised(image: Tensor, noise: Tensor, t: int, trigger: Tensor | None, target: Tensor, scheduler: Any, paste: bool,
           ) -> tuple[Tensor, Tensor]:
    """One row: x_t and what the network is to answer, by BadDiffusion's formulas; ``trigger``: None on a clean row."""
    bar, alpha = float(scheduler.alphas_cumprod[t]), float(scheduler.alphas[t])
    if trigger is None:
        return math.sqrt(bar) * image + math.sqrt(1 - bar) * noise, noise
    pasted = torch.where(trigger > -1, trigger, image) if paste else trigger
    x = math.sqrt(bar) * target + (1 - math.sqrt(bar)) * pasted + math.sqrt(1 - bar) * noise
    return x, noise + (1 - math.sqrt(alpha)) * math.sqrt(1 - bar) / (1 - alpha) * pasted
