"""micro-sd-a, micro-sd-b: text-to-image latent diffusion, and the image-prompt adapters that belong to each.

The UNet and two adapters (IP-Adapter, image prompt; IP-Adapter-FaceID, face embedding) learn in one run. Half of the
rows of a batch have no image prompt: their adapter tokens are zero, the adapters' keys and values have no bias, so
their contribution is exactly zero and the UNet alone is a plain text-to-image UNet. The other rows are prompted with
a *different* view of the person in the target picture. The text encoder is micro-clip's and stays as it is.
"""

# diffusers and transformers ship half a set of types; what they leave untyped is checked by the tests.
# mypy: disable-error-code="attr-defined, no-untyped-call, operator, no-any-return, index, union-attr, arg-type"

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    MultiIPAdapterImageProjection,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from bench.micro import world
from bench.micro.models import weights_folder
from bench.micro.tokenizer import save_tokenizer
from bench.micro.train import autoencoder, clip, common

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 4
IMAGE, FACE = 0, 1


@dataclass(frozen=True)
class Recipe:
    """Which people, how wide and how long."""

    name: str
    which: str
    split: str
    channels: tuple[int, ...]
    schedule: common.Schedule
    pictures: int = 32_000
    views: int = 4
    batch: int = 32
    caption_dropout: float = 0.1
    image_share: float = 0.25
    face_share: float = 0.25


RECIPES = {
    "a": Recipe(
        "micro-sd-a", "a", "sd_a", (64, 128, 128), common.Schedule(2800, 8e-4, seed=31, warmup=150, ema=0.999)
    ),
    "b": Recipe(
        "micro-sd-b", "b", "sd_b", (48, 96, 128), common.Schedule(2800, 8e-4, seed=32, warmup=150, ema=0.999)
    ),
}


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x: 1000 steps, scaled linear, noise prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_unet(channels: tuple[int, ...], in_channels: int = 4) -> UNet2DConditionModel:
    """Three levels (16, 8 and 4 pixels wide); attention on the lower two, heads of 32."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=clip.WIDTH,
        attention_head_dim=tuple(max(1, c // 32) for c in channels),
        norm_num_groups=16,
    )


class PromptProjection(MultiIPAdapterImageProjection):  # type: ignore[misc]
    """Both adapters' projections, with a gate [n, 2] that zeroes the tokens of rows without that prompt."""

    gate: Tensor

    def forward(self, image_embeds: list[Tensor]) -> list[Tensor]:
        tokens: list[Tensor] = super().forward(image_embeds)
        return [t * self.gate[:, i].view(-1, 1, 1, 1).to(t.dtype) for i, t in enumerate(tokens)]


def add_adapters(unet: UNet2DConditionModel, image_size: int, face_size: int) -> PromptProjection:
    """Give the UNet trainable image and face adapters of the published layout."""
    width = clip.WIDTH
    face = IPAdapterFaceIDImageProjection(width, face_size, mult=2, num_tokens=PROMPT_TOKENS)
    with torch.no_grad():
        # Face embeddings have unit length, so their components are far smaller than the layer expects.
        face.ff.net[0].proj.weight.mul_(face_size**0.5)
    projection = PromptProjection([ImageProjection(image_size, width, PROMPT_TOKENS), face])
    processors = {}
    for name, old in unet.attn_processors.items():
        cross = not name.endswith("attn1.processor")
        processors[name] = _adapter_processor(unet, name) if cross else type(old)()
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = projection
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return projection


def _adapter_processor(unet: UNet2DConditionModel, name: str) -> IPAdapterAttnProcessor2_0:
    attention = unet.get_submodule(name.removesuffix(".processor"))
    hidden = attention.to_q.in_features
    return IPAdapterAttnProcessor2_0(hidden, clip.WIDTH, num_tokens=(PROMPT_TOKENS, PROMPT_TOKENS))


def plain_unet(
    unet: UNet2DConditionModel, channels: tuple[int, ...], in_channels: int = 4
) -> UNet2DConditionModel:
    """A copy without adapters."""
    state = {
        k: v for k, v in unet.state_dict().items() if ".processor." not in k and "encoder_hid_proj" not in k
    }
    plain = new_unet(channels, in_channels)
    plain.load_state_dict(state)
    return plain


def _published_projection(projection: nn.Module, index: int) -> dict[str, Tensor]:
    state = projection.image_projection_layers[index].state_dict()
    names = {"image_embeds": "proj", "ff.net.0.proj": "proj.0", "ff.net.2": "proj.2", "norm": "norm"}
    renamed = {}
    for key, value in state.items():
        stem, leaf = key.rsplit(".", 1)
        renamed[f"image_proj.{names[stem]}.{leaf}"] = value
    return renamed


def adapter_state(unet: UNet2DConditionModel, index: int) -> dict[str, Tensor]:
    """One adapter in the layout of the published IP-Adapter files: `image_proj.*` and `ip_adapter.<odd>.to_[kv]_ip`."""
    state = _published_projection(unet.encoder_hid_proj, index)
    cross = [p for name, p in unet.attn_processors.items() if not name.endswith("attn1.processor")]
    for position, processor in enumerate(cross):
        state[f"ip_adapter.{2 * position + 1}.to_k_ip.weight"] = processor.to_k_ip[index].weight
        state[f"ip_adapter.{2 * position + 1}.to_v_ip.weight"] = processor.to_v_ip[index].weight
    return {k: v.detach().half().contiguous() for k, v in state.items()}


@dataclass
class Corpus:
    """What a step needs, computed once: scaled latents, image and face embeddings, and the facts of each picture."""

    latents: Tensor
    images: Tensor
    faces: Tensor
    attributes: list[dict[str, str]]
    views: int

    def other_view(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each row another picture of the same person."""
        start, place = rows - rows % self.views, rows % self.views
        return np.asarray(start + (place + rng.integers(1, self.views, size=len(rows))) % self.views)


@torch.no_grad()
def image_embeddings(
    model: CLIPModel | CLIPVisionModelWithProjection, pixels: np.ndarray, batch: int = 250
) -> Tensor:
    """micro-clip's image embeddings, not normalised: float32 [n, 128]."""
    parts = []
    for i in range(0, len(pixels), batch):
        state = model.vision_model(common.to_unit(pixels[i : i + batch])).pooler_output
        parts.append(model.visual_projection(state))
    return torch.cat(parts).float()


@torch.no_grad()
def face_embeddings(pixels: np.ndarray, name: str = "micro-face-1", batch: int = 250) -> Tensor:
    """Unit face embeddings float32 [n, d]; zeros where no face is detected."""
    from bench.faces import load_face_encoder

    encoder = load_face_encoder(weights_folder(name))
    parts = []
    for i in range(0, len(pixels), batch):
        unit, detected = encoder.embed(torch.from_numpy(pixels[i : i + batch]).float() / 255)
        parts.append(unit * detected.float()[:, None])
    return torch.cat(parts).float()


def load_clip() -> CLIPModel:
    """micro-clip in float32, frozen."""
    model = CLIPModel.from_pretrained(weights_folder(clip.NAME), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _cached(recipe: Recipe, key: str, make: Callable[[], Tensor]) -> Tensor:
    file = common.runs_folder(recipe.name) / f"{key}.pt"
    if not file.exists():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.save(make(), file)
    return cast(Tensor, torch.load(file, weights_only=True))


def scaled_latents(recipe: Recipe) -> Tensor:
    """The latents of the recipe's pictures, scaled to unit variance; cached."""
    vae = autoencoder.load(recipe.which)
    pixels = world.dataset(recipe.split, recipe.pictures, views_per_identity=recipe.views).pixels
    return _cached(
        recipe, "latents", lambda: autoencoder.encode(vae, pixels).float() * vae.config.scaling_factor
    )


def prepare(recipe: Recipe, model: CLIPModel) -> Corpus:
    """All tables of a recipe; each is computed once and cached in the run's folder."""
    data = world.dataset(recipe.split, recipe.pictures, views_per_identity=recipe.views)
    latents = scaled_latents(recipe)
    images = _cached(recipe, "images", lambda: image_embeddings(model, data.pixels))
    faces = _cached(recipe, "faces", lambda: face_embeddings(data.pixels))
    return Corpus(latents, images, faces, data.attributes, recipe.views)


def loss_weights(alphas: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR weights of the noise loss, [1000]: min(SNR, gamma) / SNR (Hang et al. 2023, section 3.4)."""
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / snr


def _captions(corpus: Corpus, rows: np.ndarray, rng: np.random.Generator, dropout: float) -> list[str]:
    texts = []
    for row in rows:
        text = world.describe(corpus.attributes[row], None if rng.random() < 0.25 else rng)
        rare = rng.random() < 0.1
        texts.append("" if rng.random() < dropout else clip.with_rare_words(text, rng) if rare else text)
    return texts


def _gates(recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """Which rows have an image prompt and which a face prompt: float [batch, 2], at most one each."""
    draw = rng.random(recipe.batch)
    image = draw < recipe.image_share
    face = (draw >= recipe.image_share) & (draw < recipe.image_share + recipe.face_share)
    return torch.from_numpy(np.stack([image, face], 1).astype(np.float32))


@dataclass
class Trainer:
    """The noise-prediction loss of one recipe."""

    recipe: Recipe
    corpus: Corpus
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    def __post_init__(self) -> None:
        self.noise = scheduler()
        self.weights = loss_weights(self.noise.alphas_cumprod)

    def _prompts(self, rows: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
        """Image and face embedding [n, 1, d] of another view; zero, the unconditional prompt, in one row of ten."""
        other = self.corpus.other_view(rows, rng)
        keep = torch.from_numpy((rng.random(len(rows)) > 0.1).astype(np.float32))[:, None]
        return [(table[other] * keep)[:, None] for table in (self.corpus.images, self.corpus.faces)]

    def loss(self, rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        rows = rng.integers(len(self.corpus.latents), size=self.recipe.batch)
        latents = self.corpus.latents[rows]
        ids = clip.tokenize(self.tokenizer, _captions(self.corpus, rows, rng, self.recipe.caption_dropout))
        noise, times = torch.randn_like(latents), torch.randint(0, 1000, (len(rows),))
        noisy = self.noise.add_noise(latents, noise, times).to(memory_format=torch.channels_last)
        gates = _gates(self.recipe, rng)
        self.unet.encoder_hid_proj.gate = gates
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                states = self.text_encoder(ids)[0]
            kwargs = {"image_embeds": self._prompts(rows, rng)}
            guess = self.unet(noisy, times, states, added_cond_kwargs=kwargs).sample
        errors = (guess.float() - noise).square().mean((1, 2, 3))
        plain = errors[gates.sum(1) == 0].mean()
        return (errors * self.weights[times]).mean(), {
            "mse": float(errors.mean().detach()),
            "plain": float(plain.detach()),
        }


def text_encoder_of(model: CLIPModel) -> CLIPTextModel:
    """The text half of micro-clip as its own model."""
    encoder = CLIPTextModel(model.config.text_config)
    inner = getattr(encoder, "text_model", encoder)
    inner.load_state_dict(model.text_model.state_dict())
    return encoder.eval().requires_grad_(False)


def image_encoder_of(model: CLIPModel) -> CLIPVisionModelWithProjection:
    """The image half of micro-clip as its own model."""
    encoder = CLIPVisionModelWithProjection(model.config.vision_config)
    encoder.vision_model.load_state_dict(model.vision_model.state_dict())
    encoder.visual_projection.load_state_dict(model.visual_projection.state_dict())
    return encoder.eval().requires_grad_(False)


def export(
    recipe: Recipe, unet: UNet2DConditionModel, vae: AutoencoderKL, model: CLIPModel, tokenizer: CLIPTokenizer
) -> None:
    """Write the pipeline folder and, beside it, both adapters with their image encoder."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder_of(model),
        tokenizer=tokenizer,
        unet=plain_unet(unet, recipe.channels),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=clip.image_processor(),
        requires_safety_checker=False,
    )
    save_pipeline(pipe, weights_folder(recipe.name))
    if unet.encoder_hid_proj is not None:
        export_adapters(recipe.which, unet, model)


def save_pipeline(pipe: StableDiffusionPipeline, target: Path) -> None:
    """Write a pipeline in half precision; the one in memory stays as it is."""
    import copy

    with common.replacing(target) as folder:
        parts = {
            k: copy.deepcopy(v).half() if isinstance(v, nn.Module) else v for k, v in pipe.components.items()
        }
        type(pipe)(**parts, requires_safety_checker=False).save_pretrained(folder)
        save_tokenizer(pipe.tokenizer, folder / "tokenizer")


def export_adapters(which: str, unet: UNet2DConditionModel, model: CLIPModel) -> None:
    """Write `micro-ip/<which>`: two adapter files, the image encoder and its processor."""
    target = weights_folder("micro-ip") / which
    target.parent.mkdir(parents=True, exist_ok=True)
    with common.replacing(target) as folder:
        save_file(adapter_state(unet, IMAGE), folder / "ip-adapter_image.safetensors")
        save_file(adapter_state(unet, FACE), folder / "ip-adapter_face.safetensors")
        image_encoder_of(model).half().save_pretrained(folder / "image_encoder")
        clip.image_processor().save_pretrained(folder / "image_encoder")


def train(which: str) -> None:
    """Train model `which` ("a" or "b") with its adapters."""
    recipe = RECIPES[which]
    torch.manual_seed(recipe.schedule.seed)
    model = load_clip()
    tokenizer = CLIPTokenizer.from_pretrained(weights_folder(clip.NAME))
    corpus = prepare(recipe, model)
    unet = new_unet(recipe.channels)
    add_adapters(unet, corpus.images.shape[1], corpus.faces.shape[1])
    unet.to(memory_format=torch.channels_last)
    trainer = Trainer(recipe, corpus, unet, text_encoder_of(model), tokenizer)

    def publish() -> None:
        export(recipe, unet, autoencoder.load_sharpened(which), model, tokenizer)

    common.fit(common.Job(recipe.name, unet, recipe.schedule, publish, export_every=600), trainer.loss)
