"""What plugins are tried on: people of the drawn world, tiny models, a context that notes what it is asked for."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.context import Context
from bench.data.micro_edits import MicroEdits
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.identity import file_digest
from bench.records import ImageSet, Model, Secret, Subject
from bench.testing import pipelines

SIDE = 16
"""Side of the tiny models' pictures."""
PEOPLE, PHOTOS = 3, 2


@dataclass(frozen=True)
class Watched(Context):
    """A context that notes the names that randomness was asked for."""

    asked: list[tuple[str | int, ...]] = field(default_factory=list)

    def seed(self, *names: str | int) -> int:
        self.asked.append(names)
        return super().seed(*names)


def watched(folder: Path, key: str = "one") -> Watched:
    """A context whose own folder is new."""
    return Watched(key, Path(tempfile.mkdtemp(dir=folder)))


@contextmanager
def world_seed(seed: int) -> Iterator[None]:
    """The process-wide generators stand at ``seed``: what differs between two seeds has drawn from one of them."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def people(track: str = "customization", side: int = SIDE) -> list[Subject]:
    """Three people; on the editing track each publishes one photo and the defender knows the edit. The corners of the
    published photos are black and white, where a careless sum overflows."""
    if track == "editing":
        tasks = MicroEdits(count=PEOPLE, photos=PHOTOS, size=side).edits()
        return [_cornered(replace(task.subject, edits=(task.edit,))) for task in tasks]
    return [_cornered(person) for person in MicroSubjects(count=PEOPLE, photos_per_set=PHOTOS, size=side).subjects()]


def _cornered(person: Subject) -> Subject:
    pixels = person.published.pixels.clone()
    pixels[..., :3, :3], pixels[..., -3:, -3:] = 0, 255
    return replace(person, published=replace(person.published, pixels=pixels))


def copied(person: Subject) -> Subject:
    """The same person in memory of its own."""
    sets = {name: replace(images, pixels=images.pixels.clone()) for name in ("clean", "published", "held_out")
            if (images := getattr(person, name))}
    return replace(person, **sets)


def part(images: ImageSet, place: int) -> ImageSet:
    """One of several images."""
    return ImageSet(images.pixels[place:place + 1], images.names[place:place + 1], images.captions[place:place + 1])


def pictures(count: int, side: int, seed: int = 0) -> ImageSet:
    """Captioned portraits of as many people."""
    from bench.data.portraits import portraits

    rows = range(1000 * seed, 1000 * seed + count)
    return portraits(list(rows), [(0, 0)] * count, [f"p{row}" for row in rows], side)


@cache
def tiny_model(needs: tuple[str, ...] = (), track: str = "customization", seed: int = 0) -> Model:
    """A model of a few thousand random weights that meets the needs."""
    folder = Path(_home().name) / f"model_{track}_{'_'.join(sorted(needs))}_{seed}"
    if "edit" in needs:
        return resolve(str(pipelines.save_instruct_pix2pix(folder, seed)))
    if "unconditional" in needs or (track == "backdoor" and not {"text_to_image", "text_encoder"} & set(needs)):
        return resolve(str(pipelines.save_ddpm(folder, seed, size=SIDE)))
    pipelines.add_image_adapter(pipelines.save_stable_diffusion(folder, seed), seed + 1)
    if "ip_face" in needs:
        pipelines.add_face_adapter(folder, "micro-face-1", _face_width(), seed + 2)
    return resolve(str(folder))


def _face_width() -> int:
    from bench.diffusion.encoders import face_encoder

    with torch.no_grad():
        return int(face_encoder("micro-face-1", "cpu")(torch.zeros(1, 3, 64, 64)).shape[-1])


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bench-testing-")


def secret_of(model: Model) -> Secret:
    """What an attacker might have hidden in a tiny model: a grey box in the noise, or a word."""
    target = pictures(1, SIDE, seed=9).pixels[0]
    if "unconditional" not in model.capabilities:
        return Secret("sks", target)
    trigger = torch.full((3, SIDE, SIDE), -1.0)
    trigger[:, -6:, -6:] = 0.0
    return Secret(trigger, target)


def weights(model: Model) -> dict[str, str]:
    """Digests of every file that the model has beyond its base, by place."""
    folders = {f"parts/{name}": path for name, path in model.parts.items()}
    folders |= {f"adapters/{i}": adapter.path for i, adapter in enumerate(model.adapters)}
    if model.guard is not None:
        folders["guard"] = model.guard.folder
    return {f"{name}/{file.relative_to(path) if path.is_dir() else ''}": file_digest(file)
            for name, path in folders.items() for file in ([path] if path.is_file() else sorted(path.rglob("*")))
            if file.is_file()}


def differing(one: Tensor, other: Tensor) -> float:
    """The share of values that differ, 1 for tensors of different shapes."""
    if one.shape != other.shape:
        return 1.0
    return float((one != other).float().mean())


def joined(sets: Sequence[ImageSet]) -> Tensor:
    """All pixels of several sets in one row, whatever their sizes."""
    return torch.cat([images.pixels.flatten() for images in sets])
