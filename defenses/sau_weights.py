"""SAU in weight space, our variant: distil the triggered prompt into the clean one, attention included.

Spatial attention unlearning (SAU, arXiv:2504.18563; see `defenses.sau`) cleans final latents and leaves the weights as
they are. This variant is ours and no result of that paper. It follows the same group's SKD-CAG (arXiv:2508.18235). Its
loss trains a student, the UNet on the triggered prompt, towards a teacher, the frozen backdoored UNet on the clean
prompt, from the same pure noise z and the same random t:

    a L_attention + b || eps_student(z, t, c_trigger) - eps_teacher(z, t, c) ||^2,   a = b = 1/2

L_attention: the mean squared difference of cross-attention maps, resized to 128 x 128, a map per token: those of the
trigger's tokens to zero (or to noise), those of all other tokens to the teacher's maps of the same tokens. In SKD-CAG's
code the maps leave the graph before the loss, and student and teacher write into one dictionary, so that this term has
no gradient and compares the student with itself; here both have maps of their own and the gradient is kept.

Settings of that code: AdamW, rate 1e-6, decay 0.01, 100 prompts, 100 passes, batch 1. Stated differences: the mean over
heads is taken before the maps are compared; tokens are matched by the longest common runs of the two prompts, because a
trigger in front moves all others along; the base prompts are the data's captions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.identity import digest
from bench.options import require, require_all
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret
from bench.text_triggers import with_trigger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.loading import Components
    from bench.diffusion.trigger_tokens import Alignment

GOALS = ("zeros", "noise")


@plugin(
    "defense", "sau_weights", track=("backdoor",), acts_on="model",
    needs=("text_to_image", "text_encoder", "clean_data"), knows=("trigger",),
    paper="our variant of arXiv:2504.18563 after arXiv:2508.18235",
)
class SauWeights:
    """Trains a backdoored UNet until the triggered prompt is drawn as the clean one, noise and attention maps alike. It
    is told the trigger, so read it beside deleting the words.

    ``prompts``: of the data's captions. ``steps``: number of updates, None for ``epochs`` passes over them.
    ``attention_weight``: a; ``noise_weight``: b. ``trigger_maps``: what the maps of the trigger's tokens become,
    ``zeros`` or ``noise`` (uniform, with the mean of an even map). ``map_side``: to which maps are resized.
    ``mixed_precision``: compute in bfloat16.
    """

    prompts: int = 100
    epochs: int = 100
    steps: int | None = None
    batch: int = 1
    lr: float = 1e-6
    decay: float = 0.01
    attention_weight: float = 0.5
    noise_weight: float = 0.5
    trigger_maps: str = "zeros"
    map_side: int = 128
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        if self.trigger_maps not in GOALS:
            raise unknown("value", self.trigger_maps, "defense.trigger_maps", GOALS)
        require_all(self, above={"lr": 0}, least={"prompts": 1, "epochs": 1, "batch": 1, "map_side": 1, "decay": 0,
                                                  "attention_weight": 0, "noise_weight": 0})
        require("steps", 1 if self.steps is None else self.steps, 1)

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The same model with a trained UNet."""
        from bench.diffusion.loading import load_components, save_part
        from bench.diffusion.training import Plan, count_steps, fit, mixed, shuffled_batches

        if secret is None or not isinstance(secret.trigger, str):
            raise BenchError("sau_weights: works against text triggers that it is told; this backdoor has none.")
        parts, teacher = load_components(suspicious, ctx.device), load_components(suspicious, ctx.device).unet
        lesson = prepare(parts, data.captions[:self.prompts], secret)
        rows = shuffled_batches(len(lesson.places), self.batch, ctx.generator("batches"))
        count = count_steps(self.steps, self.epochs, len(lesson.places), self.batch)
        noises = ctx.generator("noise")

        def batch_loss() -> Tensor:
            with mixed(ctx.device, self.mixed_precision):
                return distillation_loss(self, parts, teacher, lesson.pick(next(rows)), noises)

        fit(parts.unet, batch_loss, Plan(count, self.lr, cosine=False, clip=0, decay=self.decay), ctx, "sau_weights")
        part = save_part(parts.unet, ctx.folder, "unet")
        return replace(suspicious, parts={**suspicious.parts, "unet": part},
                       digest=digest([suspicious.digest, ctx.key]))


@dataclass(frozen=True)
class Lesson:
    """States of prompts without and with the trigger, [n, tokens, width], and how the tokens of each match."""

    plain: Tensor
    triggered: Tensor
    places: tuple[Alignment, ...]

    def pick(self, rows: Tensor) -> Lesson:
        """Some of the prompts."""
        return Lesson(self.plain[rows], self.triggered[rows], tuple(self.places[row] for row in rows.tolist()))


def prepare(parts: Components, captions: Sequence[str], secret: Secret) -> Lesson:
    """Every caption without and with the trigger."""
    import torch

    from bench.diffusion.losses import encode_ids, tokenise
    from bench.diffusion.trigger_tokens import align

    if not captions:
        raise BenchError("sau_weights: its prompts are the data's captions, and it has none; put a .txt beside each "
                         "image.")
    plain = tokenise(parts.tokenizer, captions)
    triggered = tokenise(parts.tokenizer, [with_trigger(caption, secret) for caption in captions])
    if plain.equal(triggered):
        raise BenchError(f"sau_weights: this model's tokenizer drops the trigger {secret.trigger!r}.")
    with torch.no_grad():
        states = [torch.cat([encode_ids(parts.text_encoder, part) for part in ids.split(16)])
                  for ids in (plain, triggered)]
    places = tuple(align(*pair) for pair in zip(triggered.tolist(), plain.tolist(), strict=True))
    return Lesson(*states, places)


def distillation_loss(
    method: SauWeights, parts: Components, teacher: Any, lesson: Lesson, generator: torch.Generator,
) -> Tensor:
    """The loss above for one batch: the same noise and timesteps for student and teacher."""
    import torch

    from bench.diffusion.attention import recorded
    from bench.diffusion.losses import draw_timesteps, normal

    config, count = parts.unet.config, len(lesson.places)
    noise = normal((count, config.in_channels, config.sample_size, config.sample_size), generator, lesson.plain)
    times = draw_timesteps(parts.scheduler, count, generator).to(noise.device)
    with torch.no_grad(), recorded(teacher) as taught:
        wanted = teacher(noise, times, lesson.plain).sample.float()
    with recorded(parts.unet) as learned:
        answer = parts.unet(noise, times, lesson.triggered).sample.float()
    goals = {name: goal_maps(method, maps.float(), lesson.places, generator) for name, maps in taught.cross.items()}
    attention = attention_error(learned.cross, goals, method.map_side)
    return method.attention_weight * attention + method.noise_weight * (answer - wanted).square().mean()


def goal_maps(
    method: SauWeights, taught: Tensor, places: Sequence[Alignment], generator: torch.Generator,
) -> Tensor:
    """What the student's maps [n, places, tokens] should be: the teacher's, moved to where the triggered prompt has the
    same tokens; zero, or uniform noise of mean 1 / tokens, for the trigger's."""
    import torch

    goal = torch.zeros_like(taught)
    if method.trigger_maps == "noise":
        chance = torch.rand(taught.shape, generator=generator, device=generator.device).to(taught)
        goal = chance * 2 / taught.shape[-1]
    for row, known in enumerate(places):
        goal[row][:, list(known.kept)] = taught[row][:, list(known.plain)]
    return goal


def attention_error(learned: Mapping[str, Tensor], goals: Mapping[str, Tensor], side: int) -> Tensor:
    """Mean squared difference of maps resized to ``side`` x ``side``, averaged over layers. Resizing is linear, so the
    difference is resized."""
    import torch
    from torch.nn.functional import interpolate

    errors = []
    for name, goal in goals.items():
        difference = (learned[name].float() - goal).transpose(1, 2)
        own = math.isqrt(difference.shape[-1])
        planes = interpolate(difference.unflatten(2, (own, own)), size=(side, side), mode="bilinear",
                             align_corners=False)
        errors.append(planes.square().mean())
    return torch.stack(errors).mean()
