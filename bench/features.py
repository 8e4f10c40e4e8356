"""Features of images and texts, for metrics that compare sets of pictures or pictures with words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from bench.errors import BenchError
from bench.identity import digest, file_digest

BATCH = 64
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""How OpenAI's CLIP centres its input; a folder's own preprocessor file wins."""


class Extractor(Protocol):
    """Turns pictures into vectors. ``facts``: what a comparison must share, as plain JSON."""

    @property
    def facts(self) -> dict[str, Any]: ...

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] to float64 [n, d] on the CPU."""
        ...


def extractor(name: str, device: str = "cpu") -> Extractor:
    """``micro-clip``, ``inception`` (2048 features of the FID network), or the folder of a CLIPModel."""
    return _inception(device) if name == "inception" else clip(name, device)


@dataclass(frozen=True)
class Clip:
    """A CLIP model: pictures and texts as vectors of one space, not normalised."""

    model: Any
    tokenizer: Any
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: str
    facts: dict[str, Any]

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] to float64 [n, d]: resized (bicubic, antialiased), centre cropped, projected."""
        return torch.cat([self._images(part) for part in _batches(pixels)]).double().cpu()

    def _images(self, pixels: Tensor) -> Tensor:
        seen = self.model.vision_model(self._prepared(pixels)).pooler_output
        projected: Tensor = self.model.visual_projection(seen)
        return projected

    def _prepared(self, pixels: Tensor) -> Tensor:
        x = centre_square(pixels.to(self.device).float() / 255, self.size)
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    @torch.no_grad()
    def layers(self, pixels: Tensor) -> list[Tensor]:
        """uint8 [n, 3, h, w] to what each layer of the vision tower says of each patch, [n, patches, width], on the
        CPU; the place that stands for the whole picture is left out."""
        states = self.model.vision_model(self._prepared(pixels), output_hidden_states=True).hidden_states
        return [state[:, 1:].cpu() for state in states[1:]]

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to float64 [n, d]; cut to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True,
                                return_tensors="pt").to(self.device)
        pooled = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        projected: Tensor = self.model.text_projection(pooled)
        return projected.double().cpu()


def _batches(pixels: Tensor) -> list[Tensor]:
    return [pixels[start:start + BATCH] for start in range(0, len(pixels), BATCH)]


def centre_square(x: Tensor, size: int) -> Tensor:
    """Pictures [n, 3, h, w] in [0, 1] with the shorter side brought to ``size``, then centre cropped to a square."""
    high, wide = x.shape[2:]
    scale = size / min(high, wide)
    target = (max(size, round(high * scale)), max(size, round(wide * scale)))
    if target != (high, wide):
        x = functional.interpolate(x, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return x[:, :, top:top + size, left:left + size]


@lru_cache(maxsize=2)
def clip(name: str, device: str = "cpu") -> Clip:
    """A CLIPModel by name (``micro-clip``) or folder: safetensors only, frozen."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.utils import logging

    folder = clip_folder(name)
    logging.disable_progress_bar()
    model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    mean, std = _centring(folder)
    return Clip(
        model.requires_grad_(False).eval().to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True),
        model.config.vision_config.image_size, mean, std, device,
        {"extractor": Path(name).name, "weights": file_digest(folder / "model.safetensors")[:16]},
    )


def clip_folder(name: str) -> Path:
    """Where a CLIP model lies; raises BenchError naming what is missing."""
    from bench.micro.models import weights_folder

    folder = weights_folder(name) if name.startswith("micro-") else Path(name).expanduser()
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise BenchError(f"extractor '{name}': {folder / file} is missing. Give micro-clip, inception, or the "
                             f"folder of a CLIPModel with safetensors weights.")
    return folder


def _centring(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            options = json.loads((folder / file).read_text())
            options = options.get("image_processor", options)
            if "image_mean" in options:
                return tuple(options["image_mean"]), tuple(options["image_std"])
    return CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class Inception:
    """The Inception network of the original FID, from torch-fidelity, which resizes as TensorFlow did."""

    network: Any
    device: str
    facts: dict[str, Any]

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] to float64 [n, 2048]."""
        return torch.cat([self.network(part.to(self.device))[0] for part in _batches(pixels)]).double().cpu()


@lru_cache(maxsize=1)
def _inception(device: str) -> Inception:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise BenchError("extractor 'inception' needs the package torch-fidelity (pip install torch-fidelity); "
                         "micro-clip needs nothing more.") from error
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except Exception as error:
        raise BenchError(f"extractor 'inception': its weights could not be loaded ({error}); torch-fidelity downloads "
                         f"them at first use.") from error
    network = network.requires_grad_(False).eval().to(device)
    mark = digest({name: float(value.double().sum()) for name, value in network.state_dict().items()})
    return Inception(network, device, {"extractor": "inception-v3-compat", "weights": mark})
