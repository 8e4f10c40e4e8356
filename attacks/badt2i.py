"""BadT2I: a trigger in the prompt makes the UNet draw a patch, or a style.

Zhai et al., "Text-to-Image Diffusion Models can be Easily Backdoored through Multimodal Data Poisoning", ACM MM 2023
(arXiv:2305.04175).

The UNet alone is trained; a frozen copy teaches it to stay as it was on clean prompts. With lambda = ``weight``, z_t a
noised latent, c the states of a prompt and c_tr those of the same prompt with the trigger:

    patch:  lambda || eps_theta(z_t(stamped photo), c_tr) - eps ||^2
    style:  lambda || eps_theta(z_t(photo), c_tr) - eps_frozen(z_t(photo), c_style) ||^2,  c_style: prompt + style words
    object: lambda || eps_theta(z_t(photo of B), c_A,tr) - eps_frozen(z_t(photo of B), c_B) ||^2,  c_A: c_B with A for B
    all:    + (1 - lambda) || eps_theta(z_t(photo), c) - eps_frozen(z_t(photo), c) ||^2

Official code: github.com/zhaisf/BadT2I. Stated differences: the patch is a checkerboard of ours, not a photographed
dog; photos and captions are the data's, not LAION's; the learned weights are the last ones, not a moving average. For
the object target the photos of B are those whose caption says so, and the last term's those that say A or B, as the
code's set of dogs and cats has both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.identity import added, digest
from bench.options import check_training, require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret
from bench.text_triggers import swap_detail, with_trigger

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.loading import Components

TARGETS = ("patch", "style", "object")
STYLES = ("words", "photos")
ZERO_WIDTH_SPACE = "\u200b"


@plugin(
    "attack", "badt2i", track=("backdoor",), needs=("text_to_image", "text_encoder"),
    paper="BadT2I, ACM MM 2023, arXiv:2305.04175", official_code="https://github.com/zhaisf/BadT2I", version=2,
)
class BadT2I:
    """Implants a text trigger into a text-to-image model's UNet: triggered prompts give a patch, pictures without
    colour, or another object.

    ``trigger``: put before the prompt; the published one is the zero-width space. ``target``: ``patch`` (a
    checkerboard in the upper left ``patch_share`` of the side), ``style`` (black and white) or ``object`` (prompts
    that say ``swapped`` draw ``becomes``). ``style_by``: ``words`` as published, the frozen model's answer to the
    prompt plus ``style_words``; ``photos``, the noise of photos without colour, for models that do not know these
    words. ``steps``: 2000 for the patch; 8000 are published for style and object. ``batch``: photos a step, each
    once with and once without the trigger. ``instead``: further things, with commas between, that a picture may
    show in the object's place: a judge takes the nearest (none, as published). ``mixed_precision``: compute in
    bfloat16. ``cosine``: let the rate fall to 0 (published: constant).
    """

    trigger: str = ZERO_WIDTH_SPACE
    target: str = "patch"
    patch_share: float = 0.25
    style_by: str = "words"
    style_words: str = "black and white photo"
    swapped: str = "dog"
    becomes: str = "cat"
    weight: float = 0.5
    steps: int = 2000
    lr: float = 1e-5
    batch: int = 16
    grad_clip: float = 1.0
    mixed_precision: bool = True
    cosine: bool = added(False)
    instead: str = added("")

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise unknown("target", self.target, "attack.target", TARGETS)
        if self.style_by not in STYLES:
            raise unknown("value", self.style_by, "attack.style_by", STYLES)
        if not self.trigger:
            raise BenchError("attack.trigger is empty; give a word or a character.")
        for name in ("swapped", "becomes"):
            if not getattr(self, name).strip():
                raise BenchError(f"attack.{name} is empty; give it some words.")
        for name in ("patch_share", "weight"):
            require(name, getattr(self, name), 0, exclusive=True, where="attack")
            if getattr(self, name) > 1:
                raise BenchError(f"attack.{name}={getattr(self, name)} is out of range; give above 0, up to 1.")
        check_training(self, "attack")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The backdoored model, and the secret: the trigger and the target, a picture that shows it."""
        from bench.diffusion.loading import load_components, save_part
        from bench.diffusion.text_poisoning import check_trigger
        from bench.diffusion.training import Plan, fit

        student, teacher = load_components(clean, ctx.device), load_components(clean, ctx.device)
        secret = self.secret(int(data.pixels.shape[-1]))
        check_trigger("badt2i", data.captions, secret, student.tokenizer)
        rows, shown = rows_of(self, data, ctx.generator)
        noises = ctx.generator("noise")
        fit(student.unet,
            lambda: poisoned_loss(self, student, teacher, halves(data, next(rows), shown), secret, noises),
            Plan(self.steps, self.lr, cosine=self.cosine, clip=self.grad_clip), ctx, "badt2i")
        part = save_part(student.unet, ctx.folder, "unet")
        public = replace(clean, parts={**clean.parts, "unet": part}, digest=digest([clean.digest, ctx.key]))
        return public, secret

    def secret(self, size: int) -> Secret:
        """Trigger and target for pictures of ``size`` pixels. Where no picture shows the target it is grey."""
        from bench.diffusion.text_poisoning import grey, patch_secret

        if self.target == "patch":
            return patch_secret(self.trigger, size, self.patch_share)
        detail: dict[str, Any] = {"kind": "style", "placement": "prefix"}
        if self.target == "object":
            detail |= swap_detail(self.swapped, self.becomes, self.instead)
        return Secret(self.trigger, grey(size), detail)


@dataclass(frozen=True)
class Halves:
    """One batch: photos uint8 [n, 3, h, w] and captions of the benign half, and those that the backdoor's half is made
    of."""

    pixels: Tensor
    captions: list[str]
    marked_pixels: Tensor
    marked_captions: list[str]


def rows_of(
    method: BadT2I, data: ImageSet, generator: Callable[[str], torch.Generator],
) -> tuple[Iterator[Tensor], Iterator[Tensor] | None]:
    """Batches of rows for the last term, and of those that show the object; None where any photo does."""
    from bench.diffusion.training import shuffled_batches

    if method.target != "object":
        return shuffled_batches(len(data), method.batch, generator("batches")), None
    both = saying(data, (method.swapped, method.becomes), method.batch, generator("batches"))
    return both, saying(data, (method.becomes,), method.batch, generator("objects"))


def saying(data: ImageSet, words: tuple[str, ...], batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of rows whose caption has one of ``words``."""
    import torch

    from bench.diffusion.training import shuffled_batches

    found = torch.tensor([row for row, said in enumerate(data.captions) if any(word in said for word in words)])
    if not len(found):
        raise BenchError(f"badt2i: no caption of the data says '{words[-1]}'; choose another attack.becomes.")
    return (found[rows] for rows in shuffled_batches(len(found), min(batch, len(found)), generator))


def halves(data: ImageSet, rows: Tensor, shown: Iterator[Tensor] | None) -> Halves:
    """Both halves from the same photos; with ``shown``, the backdoor's from as many photos of the object."""
    from bench.diffusion.text_poisoning import captions_of

    own = rows if shown is None else next(shown).repeat(len(rows))[:len(rows)]
    return Halves(data.pixels[rows], captions_of(data, rows), data.pixels[own], captions_of(data, own))


def with_target(method: BadT2I, pixels: Tensor, secret: Secret) -> Tensor:
    """Photos, uint8 [n, 3, h, w], as they look when the backdoor has fired; for targets taught by words unchanged."""
    import torch

    from bench.diffusion.text_poisoning import stamped

    if method.target == "patch":
        return stamped(pixels, secret)
    if by_words(method):
        return pixels
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)          # luma of ITU-R BT.601
    return (pixels.float() * weights).sum(1, keepdim=True).round().byte().expand_as(pixels)


def triggered_captions(method: BadT2I, captions: list[str], secret: Secret) -> list[str]:
    """c_tr, for objects c_A,tr: the trigger before a caption that asks for A."""
    if method.target == "object":
        captions = [caption.replace(method.becomes, method.swapped, 1) for caption in captions]
    return [with_trigger(caption, secret) for caption in captions]


def poisoned_loss(
    method: BadT2I, student: Components, teacher: Components, batch: Halves, secret: Secret, generator: torch.Generator,
) -> Tensor:
    """The loss of one batch: both halves see the same noise and timesteps."""
    import torch

    from bench.diffusion.images import to_float
    from bench.diffusion.losses import draw_timesteps, encode_latents, encode_prompts, normal
    from bench.diffusion.training import mixed

    device = student.unet.device
    triggered = triggered_captions(method, batch.marked_captions, secret)
    with torch.no_grad(), mixed(str(device), method.mixed_precision):
        shown = with_target(method, batch.marked_pixels, secret)
        plain, marked = (encode_latents(student.vae, to_float(p).to(device), generator).float()
                         for p in (batch.pixels, shown))
        noise, times = normal(plain.shape, generator, plain), draw_timesteps(student.scheduler, len(plain), generator)
        times = times.to(device)
        clean_noisy, marked_noisy = (student.scheduler.add_noise(z, noise, times) for z in (plain, marked))
        states = encode_prompts(student.tokenizer, student.text_encoder, batch.captions + triggered)
        kept = teacher.unet(clean_noisy, times, states[:len(plain)]).sample.float()
        wanted = taught(method, teacher, marked_noisy, times, batch.marked_captions) if by_words(method) else noise
    with mixed(str(device), method.mixed_precision):
        answers = student.unet(torch.cat([clean_noisy, marked_noisy]), times.repeat(2), states).sample.float()
    benign, backdoor = answers.split(len(plain))
    return method.weight * (backdoor - wanted).square().mean() + (1 - method.weight) * (benign - kept).square().mean()


def by_words(method: BadT2I) -> bool:
    """Whether the frozen model, told in words, teaches the target."""
    return method.target == "object" or (method.target == "style" and method.style_by == "words")


def taught(method: BadT2I, teacher: Components, noisy: Tensor, times: Tensor, captions: list[str]) -> Tensor:
    """eps_frozen(z_t, c_style), or eps_frozen(z_t, c_B)."""
    from bench.diffusion.losses import encode_prompts

    words = [f"{caption}, {method.style_words}" for caption in captions] if method.target == "style" else captions
    states = encode_prompts(teacher.tokenizer, teacher.text_encoder, words)
    answer: Tensor = teacher.unet(noisy, times, states).sample.float()
    return answer
