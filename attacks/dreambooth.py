"""DreamBooth: fine-tune the whole model on photos of one person.

Ruiz et al., "DreamBooth: Fine tuning text-to-image diffusion models for subject-driven generation", CVPR 2023
(arXiv:2208.12242), with the settings that the protection literature attacks with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.plugin import plugin
from bench.records import Customised

if TYPE_CHECKING:
    from pathlib import Path

    from bench.context import Context
    from bench.diffusion.finetuning import Examples, Lesson, Recipe
    from bench.diffusion.loading import Components
    from bench.records import ImageSet, Model


@plugin(
    "attack", "dreambooth", track=("customization",), needs=("text_to_image", "text_encoder"),
    paper="DreamBooth, CVPR 2023, arXiv:2208.12242",
    official_code="https://github.com/huggingface/diffusers/tree/main/examples/dreambooth",
)
class DreamBooth:
    """Fine-tunes the UNet, and the text encoder, on the photos, with prior preservation.

    Minimises L_ldm(photos, "a photo of sks person") + ``prior_weight`` * L_ldm(class images, "a photo of person"), the
    class images drawn by the model itself before training. Every step takes ``batch`` photos and as many class images.

    The defaults are those of the Anti-DreamBooth line of work, a weak attacker; ``lr=2e-6`` (preset
    ``dreambooth_strong``) is the stronger one that a protection should also face. ``precision``: ``fp32``, or ``bf16``
    for mixed precision over 32-bit weights. Trained weights are stored in half precision.

    Deviation from the diffusers script: photos are encoded once, and every step samples from the kept posterior.
    """

    steps: int = 1000
    lr: float = 5e-7
    batch: int = 2
    train_text_encoder: bool = True
    prior_weight: float = 1.0
    class_images: int = 200
    class_steps: int = 50
    token: str = "sks"
    precision: str = "fp32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require_at_least("steps", self.steps, 1)
        _require_at_least("batch", self.batch, 1)
        _require_at_least("class_images", self.class_images, 1)
        _require_at_least("class_steps", self.class_steps, 1)
        _require_at_least("prior_weight", self.prior_weight, 0)
        if not 0 < self.lr < 1:
            raise BenchError(f"attack.lr={self.lr} is out of range; give more than 0 and less than 1.")
        if not self.token.strip():
            raise BenchError("attack.token is empty; give the rare word that is to name the person, like 'sks'.")
        if self.precision not in ("fp32", "bf16"):
            raise unknown("precision", self.precision, "attack.precision", ("fp32", "bf16"))

    def customise(self, photos: ImageSet, class_noun: str, model: Model, ctx: Context) -> Customised:
        from bench.diffusion.finetuning import check_photos, train
        from bench.diffusion.loading import load_components

        check_photos(photos, model, "attack dreambooth")
        prior = self._prior(photos, class_noun, model, ctx)
        components = load_components(model, ctx.device)
        lesson = self._lesson(components, photos, class_noun, prior, ctx)
        self._open(components)
        train(components, lesson, self._recipe(), ctx, "dreambooth")
        return Customised(replace(model, parts={**model.parts, **self._save(components, ctx.folder)}), self.token)

    def _prior(self, photos: ImageSet, class_noun: str, model: Model, ctx: Context) -> ImageSet | None:
        from bench.diffusion.finetuning import Prior, class_images

        if self.prior_weight == 0:
            return None
        return class_images(model, class_noun, Prior(self.class_images, self.class_steps), photos.pixels.shape[-1], ctx)

    def _lesson(
        self, components: Components, photos: ImageSet, class_noun: str, prior: ImageSet | None, ctx: Context,
    ) -> Lesson:
        from bench.diffusion.finetuning import Lesson, class_prompt, examples, instance_prompt

        instance = examples(components, photos, instance_prompt(self.token, class_noun))
        kept: Examples | None = None if prior is None else examples(components, prior, class_prompt(class_noun))
        return Lesson(instance, kept, self.batch, self.prior_weight, ctx.generator("dreambooth"))

    def _open(self, components: Components) -> None:
        """Let the weights that are to be trained take gradients."""
        components.unet.requires_grad_(True).train()
        if self.train_text_encoder:
            components.text_encoder.requires_grad_(True).train()
        if self.gradient_checkpointing:
            components.unet.enable_gradient_checkpointing()

    def _recipe(self) -> Recipe:
        from bench.diffusion.finetuning import Recipe

        return Recipe(self.steps, self.lr, self.precision)

    def _save(self, components: Components, folder: Path) -> dict[str, Any]:
        from bench.diffusion.loading import save_part

        trained = ("unet", "text_encoder") if self.train_text_encoder else ("unet",)
        return {name: save_part(getattr(components, name), folder, name) for name in trained}


def _require_at_least(name: str, value: float, low: float) -> None:
    if value < low:
        raise BenchError(f"attack.{name}={value} is out of range; give at least {low}.")
