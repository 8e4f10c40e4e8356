"""A surrogate editor: what a defender looks through when photos are protected against edits.

Editors are told apart by what their network reads beside the noisy latents z_t of the picture that it draws:

* ``text``, nothing: Stable Diffusion, which edits a photo by noising it and drawing on from there (SDEdit, Meng et al.,
  ICLR 2022). The photo enters through z_t alone.
* ``instruct``, the photo's latents, unscaled: InstructPix2Pix (Brooks et al., CVPR 2023).
* ``inpaint``, a mask and the latents of the masked photo: Stable Diffusion's inpainting network.

In the last two, an attack's z_t comes from the drawn edit and not from the photo. The surrogate does not draw a whole
edit to have it: it takes the noised latents of the *original* photo, from which most edits do not stray far, so that a
perturbation acts through what the network is shown of the photo and through nothing else, as in the attack.

Weights are frozen and in 32 bits; gradients reach pixels and prompt states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.diffusion.attention import recorded
from bench.diffusion.loading import load_modules, load_schedule
from bench.diffusion.losses import encode_prompts, latent_distribution
from bench.diffusion.sampling import chunks
from bench.diffusion.surrogate_free import Crowd
from bench.diffusion.surrogates import Draws
from bench.errors import BenchError
from bench.records import Edit, Model

if TYPE_CHECKING:
    from bench.context import Context

UNTOLD = "a photo"
"""What a text-to-image model is asked where the defender does not know the edit; an instruction is then empty."""
REFERENCE = 512
"""Side of the photos for which published lengths in pixel space are given."""
RECOMPUTED = 32
"""Latents of this width or more: passes of a whole edit are computed again for the gradient, which saves memory."""

Losses = Callable[[Tensor, slice], Tensor]
"""``losses(point, part)``: the own loss [m] of each of the rows ``part``, at ``point`` [m, ...]."""


@dataclass(frozen=True)
class Request:
    """n photos and what is asked of each. ``latents``: posterior means of the photos as they were, scaled
    [n, c, h/8, w/8]; ``states``: of the prompts [n, length, width]; ``words``: 1 where a prompt has its words, else 0,
    [n, length]; ``painted``: 1 where the attacker paints over the photo, else 0, [n, 1, h, w]."""

    latents: Tensor
    states: Tensor
    words: Tensor
    painted: Tensor


@dataclass(frozen=True)
class Estimate:
    """One pass. ``output``: what the network said; ``clean``: the edit's latents that this amounts to, both
    [m, c, h/8, w/8]."""

    output: Tensor
    clean: Tensor


@dataclass(frozen=True)
class Course:
    """How a whole edit is drawn: ``steps`` of DDIM; ``guidance`` towards the prompt and, of editors that are shown the
    photo, ``image_guidance`` towards the photo, 1 for none; ``strength``: share of the chain that a ``text`` editor
    noises the photo by."""

    steps: int
    guidance: float = 7.5
    image_guidance: float = 1.5
    strength: float = 0.7


@dataclass(frozen=True)
class Editor:
    """The frozen parts of one editing model."""

    kind: str
    vae: Any
    unet: Any
    scheduler: Any
    tokenizer: Any
    text_encoder: Any

    def question(self, edit: Edit | None) -> str:
        """What the editor is asked: the order, or the caption of the wanted picture; None: the defender is not told."""
        if self.kind == "instruct":
            return edit.instruction if edit else ""
        return edit.target if edit else UNTOLD

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> Tensor:
        """States of prompts [n, length, width]."""
        return encode_prompts(self.tokenizer, self.text_encoder, prompts)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) n (Ho et al., NeurIPS 2020, eq. 4)."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def read(self, pixels: Tensor, request: Request, draws: Draws, part: slice) -> tuple[Tensor, Tensor | None]:
        """Latents z that are noised, and what else the network is shown; of photos ``part`` that look like ``pixels``
        [m, 3, h, w] in [-1, 1]."""
        if self.kind == "inpaint":
            painted = request.painted[part].to(pixels)
            kept = latent_distribution(self.vae, pixels * (1 - painted)).mean
            small = functional.interpolate(painted, kept.shape[2:])
            return request.latents[part], torch.cat([small, kept], dim=1)
        found = latent_distribution(self.vae, pixels)
        if self.kind == "instruct":
            return request.latents[part], found.mean / self.vae.config.scaling_factor
        return draws.latents(found, part), None

    def run(self, noisy: Tensor, beside: Tensor | None, timesteps: Tensor, states: Tensor) -> Tensor:
        """One pass of the network."""
        seen = noisy if beside is None else torch.cat([noisy, beside], dim=1)
        output: Tensor = self.unet(seen, timesteps, states).sample
        return output

    def look(
        self, pixels: Tensor, request: Request, states: Tensor, draws: Draws, part: slice, pure: bool = False,
    ) -> Estimate:
        """One pass at the draws' noise and timesteps for photos ``part`` that look like ``pixels``.

        ``states``: [m, length, width]. ``pure``: editors that are shown the photo start from nothing but noise.
        """
        latents, beside = self.read(pixels, request, draws, part)
        noise, timesteps = draws.noise[part], draws.timesteps[part]
        noisy = noise if pure and beside is not None else self.noised(latents, noise, timesteps)
        output = self.run(noisy, beside, timesteps, states)
        return Estimate(output, self.clean(output, noisy, timesteps))

    def clean(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The network's estimate of the latents without noise: (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) (Ho et al.,
        eq. 15) where it predicts noise, sqrt(abar_t) z_t - sqrt(1 - abar_t) v where it predicts a velocity."""
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return output
        signal, sigma = self.scales(timesteps, noisy)
        return (noisy - sigma * output) / signal if kind == "epsilon" else signal * noisy - sigma * output

    def scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), [m, 1, 1, 1] each."""
        known = self.scheduler.alphas_cumprod[timesteps.cpu()].to(like)[:, None, None, None]
        return known.sqrt(), (1 - known).sqrt()

    def attention(self, pixels: Tensor, request: Request, states: Tensor, draws: Draws, part: slice) -> Tensor:
        """How much each place attends to the prompt's words in one pass: [m, side, side], side that of the latents."""
        with recorded(self.unet) as maps:
            self.look(pixels, request, states, draws, part)
        return word_attention(maps.cross, request.words[part], draws.noise.shape[-1])


def open_editor(model: Model, ctx: Context) -> Editor:
    """The editor in ``model``. Its modules are shared with others: nothing here trains them."""
    modules = load_modules(model, ctx.device)
    latents, seen = modules["vae"].config.latent_channels, modules["unet"].config.in_channels
    kinds = {latents: "text", 2 * latents: "instruct", 2 * latents + 1: "inpaint"}
    if seen not in kinds:
        raise BenchError(f"surrogate: the UNet of {model.base.name} reads {seen} channels; editors here read "
                         f"{', '.join(f'{n} ({kind})' for n, kind in kinds.items())}.")
    return Editor(kinds[seen], modules["vae"], modules["unet"], load_schedule(model), modules["tokenizer"],
                  modules["text_encoder"])


@torch.no_grad()
def ask(editor: Editor, crowd: Crowd, prompt: str | None = None, words: str = "") -> Request:
    """What the defender expects to be asked of the crowd's photos: what its people's edits say, or ``prompt`` for all,
    of which only the ``words`` that it ends with count."""
    edits = edits_of(crowd)
    prompts = [editor.question(edit) if prompt is None else prompt for edit in edits]
    places = torch.stack([word_places(editor.tokenizer, each, words) for each in prompts])
    height, width = crowd.x.shape[2:]
    masks = [torch.zeros(height, width) if edit is None or edit.mask is None else edit.mask.float() for edit in edits]
    return Request(latent_distribution(editor.vae, crowd.x).mean, editor.states(prompts), places.to(crowd.x),
                   torch.stack(masks)[:, None].to(crowd.x))


def edits_of(crowd: Crowd) -> list[Edit | None]:
    """What the defender is told of each photo, None where nothing."""
    found: list[Edit | None] = []
    for subject, count in zip(crowd.subjects, crowd.counts, strict=True):
        if len(subject.edits) not in (0, count):
            raise BenchError(f"{subject.name}: {len(subject.edits)} edits are told for {count} photos; give one each, "
                             "or none.")
        found += subject.edits or [None] * count
    return found


def word_places(tokenizer: Any, prompt: str, words: str = "") -> Tensor:
    """1 where a prompt has the ``words`` that it ends with ("": all of its words), else 0: float [length].

    A prompt without a word is all padding, and then that counts: everything but the start token.
    """
    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    places = torch.zeros(tokenizer.model_max_length)
    total = length(prompt)
    last = min(total, tokenizer.model_max_length - 2)
    first = min(1 + total - (length(words) if words else total), max(last, 1))
    places[first:last + 1] = 1
    if total == 0:
        places[1:] = 1
    return places


def word_attention(maps: Mapping[str, Tensor], words: Tensor, side: int) -> Tensor:
    """Cross-attention to chosen tokens, the maps of all layers brought to one size (bicubic) and added up.

    ``maps``: [n, places, tokens] per layer; ``words``: [n, tokens] of 0 and 1. Returns [n, side, side].
    """
    total = []
    for found in maps.values():
        width = math.isqrt(found.shape[1])
        shares = (found * words[:, None, :].to(found)).sum(2).reshape(-1, 1, width, width)
        total.append(functional.interpolate(shares, (side, side), mode="bicubic", align_corners=False)[:, 0])
    return torch.stack(total).sum(0)


def attended_places(attention: Tensor) -> Tensor:
    """1 where a photo's map [n, side, side] lies above its own mean, else 0."""
    return (attention > attention.mean((1, 2), keepdim=True)).to(attention)


def attention_left(attention: Tensor, places: Tensor) -> Tensor:
    """The sum over ``places`` of a map's absolute values, as a mean over all places, [n]."""
    return (attention.abs() * places).flatten(1).mean(1)


def distances(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference of each row, [n]."""
    return (found - wanted).square().flatten(1).mean(1)


def value_and_gradient(point: Tensor, losses: Losses, batch: int) -> tuple[Tensor, Tensor]:
    """Each row's own loss [n] at ``point`` [n, ...] and its gradient there, ``batch`` rows at a time."""
    values, gradients = [], []
    for part in chunks(len(point), batch):
        here = point[part].detach().requires_grad_(True)
        found = losses(here, part)
        gradients.append(torch.autograd.grad(found.sum(), here)[0])
        values.append(found.detach())
    return torch.cat(values), torch.cat(gradients)


@torch.no_grad()
def without_gradient(point: Tensor, function: Callable[[Tensor, slice], Tensor], batch: int) -> Tensor:
    """``function`` of all rows of ``point``, ``batch`` at a time."""
    return torch.cat([function(point[part], part) for part in chunks(len(point), batch)])


# -- Whole edits -------------------------------------------------------------------------------------------------------


def edited_latents(
    editor: Editor, pixels: Tensor, request: Request, draws: Draws, part: slice, course: Course, prompted: bool = True,
) -> Tensor:
    """Latents of a whole edit [m, c, h/8, w/8], through which gradients flow back to ``pixels``.

    DDIM with eta = 0 (Song et al., ICLR 2021, eq. 12) over ``course.steps`` equal steps. ``prompted`` False: the prompt
    is empty, and passes that would then be equal are computed once.
    """
    latents, beside = editor.read(pixels, request, draws, part)
    times = course_times(editor, course)
    noise = draws.noise[part]
    z = noise if beside is not None else editor.noised(latents, noise, times[:1].expand(len(noise)))
    empty = editor.states([""]).expand(len(pixels), -1, -1)
    rows = guidance_rows(editor.kind, request.states[part] if prompted else None, empty, beside, course)
    clean = z
    for t, later in zip(times, [*times[1:], None]):
        here = t.expand(len(z))
        clean = editor.clean(guided(editor, z, here, rows), z, here)
        if later is not None:
            z = onward(editor, z, clean, here, later.expand(len(z)))
    return clean


def onward(editor: Editor, z: Tensor, clean: Tensor, here: Tensor, later: Tensor) -> Tensor:
    """z at the less noisy timesteps ``later``: sqrt(abar') z_0 + sqrt(1 - abar') eps."""
    signal, sigma = editor.scales(here, z)
    later_signal, later_sigma = editor.scales(later, z)
    return later_signal * clean + later_sigma * (z - signal * clean) / sigma


def course_times(editor: Editor, course: Course) -> Tensor:
    """Timesteps of an edit, int64 [steps], from the noisiest down: "trailing" equal steps (Lin et al., WACV 2024)."""
    total = editor.scheduler.config.num_train_timesteps * (course.strength if editor.kind == "text" else 1.0)
    left = torch.arange(course.steps, 0, -1) / course.steps
    times: Tensor = ((total * left).round().long() - 1).clamp(min=0).to(editor.unet.device)
    return times


Row = tuple[float, Tensor, Tensor | None]
"""A pass of one guided step: its weight, the prompt's states, what the network is shown beside the noisy latents."""


def guidance_rows(
    kind: str, states: Tensor | None, empty: Tensor, beside: Tensor | None, course: Course,
) -> list[Row]:
    """Classifier-free guidance (Ho and Salimans 2022), e_u + g (e_c - e_u), as weights of passes.

    ``instruct``: e_u + g_i (e_i - e_u) + g (e_c - e_i), where e_i sees the photo but no prompt and e_u neither (Brooks
    et al., eq. 3). ``states`` None: the prompt is empty. Passes without weight are left out.
    """
    g, by_image = course.guidance, course.image_guidance
    if states is None:
        states, g = empty, 1.0
    if kind == "instruct":
        assert beside is not None
        rows: list[Row] = [(g, states, beside), (by_image - g, empty, beside),
                           (1 - by_image, empty, torch.zeros_like(beside))]
        if states is empty:
            rows = [(by_image, empty, beside), rows[2]]
    else:
        rows = [(g, states, beside), (1 - g, empty, beside)]
    return [row for row in rows if row[0] != 0]


def guided(editor: Editor, z: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
    """The weighted sum of the rows' passes."""
    return torch.stack([weight * _pass(editor, z, beside, timesteps, states)
                        for weight, states, beside in rows]).sum(0)


def _pass(editor: Editor, z: Tensor, beside: Tensor | None, timesteps: Tensor, states: Tensor) -> Tensor:
    if z.shape[-1] < RECOMPUTED or not torch.is_grad_enabled():
        return editor.run(z, beside, timesteps, states)
    from torch.utils.checkpoint import checkpoint

    found: Tensor = checkpoint(editor.run, z, beside, timesteps, states, use_reentrant=False)
    return found


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pictures [n, 3, h, w] of scaled latents, about [-1, 1], not cut; differentiable."""
    pictures: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return pictures
