"""How the values of stages become files: images as lossless PNG, tensors as safetensors, the rest as JSON.

No path of the machine is ever written: what lies in the artefact is named relative to it, and the model that a
stage started from is supplied again when its artefact is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.files import inside
from bench.identity import digest, file_digest, plain
from bench.records import (
    Adapter,
    Customised,
    Generations,
    Guard,
    ImageSet,
    InputScores,
    Measurement,
    Model,
    Row,
    Secret,
)

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
MODEL = "model.json"
OWN, BASE, CHECKPOINT = "artefact", "base", "checkpoint"
"""Where a file of a model lies: in its artefact, in the base pipeline's folder, or beside the base as a published
add-on that ``bench.diffusion.checkpoints.adapter_path`` finds again."""


def write_png(pixels: Tensor, path: Path) -> None:
    """Write one image, uint8 [3, h, w], without loss."""
    from PIL import Image

    Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(path, format="PNG")


def read_png(path: Path) -> Tensor:
    """Read one image as uint8 [3, h, w]."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ImageSetCodec:
    """One ImageSet: a PNG per image, and their names and captions in ``index.json``."""

    def save(self, value: ImageSet, folder: Path) -> None:
        _check_pixels(value.pixels)
        folder.mkdir(parents=True, exist_ok=True)
        files = [f"{i:04d}_{slug(name)}.png" for i, name in enumerate(value.names)]
        for file, pixels in zip(files, value.pixels, strict=True):
            write_png(pixels, folder / file)
        _write(folder / INDEX, {"size": list(value.pixels.shape[2:]), "files": files, "names": value.names,
                                "captions": value.captions})

    def load(self, folder: Path) -> ImageSet:
        import torch

        index = _read(folder / INDEX)
        images = [read_png(inside(folder, file)) for file in index["files"]]
        pixels = torch.stack(images) if images else torch.zeros(0, 3, *index["size"], dtype=torch.uint8)
        return ImageSet(pixels, tuple(index["names"]), tuple(index["captions"]))


@dataclass(frozen=True)
class ImageSetsCodec:
    """Several ImageSets by name (say, by subject): a folder each."""

    def save(self, value: Mapping[str, ImageSet], folder: Path) -> None:
        folders = {name: f"{i:04d}_{slug(name)}" for i, name in enumerate(value)}
        for name, images in value.items():
            ImageSetCodec().save(images, folder / folders[name])
        _write(folder / "sets.json", [{"name": name, "folder": path} for name, path in folders.items()])

    def load(self, folder: Path) -> dict[str, ImageSet]:
        sets = _read(folder / "sets.json")
        return {s["name"]: ImageSetCodec().load(inside(folder, s["folder"])) for s in sets}


@dataclass(frozen=True)
class GenerationsCodec:
    """Samples with the prompt and the seed of each."""

    def save(self, value: Generations, folder: Path) -> None:
        ImageSetCodec().save(value.images, folder / "images")
        _write(folder / "generations.json", {"prompts": value.prompts, "seeds": value.seeds})

    def load(self, folder: Path) -> Generations:
        asked = _read(folder / "generations.json")
        return Generations(ImageSetCodec().load(folder / "images"), tuple(asked["prompts"]), tuple(asked["seeds"]))


@dataclass(frozen=True)
class ModelCodec:
    """A model that a stage made from ``base``: the record of what differs. New weights are in the folder already.

    A model that equals ``base`` is recorded as such and keeps its digest; any other gets the digest of the base's
    digest and the stage's key. Weights that lie elsewhere are copied in, by hard link where the disk allows.
    """

    base: Model

    def save(self, value: Model, folder: Path) -> None:
        if value == self.base:
            _write(folder / MODEL, {"unchanged": True})
            return
        if value.base != self.base.base:
            raise BenchError(f"model: a stage made a model on {value.base} out of one on {self.base.base}; weights "
                             "may be replaced by parts and adapters only.")
        parts = {name: self._place(path, f"parts/{name}", folder) for name, path in sorted(value.parts.items())}
        adapters = [self._adapter(adapter, i, folder) for i, adapter in enumerate(value.adapters)]
        record: dict[str, Any] = {"capabilities": sorted(value.capabilities), "parts": parts, "adapters": adapters}
        if value.guard is not None:
            record["guard"] = {**vars(value.guard), "folder": self._place(value.guard.folder, "guard", folder)}
        _write(folder / MODEL, record)

    def load(self, folder: Path) -> Model:
        record = _read(folder / MODEL)
        if record.get("unchanged"):
            return self.base
        return replace(
            self.base,
            digest=digest({"base": self.base.digest, "stage": folder.name}),
            capabilities=frozenset(record["capabilities"]),
            parts={name: self._find(place, folder) for name, place in record["parts"].items()},
            adapters=tuple(self._adapted(entry, folder) for entry in record["adapters"]),
            guard=self._guarded(record.get("guard"), folder),
        )

    def _guarded(self, entry: Mapping[str, Any] | None, folder: Path) -> Guard | None:
        return Guard(**{**entry, "folder": self._find(entry["folder"], folder)}) if entry else None

    def _place(self, path: Path, name: str, folder: Path) -> dict[str, str]:
        """Where ``path`` will be found again; copies it to ``folder / name`` when it lies elsewhere."""
        for where, root in ((OWN, folder), (BASE, self.base.base)):
            if path.resolve().is_relative_to(root.resolve()):
                return {"in": where, "path": path.resolve().relative_to(root.resolve()).as_posix()}
        copy_in(path, folder / name)
        return {"in": OWN, "path": name}

    def _find(self, place: Mapping[str, str], folder: Path) -> Path:
        return inside(folder if place["in"] == OWN else self.base.base, place["path"])

    def _adapter(self, adapter: Adapter, index: int, folder: Path) -> dict[str, Any]:
        entry: dict[str, Any] = {"kind": adapter.kind, "scale": adapter.scale}
        if adapter.path.resolve() == published_adapter(self.base, adapter.kind):
            return {**entry, "file": {"in": CHECKPOINT, "sha256": file_digest(adapter.path)}}
        return {**entry, "file": self._place(adapter.path, f"adapters/{index}/{adapter.path.name}", folder)}

    def _adapted(self, entry: Mapping[str, Any], folder: Path) -> Adapter:
        place = entry["file"]
        if place["in"] != CHECKPOINT:
            return Adapter(entry["kind"], self._find(place, folder), entry["scale"])
        path = published_adapter(self.base, entry["kind"])
        if path is None or file_digest(path) != place["sha256"]:
            raise BenchError(f"model: the {entry['kind']} adapter of {self.base.base} ({path}) is not the one that "
                             f"{folder} was made with; put the original file back, or remove that folder.")
        return Adapter(entry["kind"], path, entry["scale"])


def published_adapter(base: Model, kind: str) -> Path | None:
    """The add-on that ships with ``base`` for ``kind``: it stays where it is, with the encoder beside it."""
    if not kind.startswith("ip_"):
        return None
    from bench.diffusion.checkpoints import adapter_path

    try:
        return adapter_path(base, kind).weight.resolve()
    except BenchError:
        return None


def copy_in(source: Path, target: Path) -> None:
    """Copy a file or folder, by hard link where the disk allows; it must not exist yet."""
    if not source.exists():
        raise BenchError(f"model: {source} is missing; it was named as weights of a model.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


@dataclass(frozen=True)
class CustomisedCodec:
    """What an attacker generates from, made from ``base``."""

    base: Model

    def save(self, value: Customised, folder: Path) -> None:
        ModelCodec(self.base).save(value.model, folder)
        if value.conditioning is not None:
            ImageSetCodec().save(value.conditioning, folder / "conditioning")
        _write(folder / "customised.json", {"token": value.token, "conditioning": value.conditioning is not None})

    def load(self, folder: Path) -> Customised:
        record = _read(folder / "customised.json")
        photos = ImageSetCodec().load(folder / "conditioning") if record["conditioning"] else None
        return Customised(ModelCodec(self.base).load(folder), record["token"], photos)


@dataclass(frozen=True)
class ImplantCodec:
    """A backdoored model made from ``base``, and the attacker's secret."""

    base: Model

    def save(self, value: tuple[Model, Secret], folder: Path) -> None:
        model, secret = value
        ModelCodec(self.base).save(model, folder)
        SecretCodec().save(secret, folder / "secret")

    def load(self, folder: Path) -> tuple[Model, Secret]:
        return ModelCodec(self.base).load(folder), SecretCodec().load(folder / "secret")


@dataclass(frozen=True)
class SecretCodec:
    """A trigger (a word, or a tensor to the bit), its target image and its details."""

    def save(self, value: Secret, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        word = value.trigger if isinstance(value.trigger, str) else None
        if not isinstance(value.trigger, str):
            save_file({"trigger": value.trigger.detach().cpu().contiguous()}, folder / "trigger.safetensors")
        write_png(value.target, folder / "target.png")
        _write(folder / "secret.json", {"word": word, "detail": value.detail})

    def load(self, folder: Path) -> Secret:
        from safetensors.torch import load_file

        record = _read(folder / "secret.json")
        trigger = record["word"]
        if trigger is None:
            trigger = load_file(folder / "trigger.safetensors")["trigger"]
        return Secret(trigger, read_png(folder / "target.png"), record["detail"])


@dataclass(frozen=True)
class InputScoresCodec:
    """Scores of inputs, three tensors in one safetensors file."""

    def save(self, value: InputScores, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: part.contiguous() for name, part in vars(value).items()}, folder / "scores.safetensors")

    def load(self, folder: Path) -> InputScores:
        from safetensors.torch import load_file

        return InputScores(**load_file(folder / "scores.safetensors"))


@dataclass(frozen=True)
class MeasurementsCodec:
    """What one metric measured, with its rows."""

    def save(self, value: Sequence[Measurement], folder: Path) -> None:
        _write(folder / "measurements.json", [{**_shallow(m), "rows": [asdict(r) for r in m.rows]} for m in value])

    def load(self, folder: Path) -> list[Measurement]:
        found = _read(folder / "measurements.json")
        return [Measurement(**{**m, "rows": tuple(Row(**r) for r in m["rows"])}) for m in found]


@dataclass(frozen=True)
class JsonCodec:
    """Plain JSON (lists, mappings, text, numbers)."""

    def save(self, value: Any, folder: Path) -> None:
        _write(folder / "value.json", value)

    def load(self, folder: Path) -> Any:
        return _read(folder / "value.json")


def _shallow(measurement: Measurement) -> dict[str, Any]:
    return {k: v for k, v in vars(measurement).items() if k != "rows"}


def _check_pixels(pixels: Tensor) -> None:
    if str(pixels.dtype) != "torch.uint8" or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise BenchError(f"images: {pixels.dtype} {tuple(pixels.shape)} cannot be stored; give uint8 [n, 3, h, w].")


def slug(name: str) -> str:
    """The part of a name that is safe in a file name anywhere."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)[:60].strip("-") or "image"


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(plain(value, path.stem), indent=1, sort_keys=True, allow_nan=False))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
