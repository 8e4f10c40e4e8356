"""Encoders that image-prompt adapters read a person from, as differentiable functions of the pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.diffusion.checkpoints import adapter_path, file_digest
from bench.diffusion.loading import load_module
from bench.errors import BenchError
from bench.faces import MICRO_ENCODERS, WEIGHTS_FILE, load_face_encoder, recogniser
from bench.micro.models import weights_folder
from bench.options import JUDGE
from bench.records import Model

Embed = Callable[[Tensor], Tensor]
"""``embed(pixels)``: [n, d] or [n, tokens, d] of pictures [n, 3, h, w] in [0, 1]; gradients reach the pixels."""
FACE_SIDE = 112
"""Side of the crops that InsightFace's networks read."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers for the filters that torch has with antialiasing."""


@dataclass(frozen=True)
class Preparation:
    """What a CLIP image processor does: the shorter side to ``shortest``, the centre ``crop``, normalisation."""

    shortest: int
    crop: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in [0, 1] to the encoder's input; equal to PIL's but for its rounding to 8 bits."""
        high, wide = pixels.shape[2:]
        scale = self.shortest / min(high, wide)
        size = (max(self.shortest, int(high * scale)), max(self.shortest, int(wide * scale)))
        if size != (high, wide):
            pixels = nn.functional.interpolate(pixels, size, mode=self.mode, antialias=True, align_corners=False)
            pixels = pixels.clamp(0, 1)                            # bicubic overshoots, an 8-bit picture cannot
        top, left = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        cut = pixels[:, :, top:top + self.crop, left:left + self.crop]
        mean, std = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in (self.mean, self.std))
        return (cut - mean) / std


def read_preparation(folder: Path, side: int) -> Preparation:
    """From the encoder's ``preprocessor_config.json``; without one CLIP's own, at the encoder's ``side``.

    Raises `BenchError` for a filter that cannot be followed.
    """
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preparation(side, side)
    told = json.loads(file.read_text())
    shortest, crop = (_side(told.get(key), side) for key in ("size", "crop_size"))
    if told.get("resample", 3) not in RESAMPLE:
        raise BenchError(f"image encoder: {file} asks for resample={told['resample']}; gradients flow through "
                         f"{', '.join(f'{n} ({name})' for n, name in RESAMPLE.items())} only.")
    mean, std = tuple(told.get("image_mean", CLIP_MEAN)), tuple(told.get("image_std", CLIP_STD))
    return Preparation(shortest, crop, mean, std, RESAMPLE[told.get("resample", 3)])


def _side(told: Any, default: int) -> int:
    """A size is a number, or a mapping with ``shortest_edge`` or ``height``."""
    if isinstance(told, dict):
        told = told.get("shortest_edge", told.get("height"))
    return default if told is None else int(told)


def clip_encoder(folder: Path, device: str, hidden: bool = False) -> Embed:
    """The CLIP vision model in ``folder``: its projected embeddings [n, d], which IP-Adapter reads, or with ``hidden``
    the states before its last layer [n, tokens, d], which IP-Adapter Plus and PhotoMaker-like adapters read."""
    encoder = load_module(folder, "transformers", "CLIPVisionModelWithProjection").to(device)
    prepare = read_preparation(folder, encoder.config.image_size)

    def embed(pixels: Tensor) -> Tensor:
        found = encoder(prepare(pixels), output_hidden_states=hidden)
        states: Tensor = found.hidden_states[-2] if hidden else found.image_embeds
        return states

    return embed


def face_encoder(name: str, device: str) -> Embed:
    """A face encoder with gradients: unit embeddings [n, d]. ``name``: of an embedded one, a `FaceEncoder`'s folder, or
    ``insightface:<pack>``, whose network is then converted to torch and expects aligned crops.

    Raises `BenchError` for the judge, also under another name, and for recognisers that give no gradients.
    """
    refuse_judge(name)
    if name.partition(":")[0] == "insightface":
        return insightface_network(name, device)
    refuse_without_gradients(name)
    folder = weights_folder(name) if name in MICRO_ENCODERS else Path(name).expanduser()
    if not folder.is_dir():
        raise BenchError(f"face encoder: '{name}' is neither one of {', '.join(MICRO_ENCODERS[:-1])} nor a folder.")
    encoder = load_face_encoder(folder).to(device)
    if file_digest(folder / WEIGHTS_FILE) == file_digest(weights_folder(JUDGE) / WEIGHTS_FILE):
        refuse_judge(JUDGE, f" ('{name}' holds its weights)")
    return lambda pixels: encoder.embed(pixels)[0]


def refuse_judge(name: str, how: str = "") -> None:
    """The judge scores protections, so none may optimise against it."""
    if name == JUDGE:
        raise BenchError(f"face encoder: {JUDGE} is the judge{how}; it scores, and no defense may use it. Take "
                         f"{' or '.join(MICRO_ENCODERS[:-1])}.")


def refuse_without_gradients(name: str) -> None:
    """dlib's network cannot be differentiated."""
    if name == "dlib":
        raise BenchError(f"face encoder: '{name}' gives no gradients (it does not run in torch), so no protection can "
                         "be optimised against it; give the folder of a FaceEncoder (config.json, model.safetensors) "
                         "or insightface:<pack>.")


def insightface_network(name: str, device: str) -> Embed:
    """The recognition network of an InsightFace pack as a torch module: RGB crops in [0, 1], scaled to 112 pixels."""
    try:
        from onnx2torch import convert  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise BenchError(f"face encoder '{name}': gradients through an InsightFace network need the package onnx2torch "
                         f"({error}); install the extra 'gpu'.") from error
    pack: Any = recogniser(name)
    network = convert(pack.analysis.models["recognition"].model_file).eval().requires_grad_(False).to(device)

    def embed(crops: Tensor) -> Tensor:
        sized = nn.functional.interpolate(crops, (FACE_SIDE, FACE_SIDE), mode="bilinear", antialias=True)
        return nn.functional.normalize(network(sized * 2 - 1), dim=1)

    return embed


def open_encoders(names: Sequence[str], model: Model, device: str, hidden: bool = False) -> list[Embed]:
    """``ip_image``: the CLIP encoder of the model's image adapter; ``ip_face``: the recogniser of its face adapter;
    else a face encoder's name or folder. All frozen."""
    found: list[Embed] = []
    for name in names:
        if name == "ip_image":
            folder = adapter_path(model, name).image_encoder
            if folder is None:
                raise BenchError(f"image encoder: the ip_image adapter of {model.base.name} has no encoder folder.")
            found.append(clip_encoder(folder, device, hidden))
        else:
            found.append(face_encoder(adapter_path(model, name).recogniser if name == "ip_face" else name, device))
    return found


def gaussian_blur(pixels: Tensor, sigmas: Tensor, size: int) -> Tensor:
    """Each picture of [n, 3, h, w] blurred by its own ``sigmas`` [n] pixels; a kernel of odd ``size``, mirrored edges;
    differentiable in the pixels."""
    places = torch.arange(size, device=pixels.device, dtype=pixels.dtype) - size // 2
    kernels = torch.exp(-places.square() / (2 * sigmas.reshape(-1, 1).square()))
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(pixels.shape[1], 0)       # [3n, size]
    pad = size // 2
    padded = nn.functional.pad(pixels, (pad, pad, pad, pad), mode="reflect")
    rows = padded.reshape(1, -1, *padded.shape[2:])
    across = nn.functional.conv2d(rows, kernels[:, None, None, :], groups=len(kernels))
    down = nn.functional.conv2d(across, kernels[:, None, :, None], groups=len(kernels))
    return down.reshape(pixels.shape)
