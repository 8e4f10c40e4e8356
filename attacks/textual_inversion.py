"""Textual inversion: learn a new word for one person; no weight of the model changes.

Gal et al., "An image is worth one word: Personalizing text-to-image generation using textual inversion", ICLR 2023
(arXiv:2208.01618), with the settings of the diffusers example.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown
from bench.plugin import plugin
from bench.records import Adapter, Customised

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bench.context import Context
    from bench.diffusion.loading import Components
    from bench.diffusion.losses import LatentDistribution
    from bench.records import ImageSet, Model

TEMPLATES = ("a photo of {} {}", "a portrait of {} {}", "a close up photo of {} {}", "a picture of {} {}")
"""Neutral prompts, for the word and the class noun. None of them is a prompt that boards hold out."""


@plugin(
    "attack", "textual_inversion", track=("customization",), needs=("text_to_image", "text_encoder"),
    paper="Textual inversion, ICLR 2023, arXiv:2208.01618",
    official_code="https://github.com/rinongal/textual_inversion",
)
class TextualInversion:
    """Learns the embedding of a new word on the photos; text encoder and UNet stay frozen.

    v* = argmin_v E[ ||n - unet(z_t, t, c(y, v))||^2 ] (eq. 2) over photos, noise, t, and neutral prompts y that hold
    the word, drawn anew for every photo. ``vectors``: how many tokens the word stands for, each with an embedding of
    its own; they start as those of ``initializer``. ``precision``: ``fp32``, or ``bf16`` for mixed precision. The
    artefact is one safetensors file of a few kilobytes in diffusers format.

    Defaults are the diffusers example's steps, rate and batch. Its README also accumulates 4 batches and sets
    ``--scale_lr``, which together are ``batch=4 lr=2e-3`` here; the paper itself takes 5000 steps at 0.04.

    Deviations from the script: the class noun follows the word, as in the prompts that the suites ask for (the paper
    puts the word in the noun's place); four prompts of ours instead of its 27; photos are encoded once and not
    mirrored, and every step samples from the kept posterior.
    """

    steps: int = 3000
    lr: float = 5e-4
    batch: int = 1
    vectors: int = 1
    initializer: str = "person"
    token: str = "<sks>"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "vectors"):
            if getattr(self, name) < 1:
                raise BenchError(f"attack.{name}={getattr(self, name)} is out of range; give at least 1.")
        if not 0 < self.lr < 1:
            raise BenchError(f"attack.lr={self.lr} is out of range; give more than 0 and less than 1.")
        if self.token.split() != [self.token]:
            raise BenchError(f"attack.token='{self.token}' is not one word; give a new one, like '<sks>'.")
        if not self.initializer.strip():
            raise BenchError("attack.initializer is empty; give the word to start from, like 'person'.")
        if self.precision not in ("fp32", "bf16"):
            raise unknown("precision", self.precision, "attack.precision", ("fp32", "bf16"))

    def customise(self, photos: ImageSet, class_noun: str, model: Model, ctx: Context) -> Customised:
        from bench.diffusion.finetuning import check_photos, encode_images
        from bench.diffusion.loading import load_components
        from bench.diffusion.losses import tokenise
        from bench.diffusion.new_words import extend, save_rows, spelled, with_words

        check_photos(photos, model, "attack textual_inversion")
        components = load_components(model, ctx.device)
        words = spelled(self.token, self.vectors)
        tokenizer = with_words(components.tokenizer, words)
        rows = extend(components.text_encoder, tokenizer, words, self.initializer)
        prompts = tokenise(tokenizer, [template.format(" ".join(words), class_noun) for template in TEMPLATES])
        self.learn(components, rows, encode_images(components.vae, photos), prompts, ctx)
        adapter = Adapter("textual_inversion", save_rows(self.token, rows, ctx.folder))
        return Customised(replace(model, adapters=(*model.adapters, adapter)), self.token)

    def learn(
        self, components: Components, rows: nn.Parameter, latents: LatentDistribution, prompts: Tensor, ctx: Context,
    ) -> list[float]:
        """Train ``rows`` in place; returns the loss of every step. ``prompts``: token ids [templates, length]."""
        import torch

        from bench.diffusion.finetuning import Shuffled, adamw, update

        generator = ctx.generator("textual_inversion")
        optimizer, photos = adamw([rows], self.lr), Shuffled(len(latents.mean), generator)
        losses: list[Tensor] = []
        for _ in ctx.track(range(self.steps), "textual_inversion", self.steps):
            drawn = latents.pick(photos.take(self.batch)).sample(generator)
            with torch.autocast(drawn.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = inversion_loss(components, drawn, prompts, generator)
            if not torch.isfinite(loss):
                raise BenchError(f"attack textual_inversion: the loss is {loss.item()}; lower attack.lr={self.lr}.")
            update(loss, optimizer, [rows], clip=None)
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


def inversion_loss(components: Components, latents: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Eq. 2 on latents [n, c, h, w], each under a prompt drawn from token ids [templates, length]."""
    import torch

    from bench.diffusion.losses import encode_ids, noise_prediction_loss

    places = torch.randint(len(prompts), (len(latents),), generator=generator)
    states = encode_ids(components.text_encoder, prompts[places])
    return noise_prediction_loss(components.unet, components.scheduler, latents, states, generator=generator)
