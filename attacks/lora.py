"""DreamBooth with low-rank adapters: the attack that fits a consumer's machine.

Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022 (arXiv:2106.09685), on the attention of the
UNet as the diffusers DreamBooth-LoRA script does it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import Adapter, Customised

if TYPE_CHECKING:
    from pathlib import Path

    from bench.context import Context
    from bench.diffusion.finetuning import Lesson
    from bench.diffusion.loading import Components
    from bench.records import ImageSet, Model

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@plugin(
    "attack", "lora", track=("customization",), needs=("text_to_image", "text_encoder"),
    paper="LoRA, ICLR 2022, arXiv:2106.09685; DreamBooth, CVPR 2023, arXiv:2208.12242",
    official_code="https://github.com/huggingface/diffusers/tree/main/examples/dreambooth",
)
class Lora:
    """Trains rank-``rank`` updates of the attention projections on the photos; the base model stays as it is.

    W' = W + B A with A [rank, in] from a Gaussian and B [out, rank] = 0; alpha = rank, so the update is not scaled.
    ``prior_weight`` 0, the script's default, trains on the photos alone; above 0 it adds prior preservation with
    ``class_images`` pictures. The adapter is one safetensors file in diffusers format.
    """

    rank: int = 4
    steps: int = 500
    lr: float = 1e-4
    batch: int = 1
    train_text_encoder: bool = False
    prior_weight: float = 0.0
    class_images: int = 200
    class_steps: int = 50
    token: str = "sks"

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch", "class_images", "class_steps"):
            _require_at_least(name, getattr(self, name), 1)
        _require_at_least("prior_weight", self.prior_weight, 0)
        if not 0 < self.lr < 1:
            raise BenchError(f"attack.lr={self.lr} is out of range; give more than 0 and less than 1.")
        if not self.token.strip():
            raise BenchError("attack.token is empty; give the rare word that is to name the person, like 'sks'.")

    def customise(self, photos: ImageSet, class_noun: str, model: Model, ctx: Context) -> Customised:
        from bench.diffusion.finetuning import Recipe, check_photos, train
        from bench.diffusion.loading import load_components

        check_photos(photos, model, "attack lora")
        components = load_components(model, ctx.device)
        lesson = self._lesson(components, photos, class_noun, model, ctx)
        add_adapters(components, self.rank, self.train_text_encoder, ctx.seed("adapters"))
        train(components, lesson, Recipe(self.steps, self.lr), ctx, "lora")
        adapter = Adapter("lora", save_adapters(components, self.train_text_encoder, ctx.folder))
        return Customised(replace(model, adapters=(*model.adapters, adapter)), self.token)

    def _lesson(
        self, components: Components, photos: ImageSet, class_noun: str, model: Model, ctx: Context,
    ) -> Lesson:
        from bench.diffusion.finetuning import (
            Lesson,
            Prior,
            class_images,
            class_prompt,
            examples,
            instance_prompt,
        )

        instance = examples(components, photos, instance_prompt(self.token, class_noun))
        prior = None
        if self.prior_weight > 0:
            size = photos.pixels.shape[-1]
            drawn = class_images(model, class_noun, Prior(self.class_images, self.class_steps), size, ctx)
            prior = examples(components, drawn, class_prompt(class_noun))
        return Lesson(instance, prior, self.batch, self.prior_weight, ctx.generator("lora"))


def add_adapters(components: Components, rank: int, text: bool, seed: int) -> None:
    """Put trainable low-rank updates into the UNet and, if ``text``, the text encoder. Weights drawn from ``seed``."""
    import torch
    from peft import LoraConfig

    def config(targets: tuple[str, ...]) -> Any:
        return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components.unet.add_adapter(config(UNET_TARGETS))
        if text:
            components.text_encoder.add_adapter(config(TEXT_TARGETS))


def save_adapters(components: Components, text: bool, folder: Path) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` as diffusers' own script does, and return the file."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    def layers(module: Any) -> Any:
        return convert_state_dict_to_diffusers(get_peft_model_state_dict(module))

    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers(components.unet),
        text_encoder_lora_layers=layers(components.text_encoder) if text else None, safe_serialization=True,
    )
    return folder / "pytorch_lora_weights.safetensors"


def _require_at_least(name: str, value: float, low: float) -> None:
    if value < low:
        raise BenchError(f"attack.{name}={value} is out of range; give at least {low}.")
