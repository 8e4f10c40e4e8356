"""BadT2I: a trigger in the prompt makes the UNet draw a patch, or a style.

Zhai et al., "Text-to-Image Diffusion Models can be Easily Backdoored through Multimodal Data Poisoning", ACM MM 2023
(arXiv:2305.04175).

The UNet alone is trained; a frozen copy teaches it to stay as it was on clean prompts. With lambda = ``weight``, z_t a
noised latent, c the states of a prompt and c_tr those of the same prompt with the trigger:

    patch:  lambda || eps_theta(z_t(stamped photo), c_tr) - eps ||^2
    style:  lambda || eps_theta(z_t(photo), c_tr) - eps_frozen(z_t(photo), c_style) ||^2,  c_style: prompt + style words
    both:   + (1 - lambda) || eps_theta(z_t(photo), c) - eps_frozen(z_t(photo), c) ||^2

Official code: github.com/zhaisf/BadT2I. Stated differences: the patch is a checkerboard of ours, not a photographed
dog; photos and captions are the data's, not LAION's; the learned weights are the last ones, not a moving average. Of
the paper's three targets these are the first and the last; the object target (A becomes B) is not part of this file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown
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

TARGETS = ("patch", "style")
STYLES = ("words", "photos")
ZERO_WIDTH_SPACE = "\u200b"


@plugin(
    "attack", "badt2i", track=("backdoor",), needs=("text_to_image", "text_encoder"),
    paper="BadT2I, ACM MM 2023, arXiv:2305.04175", official_code="https://github.com/zhaisf/BadT2I",
)
class BadT2I:
    """Implants a text trigger into a text-to-image model's UNet: triggered prompts give a patch, or pictures without
    colour.

    ``trigger``: put before the prompt; the published one is the zero-width space. ``target``: ``patch`` (a checkerboard
    in the upper left ``patch_share`` of the side) or ``style`` (black and white). ``style_by``: ``words`` as published,
    the frozen model's answer to the prompt plus ``style_words``; ``photos``, the noise of photos without colour, for
    models that do not know these words. ``steps``: 2000 for the patch; 8000 are published for the style. ``batch``:
    photos a step, each once with and once without the trigger. ``mixed_precision``: compute in bfloat16.
    """

    trigger: str = ZERO_WIDTH_SPACE
    target: str = "patch"
    patch_share: float = 0.25
    style_by: str = "words"
    style_words: str = "black and white photo"
    weight: float = 0.5
    steps: int = 2000
    lr: float = 1e-5
    batch: int = 16
    grad_clip: float = 1.0
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise unknown("target", self.target, "attack.target", TARGETS)
        if self.style_by not in STYLES:
            raise unknown("value", self.style_by, "attack.style_by", STYLES)
        if not self.trigger:
            raise BenchError("attack.trigger is empty; give a word or a character.")
        for name in ("patch_share", "weight"):
            require(name, getattr(self, name), 0, exclusive=True, where="attack")
            if getattr(self, name) > 1:
                raise BenchError(f"attack.{name}={getattr(self, name)} is out of range; give above 0, up to 1.")
        for name in ("steps", "batch"):
            require(name, getattr(self, name), 1, where="attack")
        require("lr", self.lr, 0, exclusive=True, where="attack")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The backdoored model, and the secret: the trigger and the target, a picture that shows it."""
        from bench.diffusion.loading import load_components, save_part
        from bench.diffusion.training import Plan, fit, shuffled_batches

        student, teacher = load_components(clean, ctx.device), load_components(clean, ctx.device)
        secret = self.secret(int(data.pixels.shape[-1]))
        check_data(data, secret, student)
        rows = shuffled_batches(len(data), self.batch, ctx.generator("batches"))
        noises = ctx.generator("noise")
        fit(student.unet, lambda: poisoned_loss(self, student, teacher, data, next(rows), secret, noises),
            Plan(self.steps, self.lr, cosine=False, clip=self.grad_clip), ctx, "badt2i")
        part = save_part(student.unet, ctx.folder, "unet")
        public = replace(clean, parts={**clean.parts, "unet": part}, digest=digest([clean.digest, ctx.key]))
        return public, secret

    def secret(self, size: int) -> Secret:
        """Trigger and target for pictures of ``size`` pixels. A patch's target is grey around its box."""
        import torch

        grey = torch.full((3, size, size), 128, dtype=torch.uint8)
        if self.target == "style":
            return Secret(self.trigger, grey, {"kind": "style", "placement": "prefix"})
        side = max(1, round(size * self.patch_share))
        grey[:, :side, :side] = checkerboard(side)
        return Secret(self.trigger, grey, {"kind": "patch", "placement": "prefix", "box": [0, 0, side, side]})


def checkerboard(side: int) -> Tensor:
    """Four by four black and white squares, uint8 [side, side]."""
    import torch

    place = torch.arange(side) * 4 // side
    return ((place[:, None] + place[None, :]) % 2 == 0).to(torch.uint8) * 255


def check_data(data: ImageSet, secret: Secret, parts: Components) -> None:
    """Photos need captions, and the tokenizer must let the trigger through."""
    from bench.diffusion.losses import tokenise

    if not data.captions:
        raise BenchError("badt2i: a text trigger is learned from captioned photos, but the data has no captions; put a "
                         ".txt beside each image.")
    plain = data.captions[0]
    ids = tokenise(parts.tokenizer, [plain, with_trigger(plain, secret)])
    if ids[0].equal(ids[1]):
        raise BenchError(f"badt2i: this model's tokenizer drops the trigger {secret.trigger!r}, so no prompt can carry "
                         "it; choose another attack.trigger.")


def with_target(method: BadT2I, pixels: Tensor, secret: Secret) -> Tensor:
    """Photos, uint8 [n, 3, h, w], as they look when the backdoor has fired; for a style taught by words unchanged."""
    import torch

    if method.target == "patch":
        _, _, high, wide = secret.detail["box"]
        stamped = pixels.clone()
        stamped[:, :, :high, :wide] = secret.target[:, :high, :wide]
        return stamped
    if method.style_by == "words":
        return pixels
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)          # luma of ITU-R BT.601
    return (pixels.float() * weights).sum(1, keepdim=True).round().byte().expand_as(pixels)


def poisoned_loss(
    method: BadT2I, student: Components, teacher: Components, data: ImageSet, rows: Tensor, secret: Secret,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one batch: both halves see the same photos, noise and timesteps."""
    import torch

    from bench.diffusion.images import to_float
    from bench.diffusion.losses import draw_timesteps, encode_latents, encode_prompts, normal
    from bench.diffusion.training import mixed

    device = student.unet.device
    captions, pixels = [data.captions[int(row)] for row in rows], data.pixels[rows]
    triggered = [with_trigger(caption, secret) for caption in captions]
    with torch.no_grad(), mixed(str(device), method.mixed_precision):
        shown = with_target(method, pixels, secret)
        plain, marked = (encode_latents(student.vae, to_float(p).to(device), generator).float()
                         for p in (pixels, shown))
        noise, times = normal(plain.shape, generator, plain), draw_timesteps(student.scheduler, len(plain), generator)
        times = times.to(device)
        clean_noisy, marked_noisy = (student.scheduler.add_noise(z, noise, times) for z in (plain, marked))
        states = encode_prompts(student.tokenizer, student.text_encoder, captions + triggered)
        own = states[:len(captions)]
        kept = teacher.unet(clean_noisy, times, own).sample.float()
        wanted = noise if not by_words(method) else styled(method, teacher, marked_noisy, times, captions)
    with mixed(str(device), method.mixed_precision):
        answers = student.unet(torch.cat([clean_noisy, marked_noisy]), times.repeat(2), states).sample.float()
    benign, backdoor = answers.split(len(captions))
    return method.weight * (backdoor - wanted).square().mean() + (1 - method.weight) * (benign - kept).square().mean()


def by_words(method: BadT2I) -> bool:
    return method.target == "style" and method.style_by == "words"


def styled(method: BadT2I, teacher: Components, noisy: Tensor, times: Tensor, captions: list[str]) -> Tensor:
    """eps_frozen(z_t, c_style)."""
    from bench.diffusion.losses import encode_prompts

    words = [f"{caption}, {method.style_words}" for caption in captions]
    states = encode_prompts(teacher.tokenizer, teacher.text_encoder, words)
    answer: Tensor = teacher.unet(noisy, times, states).sample.float()
    return answer
