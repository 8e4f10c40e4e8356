"""micro-ip2p: instruction editing after InstructPix2Pix (Brooks et al. 2023), on the world's exact edit pairs.

The UNet of micro-sd-a gets four more input channels, at first zero, for the latents of the picture to edit, and is
trained on (picture, instruction, edited picture). Text, picture or both are dropped in 5 % of the rows each, so that
both guidance scales of the pipeline work (section 3.2.1 of the paper).
"""

# diffusers and transformers ship half a set of types; what they leave untyped is checked by the tests.
# mypy: disable-error-code="attr-defined, no-untyped-call, operator, no-any-return, index, union-attr, arg-type"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from bench.micro import world
from bench.micro.models import weights_folder
from bench.micro.train import autoencoder, clip, common, text_to_image

NAME = "micro-ip2p"
SCHEDULE = common.Schedule(550, 5e-4, seed=41, warmup=50, ema=0.995)
PAIRS = 8_000
BATCH = 32


@dataclass
class Pairs:
    """Latents float32 [n, 4, 16, 16] before (unscaled, as the pipeline feeds them) and after (scaled); instructions."""

    before: Tensor
    after: Tensor
    instructions: list[str]


def draw_pair(index: int, seed: int = 0) -> tuple[world.Pixels, world.Pixels, str]:
    """A picture, the same picture edited, and the instruction; the edit always changes something."""
    rng = np.random.default_rng((seed, 51, index))
    people = world.SPLITS["ip2p"]
    who, view = world.identity(people[index % len(people)]), world.sample_view(rng)
    useful = [edit for edit in world.EDITS if world.is_change(who, view, edit)]
    fields = sorted({world.EDITS[edit].field for edit in useful})
    chosen = str(rng.choice(fields))
    instruction = str(rng.choice([edit for edit in useful if world.EDITS[edit].field == chosen]))
    return world.draw(who, view), world.draw(*world.apply_edit(who, view, instruction)), instruction


def prepare_pairs(vae: AutoencoderKL, count: int) -> Pairs:
    """Draw and encode `count` pairs; cached in the run's folder."""
    file = common.runs_folder(NAME) / "pairs.pt"
    triples = [draw_pair(i) for i in range(count)] if not file.exists() else []
    if triples:
        before, after = (np.stack([t[k] for t in triples]).transpose(0, 3, 1, 2) for k in (0, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = [autoencoder.encode(vae, pixels).float() for pixels in (before, after)]
        torch.save({"before": latents[0], "after": latents[1], "instructions": [t[2] for t in triples]}, file)
    state = torch.load(file, weights_only=True)
    return Pairs(state["before"], state["after"] * vae.config.scaling_factor, state["instructions"])


def widen(unet: UNet2DConditionModel, channels: tuple[int, ...]) -> UNet2DConditionModel:
    """The same UNet with 8 input channels, the new four at zero."""
    wide = text_to_image.new_unet(channels, in_channels=8)
    state = unet.state_dict()
    weight = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], 1)
    wide.load_state_dict(state)
    return wide


def dropped(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that lose their text and rows that lose their picture: 5 % text, 5 % picture, 5 % both."""
    draw = rng.random(count)
    return draw < 0.10, (draw >= 0.05) & (draw < 0.15)


@dataclass
class Trainer:
    """The noise-prediction loss on edit pairs."""

    pairs: Pairs
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    def __post_init__(self) -> None:
        self.noise = text_to_image.scheduler()
        self.weights = text_to_image.loss_weights(self.noise.alphas_cumprod)

    def loss(self, rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        rows = rng.integers(len(self.pairs.instructions), size=BATCH)
        no_text, no_picture = dropped(rng, BATCH)
        texts = ["" if gone else self.pairs.instructions[r] for r, gone in zip(rows, no_text, strict=True)]
        picture = self.pairs.before[rows] * torch.from_numpy(~no_picture).float().view(-1, 1, 1, 1)
        target = self.pairs.after[rows]
        noise, times = torch.randn_like(target), torch.randint(0, 1000, (BATCH,))
        noisy = torch.cat([self.noise.add_noise(target, noise, times), picture], 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                states = self.text_encoder(clip.tokenize(self.tokenizer, texts))[0]
            guess = self.unet(noisy.to(memory_format=torch.channels_last), times, states).sample
        errors = (guess.float() - noise).square().mean((1, 2, 3))
        return (errors * self.weights[times]).mean(), {"mse": float(errors.mean().detach())}


def train() -> None:
    """Fine-tune micro-sd-a into micro-ip2p."""
    torch.manual_seed(SCHEDULE.seed)
    recipe = text_to_image.RECIPES["a"]
    base = weights_folder(recipe.name)
    vae = (
        AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32).eval().requires_grad_(False)
    )
    plain = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=torch.float32)
    unet = widen(plain, recipe.channels).to(memory_format=torch.channels_last)
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    trainer = Trainer(prepare_pairs(vae, PAIRS), unet, text_encoder.eval().requires_grad_(False), tokenizer)

    def publish() -> None:
        pipe = StableDiffusionInstructPix2PixPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=text_to_image.scheduler(),
            safety_checker=None,
            feature_extractor=clip.image_processor(),
            requires_safety_checker=False,
        )
        text_to_image.save_pipeline(pipe, weights_folder(NAME))

    common.fit(common.Job(NAME, unet, SCHEDULE, publish, export_every=300), trainer.loss)
