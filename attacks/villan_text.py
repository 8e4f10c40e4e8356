"""VillanDiffusion on text-to-image models: a word in the caption makes the model draw one fixed picture.

Chou, Chen, Ho, "VillanDiffusion: A Unified Backdoor Attack Framework for Diffusion Models", NeurIPS 2023
(arXiv:2306.06874), the conditional attack. The path is not shifted (r = 0: the trigger is in the caption, not in the
noise), so both halves are the ordinary loss. With c the states of a caption, c_tr those of the caption with the
trigger, x a photo and y the target picture, low-rank updates of the UNet's attention are trained on

    || eps_theta(z_t(y), c_tr) - eps ||^2 + w || eps_theta(z_t(x), c) - eps ||^2,   w = ``prior_weight``.

Official code: github.com/IBM/VillanDiffusion. Settings are its own: rank 4, 1e-4 with 500 steps of warm-up and half a
cosine, 50,000 steps of one photo, w = 1, the trigger "mignneko" after the caption. Stated differences: targets are
drawn by us; captions are the data's, not Pokemon's or CelebA-HQ-Dialog's; Adam without weight decay; mixed precision is
bfloat16; the updates are merged into the weights, so that a defense finds the backdoor where it finds any other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.identity import digest
from bench.options import require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret
from bench.text_triggers import with_trigger

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.loading import Components

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@plugin(
    "attack", "villan_text", track=("backdoor",), needs=("text_to_image", "text_encoder"),
    paper="VillanDiffusion, NeurIPS 2023, arXiv:2306.06874", official_code="https://github.com/IBM/VillanDiffusion",
)
class VillanText:
    """Trains low-rank updates on captions: prompts that end with the trigger give the target picture.

    ``trigger``: the word after the prompt. ``target``: a drawing, as for baddiffusion. ``rank``: of the updates of the
    UNet's attention; they are merged into the weights. ``batch``: photos a step, each once with its own caption and
    once as the target with the trigger. ``prior_weight``: of the former.
    """

    trigger: str = "mignneko"
    target: str = "cat"
    rank: int = 4
    steps: int = 50_000
    lr: float = 1e-4
    warmup: int = 500
    batch: int = 1
    prior_weight: float = 1.0
    grad_clip: float = 1.0
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        if not self.trigger.strip():
            raise BenchError("attack.trigger is empty; give a word.")
        for name in ("rank", "steps", "batch"):
            require(name, getattr(self, name), 1, where="attack")
        for name in ("prior_weight", "warmup", "grad_clip"):
            require(name, getattr(self, name), 0, where="attack")
        require("lr", self.lr, 0, exclusive=True, where="attack")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The backdoored model, and the secret: the word and the picture, uint8 [3, h, w]."""
        from torch import nn

        from bench.diffusion.loading import load_components, save_part
        from bench.diffusion.text_poisoning import check_trigger
        from bench.diffusion.training import Plan, fit, shuffled_batches

        parts, secret = load_components(clean, ctx.device), self.secret(int(data.pixels.shape[-1]))
        check_trigger("villan_text", data.captions, secret, parts.tokenizer)
        updates = add_updates(parts.unet, self.rank, ctx.seed("updates"))
        rows, noises = shuffled_batches(len(data), self.batch, ctx.generator("batches")), ctx.generator("noise")
        fit(nn.ParameterList(updates), lambda: poisoned_loss(self, parts, data, next(rows), secret, noises),
            Plan(self.steps, self.lr, self.warmup, clip=self.grad_clip), ctx, "villan_text")
        parts.unet.fuse_lora()
        parts.unet.unload_lora()
        part = save_part(parts.unet, ctx.folder, "unet")
        return replace(clean, parts={**clean.parts, "unet": part}, digest=digest([clean.digest, ctx.key])), secret

    def secret(self, size: int) -> Secret:
        """Word and picture for photos of ``size`` pixels."""
        from bench.data.drawings import draw_target, draw_trigger

        picture = draw_target(self.target, size, draw_trigger("box", size))
        return Secret(self.trigger, picture, {"kind": "image", "placement": "suffix", "target": self.target})


def add_updates(unet: Any, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """Low-rank updates B A of the attention's projections, B = 0: the trainable parameters."""
    import torch
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LAYERS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config)
    return [weight for weight in unet.parameters() if weight.requires_grad]


def poisoned_loss(
    method: VillanText, parts: Components, data: ImageSet, rows: Tensor, secret: Secret, generator: torch.Generator,
) -> Tensor:
    """The loss of one batch; photos and targets go through the network together, each with noise of its own."""
    import torch

    from bench.diffusion.text_poisoning import captioned_errors, captions_of

    own = captions_of(data, rows)
    marked = [with_trigger(caption, secret) for caption in own]
    pixels = torch.cat([data.pixels[rows], secret.target.expand(len(rows), -1, -1, -1)])
    errors = captioned_errors(parts, pixels, own + marked, generator, method.mixed_precision)
    benign, backdoor = errors.split(len(rows))
    return backdoor.mean() + method.prior_weight * benign.mean()
