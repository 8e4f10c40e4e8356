"""CAAT: perturb photos against cross-attention that learns them at the same time.

Xu et al., "Perturbing Attention Gives You More Bang for the Buck: Subtle Imaging Perturbations That Efficiently Fool
Customized Diffusion Models", CVPR 2024 (arXiv:2404.15081). Written from the paper's abstract and from facts about the
released code; no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bench.context import Context
    from bench.diffusion.loading import Components
    from bench.diffusion.surrogates import Losses
    from bench.records import ImageSet, Model, Subject


@plugin(
    "defense", "caat", track=("customization",), acts_on="images", needs=("text_to_image", "text_encoder"),
    paper="CAAT, CVPR 2024, arXiv:2404.15081", official_code="https://github.com/CO2-cityao/CAAT",
)
class Caat:
    """One backward pass a step: the photos' pixels climb the noise-prediction loss, the cross-attention's keys and
    values descend it.

    The surrogate trains what Custom Diffusion trains (Kumari et al., CVPR 2023): the key and value projections of all
    cross-attention layers, on set B under "a photo of a person". It needs no other photos of the person, no class
    images and not the attacker's prompt.

    ``eps``, ``alpha_255``: budget and step in 0-255 levels; 0.05 and 0.005 on the [-1, 1] scale are 6.375 and 0.6375
    levels [released script]. ``steps``: 250 [released script], each moves pixels once and weights once. ``lr``: 1e-5,
    of AdamW [released script]. ``clip``: norm limit of the weights' gradient, 1 [released code]. ``pgd_batch``: photos
    per pass; it saves memory, and beyond rounding changes nothing.

    Deviations from the released code. The script mirrors half of the photos before it protects them, and saves under
    the extension of the input (JPEG in, JPEG out); here photos keep their side and are saved losslessly. Photos are
    square already, so its random crop, which would cut other photos, has no counterpart. Arithmetic is in 32 bits,
    there in bfloat16 around 32-bit keys and values. Its prior preservation splits the perturbed photos in half
    and calls one half class images; its script leaves that off, and here it does not exist.
    """

    eps: float = 6.375
    alpha_255: float = 0.6375
    steps: int = 250
    lr: float = 1e-5
    clip: float = 1.0
    pgd_batch: int = 4

    def __post_init__(self) -> None:
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0, "lr": 0, "clip": 0}, least={"steps": 0, "pgd_batch": 1})

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each against projections that start at the published weights."""
        from bench.diffusion.surrogates import protect_each

        surrogate = open_surrogate(self, model, ctx)
        return protect_each(subjects, self.budget(), model, ctx, "caat",
                            lambda subject, x: climb(self, subject, x, surrogate, ctx))


@dataclass
class Projections:
    """A model whose cross-attention keys and values learn. ``start``: their published values."""

    components: Components
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    start: list[Tensor]


def open_surrogate(method: Caat, model: Model, ctx: Context) -> Projections:
    """Load the model; of its weights only keys and values of cross-attention take gradients."""
    from bench.diffusion.finetuning import adamw, trainable
    from bench.diffusion.loading import load_components

    components = load_components(model, ctx.device)
    layers = [layer for name, layer in components.unet.named_modules() if name.endswith("attn2")]
    projections = [projection for layer in layers for projection in (layer.to_k, layer.to_v)]
    for projection in projections:
        projection.requires_grad_(True).register_forward_hook(keep_first_token)
    parameters = trainable(*projections)
    return Projections(components, parameters, adamw(parameters, method.lr), [p.detach().clone() for p in parameters])


def keep_first_token(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Custom Diffusion stops the gradient at the key and value of the first token, the start of every prompt."""
    import torch

    return torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)


def climb(method: Caat, subject: Subject, x: Tensor, surrogate: Projections, ctx: Context) -> Tensor:
    """Photos ``x`` [n, 3, h, w] in [-1, 1] after all steps, within the budget; floats."""
    import torch

    from bench.diffusion.finetuning import restart
    from bench.diffusion.losses import encode_prompts
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import denoising_losses, draw

    parts, generator, perturbed = surrogate.components, ctx.generator(subject.name), x
    torch._foreach_copy_([p.data for p in surrogate.parameters], surrogate.start)
    restart(surrogate.optimizer)
    with torch.no_grad():
        states = encode_prompts(parts.tokenizer, parts.text_encoder, [f"a photo of a {subject.class_noun}"])
    for step in range(method.steps):
        draws = draw(parts.vae, parts.scheduler, x, generator)
        losses = denoising_losses(parts.vae, parts.unet, parts.scheduler, states, draws)
        gradient = backward(perturbed, losses, method.pgd_batch)              # of L_ldm(x; theta), in x and in theta
        perturbed = ascend(perturbed, x, gradient, method.alpha_255, method.eps)      # x up
        learn(method, surrogate)                                                      # K and V down
        ctx.progress(f"caat {subject.name}", step + 1, method.steps)
    return perturbed


def backward(x: Tensor, losses: Losses, batch: int) -> Tensor:
    """d/dx of the mean loss, [n, 3, h, w]; the gradients of the weights are left on them."""
    import torch

    from bench.diffusion.sampling import chunks

    gradients = []
    for part in chunks(len(x), batch):
        pixels: Any = x[part].detach().requires_grad_(True)
        (losses(pixels, part).sum() / len(x)).backward()  # type: ignore[no-untyped-call]
        gradients.append(pixels.grad)
    return torch.cat(gradients)


def learn(method: Caat, surrogate: Projections) -> None:
    """One AdamW step of keys and values along the gradients that :func:`backward` left."""
    from torch import nn

    nn.utils.clip_grad_norm_(surrogate.parameters, method.clip, error_if_nonfinite=True)
    surrogate.optimizer.step()
    surrogate.optimizer.zero_grad(set_to_none=True)
