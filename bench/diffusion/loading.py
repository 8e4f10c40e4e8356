"""From a :class:`Model` record to modules in memory: float32, frozen, in eval mode, on one device."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from bench.diffusion import checkpoints, pruning
from bench.diffusion.new_words import read_rows
from bench.errors import BenchError
from bench.records import Adapter, Model

logger = logging.getLogger(__name__)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
ADAPTED = ("unet", "text_encoder")
"""Components that an adapter changes in place, so that a pipeline with one needs copies of its own."""

SMALL = 32
"""Side of the latents up to which attention is trained as plain matrix products on a CPU: torch's fused attention there
takes a third of a bfloat16 update for its backward pass alone; the maps that it saves are small."""


@dataclass(frozen=True)
class Components:
    """What a text-to-image training loop needs. ``unet`` and ``text_encoder`` are copies that may be trained."""

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler: Any


def load_pipeline(model: Model, device: str = "cpu") -> Any:
    """A pipeline that draws from ``model``: parts replaced, adapters on top, no safety checker.

    Without adapters the modules of the base are shared between calls; never train them.
    Raises :class:`BenchError` when a part or an adapter cannot be read.
    """
    modules = load_modules(model, device)
    if model.adapters:
        modules |= {name: copy.deepcopy(modules[name]) for name in ADAPTED if name in modules}
    pipeline = _assemble(model.base, modules)
    for adapter in model.adapters:
        _add_adapter(pipeline, adapter, model, device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_components(model: Model, device: str = "cpu") -> Components:
    """Fresh, frozen copies of what text-to-image methods train, the shared autoencoder, and the training schedule."""
    modules = load_modules(model, device)
    unet, text_encoder = (copy.deepcopy(modules[name]) for name in ADAPTED)
    if device == "cpu" and unet.config.sample_size <= SMALL:
        unet.set_attn_processor(AttnProcessor())
    return Components(modules["tokenizer"], text_encoder, modules["vae"], unet, load_schedule(model))


def load_unconditional(model: Model, device: str = "cpu") -> tuple[Any, Any]:
    """A fresh, frozen copy of an unconditional model's network, and its schedule. Its convolutions hold their channels
    last, which makes them faster: on a CPU by a tenth in training, a seventh in sampling, a fifth for gradients of
    pixels."""
    unet = copy.deepcopy(load_modules(model, device)["unet"])
    return unet.to(memory_format=torch.channels_last), load_schedule(model)


def load_schedule(model: Model) -> Any:
    """The forward process that the model was trained with, a DDPMScheduler."""
    folder = checkpoints.component_folder(model.base, "scheduler")
    return diffusers.DDPMScheduler.from_pretrained(folder, local_files_only=True)


def load_modules(model: Model, device: str = "cpu") -> dict[str, Any]:
    """Every component by name, parts in place of the base's. The base's own are cached and shared."""
    index = checkpoints.components(checkpoints.read_index(model.base))
    modules = dict(_base_modules(model.base, _base_mark(model.base), device))
    for name, folder in model.parts.items():
        if name not in index:
            raise BenchError(f"model: part '{name}' does not belong to {model.base.name}; it has {', '.join(index)}.")
        modules[name] = load_module(folder, *index[name]).to(device)
    return modules


def _base_mark(base: Path) -> str:
    return checkpoints.folder_digest(base, checkpoints.read_index(base))


@lru_cache(maxsize=2)
def _base_modules(base: Path, digest: str, device: str) -> Mapping[str, Any]:
    """A pipeline folder's components; ``digest`` is there so that a folder that changed is read again."""
    modules: dict[str, Any] = {}
    for name, (library, cls) in checkpoints.components(checkpoints.read_index(base)).items():
        if name in checkpoints.OPTIONAL or "Scheduler" in cls:
            continue
        found = load_module(checkpoints.component_folder(base, name), library, cls)
        modules[name] = found.to(device) if isinstance(found, nn.Module) else found
    return modules


def load_module(folder: Path, library: str, cls: str) -> Any:
    """One component from its folder: safetensors only, no code from the checkpoint, float32, frozen."""
    kind = getattr(diffusers if library == "diffusers" else transformers, cls)
    if "Tokenizer" in cls:
        return kind.from_pretrained(folder, local_files_only=True)
    dtype = {"torch_dtype" if library == "diffusers" else "dtype": torch.float32}
    try:
        if library == "diffusers" and pruning.is_pruned(folder):
            return freeze(pruning.load_pruned(kind, folder))
        module = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **dtype)
    except (OSError, ValueError, RuntimeError) as problem:
        raise BenchError(f"model: {cls} in '{folder}' cannot be read: {problem}") from problem
    return freeze(module)


def freeze(module: nn.Module) -> nn.Module:
    """No gradients for the weights, and eval mode."""
    return module.requires_grad_(False).eval()


def _assemble(base: Path, modules: Mapping[str, Any]) -> Any:
    index = checkpoints.read_index(base)
    absent = {name: None for name in checkpoints.OPTIONAL if name in index}
    quiet = {"requires_safety_checker": False} if "safety_checker" in index else {}
    return diffusers.DiffusionPipeline.from_pretrained(base, local_files_only=True, **modules, **absent, **quiet)


def _add_adapter(pipeline: Any, adapter: Adapter, model: Model, device: str) -> None:
    if adapter.path.suffix != ".safetensors" or not adapter.path.is_file():
        raise BenchError(f"adapter: '{adapter.path}' is no safetensors file on this machine.")
    if adapter.kind == "lora":
        _add_lora(pipeline, adapter)
    elif adapter.kind == "textual_inversion":
        _add_word(pipeline, adapter)
    elif adapter.kind in ("ip_image", "ip_face"):
        _add_image_prompt(pipeline, adapter, model, device)
    else:
        raise BenchError(f"adapter: unknown kind '{adapter.kind}'. Valid: ip_face, ip_image, lora, textual_inversion.")


def _add_lora(pipeline: Any, adapter: Adapter) -> None:
    name = f"lora_{len(pipeline.get_list_adapters())}"
    with _quiet():  # diffusers warns of every component that the file has no weights for
        pipeline.load_lora_weights(adapter.path.parent, weight_name=adapter.path.name, adapter_name=name)
    pipeline.set_adapters([name], [adapter.scale])


def _add_word(pipeline: Any, adapter: Adapter) -> None:
    """Textual inversion: a new word with embeddings of its own. The tokenizer is shared, so this one is a copy."""
    encoder, pipeline.tokenizer = pipeline.text_encoder, copy.deepcopy(pipeline.tokenizer)
    word = read_rows(adapter.path, encoder.get_input_embeddings().embedding_dim)
    wanted = len(pipeline.tokenizer) + sum(len(rows) for rows in word.values())
    encoder.resize_token_embeddings(wanted, mean_resizing=False)  # else diffusers draws rows, only to overwrite them
    pipeline.load_textual_inversion(word)
    freeze(encoder)


def _add_image_prompt(pipeline: Any, adapter: Adapter, model: Model, device: str) -> None:
    """IP-Adapter (Ye et al. 2023): extra cross-attention to image tokens."""
    encoder = checkpoints.adapter_path(model, adapter.kind).image_encoder
    if encoder is not None:
        _register_image_encoder(pipeline, encoder, device)
    with _quiet():  # diffusers warns of an absent encoder and of casts that change nothing here
        pipeline.load_ip_adapter(_adapter_state(adapter.path), subfolder="", weight_name="", image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(adapter.scale)
    freeze(pipeline.unet).to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


def _register_image_encoder(pipeline: Any, folder: Path, device: str) -> None:
    encoder = load_module(folder, "transformers", "CLIPVisionModelWithProjection").to(device)
    pipeline.register_modules(image_encoder=encoder, feature_extractor=_image_processor(folder, encoder))


def _image_processor(folder: Path, encoder: Any) -> Any:
    """The encoder's own preprocessing if its folder has one, else CLIP's at the encoder's size. The PIL class gives
    the same numbers with and without torchvision."""
    if (folder / "preprocessor_config.json").is_file():
        return transformers.CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    side = encoder.config.image_size
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _adapter_state(file: Path) -> dict[str, dict[str, Tensor]]:
    """The two groups of an IP-Adapter file, ``image_proj.*`` and ``ip_adapter.*``, in float32."""
    from safetensors.torch import load_file

    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(file).items():
        group, _, rest = key.partition(".")
        if group not in state:
            raise BenchError(f"adapter: '{file}' holds '{key}', but an image-prompt adapter has only "
                             "image_proj.* and ip_adapter.*.")
        state[group][rest] = value.float()
    return state


def save_part(module: Any, folder: Path, name: str, half: bool = True) -> Path:
    """Write a trained component to ``folder/name`` and return that folder.

    ``half``: in half precision. The rounding (a relative 0.0005) is far below what training with other noise
    changes, and a grid stores hundreds of these.
    """
    target = folder / name
    # Always a copy: safetensors takes no other layout than the plain one.
    stored = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    (nn.Module.half(stored) if half else stored).save_pretrained(target, safe_serialization=True)
    _forget_origin(target / "config.json")
    return target


def _forget_origin(config: Path) -> None:
    """Drop the path that the module was loaded from: an artefact is the same on every machine."""
    known = json.loads(config.read_text())
    known.pop("_name_or_path", None)
    config.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
