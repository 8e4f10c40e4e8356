"""ANP: adversarial neuron perturbation of a diffusion model, and the pruning that it was invented for.

1. *Perturbation* (as in BadDiffusion, Chou et al., CVPR 2023, who try it against their attack). The output of every
   convolution gets a gain and a bias per channel, y -> g y + b, from g = 1, b = 0, both within [-budget, budget]; they
   alone are trained, to *raise* the noise-prediction loss on clean images. If neurons of a backdoor are the easiest to
   excite, the perturbed network draws the target from plain noise.
2. *Verdict* (ours). The authors compare the perturbed network's samples with the true target, which no defender has.
   Samples that all show one picture lose their variety: score = 1 - (mean distance between two samples of the perturbed
   network) / (that of the suspicious one, same seeds). ``threshold`` is for a verdict without clean models.
3. *Pruning* (Wu and Wang, Adversarial Neuron Pruning Purifies Backdoored Deep Models, NeurIPS 2021; ``prune=false``
   leaves it out, as BadDiffusion's code does). Masks m in [0, 1] of the channels' weights w are trained with
       min_m  a L(m w, b) + (1 - a) max_{|d|, |x| <= eps} L((m + d) w, (1 + x) b)
   (one ascent step of size eps from a random start), and channels with m below ``mask_threshold`` are set to zero.

Settings [BadDiffusion's code]: budget 4, Adam 1e-4, 5 epochs, batch 128, gradient clip 1. At that rate a gain moves by
0.2 at most in CIFAR10's 1955 updates: the budget never binds. [Wu and Wang, classifiers]: eps 0.4, a 0.2, SGD 0.2 with
momentum 0.9, 2000 steps, threshold 0.2, 1 % of the clean images.

Deviations: no published work prunes a diffusion model this way; step 3 takes the classifier's settings over to the
noise-prediction loss. Perturbation uses all clean images, as the code does; the learning rate decays by a cosine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.identity import digest
from bench.options import check_training, require_all
from bench.plugin import plugin
from bench.records import ImageSet, Model, Report, Secret, Verdict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context

logger = logging.getLogger(__name__)


@plugin(
    "defense", "anp", track=("backdoor",), acts_on="model", needs=("unconditional", "clean_data"),
    paper="Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021; used by Chou et al., CVPR 2023",
    official_code="https://github.com/IBM/BadDiffusion",
)
class Anp:
    """Perturbs channels to raise the loss, looks whether the samples become one picture, and prunes what is sensitive.

    ``budget``: bound of gains and biases. ``steps``: updates of the perturbation, None for ``epochs`` passes.
    ``samples``: for the verdict, from the full chain or ``sampling_steps``. ``prune``: the third step; ``eps``,
    ``alpha``, ``prune_steps``, ``prune_lr``, ``prune_share`` (of the clean images), ``mask_threshold``: its settings.
    ``mixed_precision``: compute losses in bfloat16; samples are drawn without it.
    """

    budget: float = 4.0
    lr: float = 1e-4
    epochs: int = 5
    steps: int | None = None
    batch: int = 128
    grad_clip: float = 1.0
    samples: int = 16
    sampling_steps: int = 1000
    threshold: float = 0.5
    prune: bool = True
    eps: float = 0.4
    alpha: float = 0.2
    prune_steps: int = 2000
    prune_lr: float = 0.2
    prune_share: float = 0.01
    mask_threshold: float = 0.2
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        check_training(self)
        require_all(self, above={"budget": 0, "lr": 0, "eps": 0, "prune_lr": 0, "prune_share": 0}, least={
            "epochs": 1, "batch": 1, "grad_clip": 0, "samples": 2, "sampling_steps": 1, "prune_steps": 1, "alpha": 0,
            "mask_threshold": 0})
        if self.alpha > 1 or self.prune_share > 1:
            raise BenchError(f"defense.alpha={self.alpha}, defense.prune_share={self.prune_share}: give at most 1.")

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The pruned model (``suspicious`` itself without pruning); a report beside it."""
        from bench.diffusion.distilling import open_noise_predictor
        from bench.diffusion.loading import save_part
        from bench.reports import write_report

        unet, scheduler = open_noise_predictor("anp", suspicious, ctx)
        if tuple(data.pixels.shape[2:]) != (unet.config.sample_size, unet.config.sample_size):
            raise BenchError(f"anp: clean images are {list(data.pixels.shape[2:])} pixels, but the model draws "
                             f"{unet.config.sample_size}; set data.size={unet.config.sample_size}.")
        verdict, facts = probe(unet, scheduler, data.pixels, self, ctx)
        if self.prune:
            facts |= pruned(unet, scheduler, data.pixels, self, ctx)
        write_report(Report(verdict, facts=facts), ctx.folder)
        if not self.prune:
            return suspicious
        part = save_part(unet, ctx.folder, "unet")
        return replace(suspicious, parts={**suspicious.parts, "unet": part},
                       digest=digest([suspicious.digest, ctx.key]))


@dataclass(frozen=True)
class Gates:
    """Two numbers per channel of every convolution, [c] each; what they mean is the user's."""

    gains: list[Tensor]
    biases: list[Tensor]

    def all(self) -> list[Tensor]:
        return [*self.gains, *self.biases]


def convolutions(unet: Any) -> list[Any]:
    """Every convolution, in the network's order."""
    from torch import nn

    return [module for module in unet.modules() if isinstance(module, nn.Conv2d)]


def gates(unet: Any, gain: float, bias: float) -> Gates:
    """One gain and one bias per channel of each convolution."""
    gains, biases = ([conv.weight.new_full((conv.out_channels,), value) for conv in convolutions(unet)]
                     for value in (gain, bias))
    return Gates(gains, biases)


Rule = Callable[[int, Any, "Tensor"], "Tensor"]
"""(number of the convolution, the convolution, its output [n, c, h, w]) -> the output that takes its place."""


@contextmanager
def changed_outputs(unet: Any, rule: Rule) -> Iterator[None]:
    """Within it, every convolution's output is what ``rule`` makes of it."""
    hooks = [conv.register_forward_hook(lambda module, _, out, place=place: rule(place, module, out))
             for place, conv in enumerate(convolutions(unet))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def column(values: Tensor) -> Tensor:
    """[c] to [1, c, 1, 1]."""
    return values[None, :, None, None]


# Steps 1 and 2

def probe(
    unet: Any, scheduler: Any, pixels: Tensor, options: Anp, ctx: Context,
) -> tuple[Verdict, dict[str, float]]:
    """The verdict; ``unet`` is left as it was."""
    found, loss = perturbation(unet, scheduler, pixels, options, ctx)
    before = variety(unet, scheduler, options, ctx)
    with changed_outputs(unet, affine(found)):
        after = variety(unet, scheduler, options, ctx)
    score = 1 - after / before if before else 0.0
    logger.info("anp: variety %.4f, perturbed %.4f", before, after)
    facts = {"variety": before, "variety_perturbed": after, "perturbed_loss": loss}
    return Verdict("anp", score, score > options.threshold), facts


def affine(found: Gates) -> Rule:
    """y -> g y + b."""
    return lambda place, _, out: column(found.gains[place]) * out + column(found.biases[place])


def perturbation(unet: Any, scheduler: Any, pixels: Tensor, options: Anp, ctx: Context) -> tuple[Gates, float]:
    """Gains and biases that raise the loss on clean images, and the last loss."""
    import torch

    from bench.diffusion.training import Plan, count_steps

    found = gates(unet, 1.0, 0.0)
    weights = [gate.requires_grad_(True) for gate in found.all()]
    adam = torch.optim.Adam(weights, lr=options.lr, maximize=True)
    count = count_steps(options.steps, options.epochs, len(pixels), options.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, Plan(count, options.lr).factor)
    loss_of = clean_loss(unet, scheduler, pixels, options, ctx, "perturbation")
    with changed_outputs(unet, affine(found)):
        for _ in ctx.track(range(count), "perturbation", count):
            adam.zero_grad()
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            if options.grad_clip:
                torch.nn.utils.clip_grad_norm_(weights, options.grad_clip)
            adam.step()
            schedule.step()
            bounded(weights, -options.budget, options.budget)
    return Gates(*([gate.detach() for gate in part] for part in (found.gains, found.biases))), float(loss.detach())


def bounded(tensors: list[Tensor], low: float, high: float) -> None:
    """Clamp in place."""
    for tensor in tensors:
        tensor.data.clamp_(low, high)


def clean_loss(
    unet: Any, scheduler: Any, pixels: Tensor, options: Anp, ctx: Context, name: str,
) -> Callable[[], Tensor]:
    """The noise-prediction loss on the next batch of clean images, uint8 [n, 3, h, w]."""
    from bench.diffusion.images import to_float
    from bench.diffusion.losses import noise_prediction_loss
    from bench.diffusion.training import mixed, shuffled_batches

    rows = shuffled_batches(len(pixels), options.batch, ctx.generator(name, "batches"))
    noises = ctx.generator(name, "noise")

    def loss() -> Tensor:
        images = to_float(pixels[next(rows)]).to(ctx.device)
        with mixed(ctx.device, options.mixed_precision):
            return noise_prediction_loss(unet, scheduler, images, None, generator=noises)

    return loss


def variety(unet: Any, scheduler: Any, options: Anp, ctx: Context) -> float:
    """Mean distance between two of ``options.samples`` samples, in [0, 1] units; the same seeds each time."""
    import torch

    from bench.diffusion.sampling import adjusted, initial_noise, sample_unconditional

    seeds = [ctx.seed("sample", place) for place in range(options.samples)]
    noise = initial_noise(seeds, (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size))
    steps = min(options.sampling_steps, scheduler.config.num_train_timesteps)
    drawn = sample_unconditional(unet, adjusted(scheduler.config, clip_sample=False), noise, seeds, steps)
    return float(torch.pdist(drawn.double().flatten(1) / 255).mean())


# Step 3

def pruned(unet: Any, scheduler: Any, pixels: Tensor, options: Anp, ctx: Context) -> dict[str, float]:
    """Set sensitive channels of ``unet`` to zero, in place; what was cut."""
    import torch

    order = torch.randperm(len(pixels), generator=ctx.generator("own"))
    own = pixels[order[:max(1, round(options.prune_share * len(pixels)))]]
    masks = trained_masks(unet, scheduler, own, options, ctx)
    cut = 0
    for conv, mask in zip(convolutions(unet), masks, strict=True):
        gone = mask < options.mask_threshold
        conv.weight.data[gone] = 0
        cut += int(gone.sum()) * conv.weight[0].numel()
    total = sum(weight.numel() for weight in unet.parameters())
    channels = torch.cat(masks)
    logger.info("anp: %d of %d channels set to zero", int((channels < options.mask_threshold).sum()), len(channels))
    return {"removed_share": cut / total, "removed_channels": float((channels < options.mask_threshold).sum())}


def trained_masks(unet: Any, scheduler: Any, pixels: Tensor, options: Anp, ctx: Context) -> list[Tensor]:
    """The masks m, [c] per convolution."""
    import torch

    masks, draws = gates(unet, 1.0, 0.0).gains, ctx.generator("perturbations")
    descent = torch.optim.SGD([m.requires_grad_(True) for m in masks], lr=options.prune_lr, momentum=0.9)
    loss_of = clean_loss(unet, scheduler, pixels, options, ctx, "pruning")
    for _ in ctx.track(range(options.prune_steps), "pruning", options.prune_steps):
        worst = ascended(unet, [m.detach() for m in masks], loss_of, options, draws)
        descent.zero_grad()
        with changed_outputs(unet, masked(masks, worst)):
            ((1 - options.alpha) * loss_of()).backward()  # type: ignore[no-untyped-call]
        with changed_outputs(unet, masked(masks, gates(unet, 0.0, 0.0))):
            (options.alpha * loss_of()).backward()  # type: ignore[no-untyped-call]
        descent.step()
        bounded(masks, 0, 1)
    return [m.detach() for m in masks]


def masked(masks: list[Tensor], moved: Gates) -> Rule:
    """The output of a convolution with weights (m + d) w and bias (1 + x) b."""
    import torch

    def rule(place: int, conv: Any, out: Tensor) -> Tensor:
        bias = conv.bias if conv.bias is not None else torch.zeros_like(masks[place])
        response = out - column(bias)
        return column(masks[place] + moved.gains[place]) * response + column((1 + moved.biases[place]) * bias)

    return rule


def ascended(
    unet: Any, masks: list[Tensor], loss_of: Callable[[], Tensor], options: Anp, generator: torch.Generator,
) -> Gates:
    """The perturbations d and x: one signed ascent step of size eps from a random start, within [-eps, eps]."""
    import torch

    found = gates(unet, 0.0, 0.0)
    for gate in found.all():
        gate.copy_((2 * torch.rand(gate.shape, generator=generator) - 1) * options.eps).requires_grad_(True)
    with changed_outputs(unet, masked(masks, found)):
        gradients = torch.autograd.grad(loss_of(), found.all())
    for gate, gradient in zip(found.all(), gradients, strict=True):
        gate.requires_grad_(False).add_(options.eps * gradient.sign()).clamp_(-options.eps, options.eps)
    return found
