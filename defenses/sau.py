"""SAU: wipe a known trigger out of the final latents of a backdoored text-to-image model; no weight changes.

"Spatial attention unlearning" of text-to-image backdoors, 2025 (arXiv:2504.18563). The paper's text was not at hand:
this follows four public scripts that are almost certainly its authors' (Stable Diffusion 1.4, trigger "New Trigger ",
folders named "unlearned"), as facts about them; no line of that code is used.

A. The trigger's latent: Delta = mean over prompts of z(trigger + p) minus the mean of z(p), z the final latents.
B. Detection: with both flattened and of unit length, a picture's latents z are flagged if cos(z, Delta) >= 0.06 or if
   their squared distance is at most 0.1 (summed; the scripts' mean would flag everything).
C1 (``masks``). With z_c from the prompt without its trigger and the same seed, s = ``strength`` and
       P(i, j) = [cos over channels of z and Delta > 0.5],  Q(i, j) = [activation map > 0.3],
       P~ = sigmoid(12 (P - 0.5)), Q~ likewise:
   ``as_found``:    z' = z (1 - P~)(1 - Q~) + s z_c P~ + s/2 z_c Q~
   ``normalised``:  M = s max(P~, Q~ / 2), z' = (1 - M) z + M z_c, the reading in which weights sum to 1
   and z' is blurred, 5 x 5 with sigma 0.2. The activation map is scaled to [0, 1] and blurred, 5 x 5 with sigma 2; the
   scripts do not say what of. Both readings are here: the channels' mean of |Delta|, and the cross-attention of the
   trigger's tokens, averaged over layers, steps and prompts (the group has code for it).
C2 (``gradient``). Adam, 50 steps of 0.01 down cos(z', Delta) + 0.3 MSE(z', z), the best z' kept; needs no clean prompt.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.identity import added, digest
from bench.options import require
from bench.plugin import parameters, plugin
from bench.records import Guard, ImageSet, Model, Secret
from bench.text_triggers import with_trigger, without_trigger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.attention import Maps
    from bench.protocols import BackdoorProtocol

MODES = ("masks", "gradient")
BLENDS = ("normalised", "as_found")
ACTIVATIONS = ("delta", "attention")
KNOWN = "trigger.safetensors"


@plugin(
    "defense", "sau", track=("backdoor",), acts_on="model", needs=("text_to_image", "text_encoder", "clean_data"),
    knows=("trigger",), paper="arXiv:2504.18563",
)
class Sau:
    """Guards a model's sampler: latents that look like the trigger's are replaced, the weights stay backdoored.

    It is told the trigger, and with ``mode=masks`` draws every flagged picture a second time from the prompt without
    it; who can do that can also just delete the words, so read it beside that control.

    ``mode``: ``masks`` (C1) or ``gradient`` (C2). ``blend``: ``as_found`` or ``normalised``; the found one halves the
    amplitude where the second mask alone is on. ``prompts``: of the data's captions, for Delta. ``strength``,
    ``similarity`` (of P), ``activation`` (of Q), ``flag_cosine``, ``flag_distance``: as found. ``activation_from``:
    what the activation map is made of, ``delta`` or ``attention``. ``steps``, ``guidance``: of drawing the latents for
    Delta and that attention; 30 and 4.5 as found. Ours: ``prompts``.
    """

    mode: str = "masks"
    blend: str = "normalised"
    prompts: int = 16
    strength: float = 1.0
    similarity: float = 0.5
    activation: float = 0.3
    flag_cosine: float = 0.06
    flag_distance: float = 0.1
    steps: int = 30
    guidance: float = 4.5
    descent_steps: int = 50
    descent_lr: float = 0.01
    keep_weight: float = 0.3
    activation_from: str = added("delta")

    def __post_init__(self) -> None:
        for name, valid in (("mode", MODES), ("blend", BLENDS), ("activation_from", ACTIVATIONS)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), f"defense.{name}", valid)
        for name in ("prompts", "steps", "descent_steps"):
            require(name, getattr(self, name), 1)
        for name in ("strength", "guidance", "keep_weight", "flag_distance"):
            require(name, getattr(self, name), 0)
        require("descent_lr", self.descent_lr, 0, exclusive=True)

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The same weights behind a guard that knows Delta, the activation map and the trigger."""
        if secret is None or not isinstance(secret.trigger, str):
            raise BenchError("sau: works against text triggers that it is told; this backdoor has none.")
        folder = ctx.folder / "guard"
        folder.mkdir(parents=True, exist_ok=True)
        save_known(learned(self, suspicious, data.captions[:self.prompts], secret, ctx), folder)
        guard = Guard("defense", "sau", parameters(self), folder)
        return replace(suspicious, guard=guard, digest=digest([suspicious.digest, ctx.key]))

    def draw(
        self, model: Model, prompts: Sequence[str], seeds: Sequence[int], protocol: BackdoorProtocol, ctx: Context,
    ) -> Tensor:
        """Pictures uint8 [n, 3, h, w] of the guarded model."""
        from bench.diffusion.loading import load_pipeline
        from bench.diffusion.sampling import decode_latents, generate_latents

        if model.guard is None:
            raise BenchError("sau: this model has no guard.")
        known = read_known(model.guard.folder)
        pipeline = load_pipeline(replace(model, guard=None), ctx.device)
        asked: dict[str, Any] = {"steps": protocol.steps, "guidance": protocol.guidance, "sampler": protocol.sampler}
        latents = generate_latents(pipeline, prompts, seeds, **asked)
        flagged = suspicious_latents(self, latents, known.delta).nonzero().flatten().tolist()
        if flagged and self.mode == "masks":
            clean = generate_latents(pipeline, [without_trigger(prompts[i], *known.words) for i in flagged],
                                     [seeds[i] for i in flagged], **asked)
            latents[flagged] = masked(self, latents[flagged], clean, known.delta, known.activation)
        elif flagged:
            latents[flagged] = descended(self, latents[flagged], known.delta)
        return decode_latents(pipeline, latents)


@dataclass(frozen=True)
class Known:
    """What the guard goes by. ``delta``: [c, h, w]; ``activation``: [h, w] in [0, 1]; ``words``: the trigger, and what
    it stands in for ("" where it is added)."""

    delta: Tensor
    activation: Tensor
    words: tuple[str, str]


def save_known(known: Known, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"delta": known.delta.cpu().contiguous(), "activation": known.activation.cpu().contiguous()}
    save_file(tensors, folder / KNOWN, metadata=dict(zip(("trigger", "replaces"), known.words, strict=True)))


def read_known(folder: Path) -> Known:
    from safetensors import safe_open

    with safe_open(folder / KNOWN, framework="pt") as file:
        told, delta = file.metadata(), file.get_tensor("delta")
        # Guards that were stored before there were two maps hold Delta alone.
        alone = "activation" not in set(file.keys())
        activation = activation_map(delta.abs().mean(0)) if alone else file.get_tensor("activation")
        return Known(delta, activation, (told["trigger"], told["replaces"]))


def learned(method: Sau, model: Model, captions: Sequence[str], secret: Secret, ctx: Context) -> Known:
    """A: Delta, from the same noise with and without the trigger, and the activation map."""
    from bench.diffusion.loading import load_pipeline
    from bench.diffusion.sampling import generate_latents

    if not captions:
        raise BenchError("sau: prompts come from the data's captions, and it has none; put a .txt beside each image.")
    pipeline = load_pipeline(model, ctx.device)
    seeds = [ctx.seed("delta", place) for place in range(len(captions))]
    asked: dict[str, Any] = {"steps": method.steps, "guidance": method.guidance}
    texts = [with_trigger(caption, secret) for caption in captions]
    clean = generate_latents(pipeline, captions, seeds, **asked)
    if method.activation_from == "attention":
        triggered, found = drawn_attending(pipeline, texts, captions, seeds, asked)
        delta = triggered.mean(0) - clean.mean(0)
    else:
        delta = generate_latents(pipeline, texts, seeds, **asked).mean(0) - clean.mean(0)
        found = delta.abs().mean(0)
    return Known(delta, activation_map(found), (str(secret.trigger), str(secret.detail.get("replaces", ""))))


def drawn_attending(
    pipeline: Any, texts: Sequence[str], captions: Sequence[str], seeds: Sequence[int], asked: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Latents [n, c, h, w] of ``texts``, and how much places attend to the tokens that ``captions`` lack, the mean
    over layers, steps, tokens and prompts: [h, w]."""
    import torch

    from bench.diffusion.losses import tokenise
    from bench.diffusion.sampling import BATCH, chunks, generate_latents
    from bench.diffusion.trigger_tokens import align

    ids = (tokenise(pipeline.tokenizer, prompts).tolist() for prompts in (texts, captions))
    places = [list(align(*pair).added) for pair in zip(*ids, strict=True)]
    if not any(places):
        raise BenchError("sau: this model's tokenizer drops the trigger, so no token of it is attended to; set "
                         "defense.activation_from=delta.")
    latents, found = [], []
    for part in chunks(len(texts), BATCH):
        with attended(pipeline.unet, len(texts[part])) as passes:
            latents.append(generate_latents(pipeline, texts[part], seeds[part], **asked))
        maps = torch.stack(passes).mean(0)
        found += [own[added].mean(0) for own, added in zip(maps, places[part], strict=True) if added]
    return torch.cat(latents), torch.stack(found).mean(0)


@contextmanager
def attended(unet: Any, count: int) -> Iterator[list[Tensor]]:
    """Within it, every pass through ``unet`` adds the cross-attention of its last ``count`` rows (with guidance
    the first half is the empty prompt's), averaged over layers at the latents' width: [count, tokens, h, w]."""
    from bench.diffusion.attention import recorded

    passes: list[Tensor] = []
    with recorded(unet) as maps:
        hook = unet.register_forward_hook(lambda *_: passes.append(layer_mean(maps, count, unet.config.sample_size)))
        try:
            yield passes
        finally:
            hook.remove()


def layer_mean(maps: Maps, count: int, side: int) -> Tensor:
    import torch
    from torch.nn.functional import interpolate

    planes = []
    for found in maps.cross.values():
        own = math.isqrt(found.shape[1])
        square = found[-count:].float().transpose(1, 2).unflatten(2, (own, own))
        planes.append(interpolate(square, size=(side, side), mode="bilinear", align_corners=False))
    return torch.stack(planes).mean(0)


def suspicious_latents(method: Sau, latents: Tensor, delta: Tensor) -> Tensor:
    """B: which latents [n, c, h, w] are flagged, bool [n]. Both sides have unit length."""
    from torch.nn.functional import normalize

    own, known = normalize(latents.flatten(1), dim=1), normalize(delta.flatten()[None].to(latents), dim=1)
    distances = (own - known).square().sum(1)
    return ((own @ known[0]) >= method.flag_cosine) | (distances <= method.flag_distance)


def masked(method: Sau, latents: Tensor, clean: Tensor, delta: Tensor, activation: Tensor) -> Tensor:
    """C1: latents [n, c, h, w] whose trigger places come from the clean ones."""
    import torch

    primary = softened(torch.cosine_similarity(latents, delta[None].to(latents), dim=1) > method.similarity)
    secondary = softened(activation.to(latents) > method.activation)
    p, q = primary[:, None], secondary[None, None]
    if method.blend == "as_found":
        mixed = latents * (1 - p) * (1 - q) + method.strength * clean * p + 0.5 * method.strength * clean * q
    else:
        weight = (method.strength * torch.maximum(p, 0.5 * q.expand_as(p))).clamp(0, 1)
        mixed = (1 - weight) * latents + weight * clean
    return blurred(mixed, 0.2)


def softened(mask: Tensor) -> Tensor:
    """sigmoid(12 (mask - 0.5)): 0.0025 and 0.9975."""
    import torch

    return torch.sigmoid(12 * (mask.float() - 0.5))


def activation_map(found: Tensor) -> Tensor:
    """Scaled to [0, 1] and blurred: [h, w]."""
    spread = (found.max() - found.min()).clamp(min=1e-12)
    return blurred(((found - found.min()) / spread)[None, None], 2.0)[0, 0]


def blurred(x: Tensor, sigma: float) -> Tensor:
    """A 5 x 5 Gaussian, mirrored edges: [n, c, h, w]."""
    import torch

    from bench.diffusion.encoders import gaussian_blur

    n, c, h, w = x.shape
    planes = gaussian_blur(x.reshape(n * c, 1, h, w), torch.full((n * c,), sigma).to(x), 5)
    return planes.reshape(n, c, h, w)


def descended(method: Sau, latents: Tensor, delta: Tensor) -> Tensor:
    """C2: each picture's best latents along Adam's way down cos(z', Delta) + w MSE(z', z)."""
    import torch

    z = latents.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=method.descent_lr)
    best, lowest = latents.clone(), torch.full((len(latents),), float("inf")).to(latents)
    for _ in range(method.descent_steps):
        with torch.enable_grad():
            cosine = torch.cosine_similarity(z.flatten(1), delta.flatten()[None].to(z), dim=1)
            losses = cosine + method.keep_weight * (z - latents).square().flatten(1).mean(1)
            optimizer.zero_grad()
            losses.sum().backward()
        better = losses.detach() < lowest
        best[better], lowest = z.detach()[better], torch.minimum(lowest, losses.detach())
        optimizer.step()
    return best
