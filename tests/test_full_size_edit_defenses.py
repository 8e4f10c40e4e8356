"""One step of every protection against edits on the full architectures of Stable Diffusion 1.5 and InstructPix2Pix.

Random weights, 64-pixel photos. Slow, and left out of the default run; a model takes 4 GB of memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.discovery
from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.plugin import REGISTRY, facts_of
from bench.records import ImageSet, Model, Subject
from tests.defenses.edits import told
from tests.diffusion.test_loading import save_sd15

pytestmark = pytest.mark.slow
bench.discovery.load()

FACES: dict[str, Any] = {"encoders": ["micro-face-1"], "alignment": "whole", "face_size": 64,
                         "perceptual": "autoencoder"}
PROMPT = {"steps": 1, "prompt_every": 1, "prompt_steps": 1}
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("tdae", PROMPT), ("tdae", {**PROMPT, "base": "target"}), ("tdae", {**PROMPT, "base": "cross_attention"}),
    ("tdae", {"steps": 1, "base": "encoder", "prompt": False}),
    ("photoguard", {"steps": 1}), ("advdm", {"steps": 1}), ("mist", {"steps": 1}), ("sds", {"steps": 1}),
    ("photoguard_diffusion", {"steps": 1, "repeats": 1, "sampler_steps": 2}),
    ("editshield", {"steps": 1}), ("editshield", {"steps": 1, "variant": "released", "lr": 0.01}),
    ("diffusionguard", {"steps": 1, "alpha_255": 1.0}),
    ("semantic_attack", {"steps": 1, "timesteps": 1}),
    ("facelock", {"steps": 2, "face_from": 0.0, "looks_from": 0.0, **FACES}),
]
KINDS = {"StableDiffusionPipeline": 4, "StableDiffusionInstructPix2PixPipeline": 8}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("full") / request.param
    save_sd15(folder, (320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12, request.param, KINDS[request.param])
    yield resolve(str(folder))
    shutil.rmtree(folder)  # four gigabytes


@pytest.fixture
def subject() -> Subject:
    person = MicroSubjects(count=1, start=50).subjects()[0]
    photos = ImageSet(person.published.pixels[:1], person.published.names[:1])
    return told(Subject(person.name, person.clean, photos, person.held_out), masked=True)


def test_every_protection_that_needs_no_text_to_image_model_is_covered() -> None:
    covered = {name for name, _ in STEPS}
    missing = [name for (kind, name), facts in REGISTRY.facts.items()
               if kind == "defense" and "editing" in facts.track and facts.acts_on == "images" and not facts.control
               and "text_to_image" not in facts.needs and name not in covered]
    assert missing == []


@pytest.mark.parametrize(("name", "options"), STEPS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(STEPS)])
def test_a_protection(name: str, options: dict[str, Any], model: Model, subject: Subject, tmp_path: Path) -> None:
    method = REGISTRY.get("defense", name)(**options)
    assert facts_of(method).needs in (("text_encoder",), ("latents",))
    protected = method.protect([subject], model, Context("key", tmp_path))[0]
    assert not torch.equal(protected.pixels, subject.published.pixels)
