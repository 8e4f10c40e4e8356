"""One step of every protection and every customisation attack, unchanged, on the architecture of Stable Diffusion 1.5.

Random weights, 64-pixel photos. Slow, and left out of the default run; a method that trains two copies of the UNet with
AdamW needs more memory than a laptop has, and is skipped where it is not there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import bench.discovery
from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.plugin import REGISTRY, facts_of
from bench.records import Customised, ImageSet, Model, Subject
from bench.testing import pipelines
from tests.diffusion.test_loading import save_sd15

pytestmark = pytest.mark.slow
bench.discovery.load()

ONE: dict[str, Any] = {"class_images": 1, "class_steps": 1, "prior_weight": 0.0}
SURROGATE = {**ONE, "train_text_encoder": False, "batch": 1}
SEARCH = {"search_rounds": 1, "search_tries": 1}
STEPS: dict[tuple[str, str], dict[str, Any]] = {
    ("defense", "advdm"): {"steps": 1}, ("defense", "mist"): {"steps": 1}, ("defense", "photoguard"): {"steps": 1},
    ("defense", "sds"): {"steps": 1},
    ("defense", "encoder_ensemble"): {"steps": 1, "encoders": ["ip_image", "micro-face-1"]},
    ("defense", "caat"): {"steps": 1},
    ("defense", "anti_diffusion"): {"epochs": 1, "pgd_steps": 1, "prompt_steps": 1, "tuning_steps": 1},
    ("defense", "fsmg"): {"surrogate_steps": 1, "pgd_steps": 1, **SURROGATE},
    ("defense", "aspl"): {"outer_steps": 1, "surrogate_steps": 1, "pgd_steps": 1, **SURROGATE},
    ("defense", "simac"): {"outer_steps": 1, "surrogate_steps": 1, "pgd_steps": 1, **SEARCH, **SURROGATE},
    # One of its steps, scaled by the timestep, is below the half level that a file can hold.
    ("defense", "disdiff"): {"outer_steps": 1, "surrogate_steps": 1, "pgd_steps": 6, **SEARCH, **SURROGATE},
    ("defense", "metacloak"): {"trials": 1, "pool_steps": 1, "interval": 1, "surrogate_steps": 1, "pgd_steps": 1,
                               **SURROGATE},
    ("defense", "dladiff"): {"rounds": 1, "attention_steps": 1, "noise_steps": 1, "dynamic_steps": 1, "static_steps": 1,
                             "batch": 1, "static_batch": 1, "encoders": ["micro-face-1"], "alignment": "whole",
                             "face_steps": 1, "map_factors": [2, 4], **ONE},
    ("attack", "dreambooth"): {"steps": 1, **SURROGATE},
    ("attack", "lora"): {"steps": 1},
    ("attack", "textual_inversion"): {"steps": 1},
    ("attack", "zero_shot"): {},
}
GIGABYTES = {"fsmg": 24, "aspl": 40, "simac": 40, "disdiff": 40, "metacloak": 40, "dladiff": 40, "anti_diffusion": 24,
             "dreambooth": 20}
"""Memory that a method needs: 3.4 GB a copy of the UNet, twice that for AdamW's moments."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("sd15")
    save_sd15(folder, (320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12)
    from bench.diffusion.checkpoints import resolve

    pipelines.add_image_adapter(folder)
    return resolve(str(folder))


@pytest.fixture
def subject() -> Subject:
    person = MicroSubjects(count=1, start=50).subjects()[0]

    def one(photos: ImageSet) -> ImageSet:
        return ImageSet(photos.pixels[:1], photos.names[:1])

    return replace(person, clean=one(person.clean), published=one(person.published))


def memory() -> float:
    """Gigabytes of memory and swap: with swap, the heaviest methods take minutes, but run."""
    return (psutil.virtual_memory().total + psutil.swap_memory().total) / 1e9


def chosen(kind: str, name: str) -> Any:
    if memory() < GIGABYTES.get(name, 16):
        pytest.skip(f"{name} at full size needs {GIGABYTES[name]} GB of memory; this machine has {memory():.0f}")
    return REGISTRY.get(kind, name)(**STEPS[kind, name])


def test_every_method_of_the_track_is_covered() -> None:
    missing = [key for key, facts in REGISTRY.facts.items()
               if key[0] in ("defense", "attack") and "text_to_image" in facts.needs
               and "customization" in facts.track and key not in STEPS]
    assert missing == []


@pytest.mark.parametrize("name", [name for kind, name in STEPS if kind == "defense"])
def test_a_protection(name: str, model: Model, subject: Subject, tmp_path: Path) -> None:
    method = chosen("defense", name)
    protected = method.protect([subject], model, Context("key", tmp_path))[0]
    assert not torch.equal(protected.pixels, subject.published.pixels)


@pytest.mark.parametrize("name", [name for kind, name in STEPS if kind == "attack"])
def test_an_attack(name: str, model: Model, subject: Subject, tmp_path: Path) -> None:
    attack = chosen("attack", name)
    assert set(facts_of(attack).needs) <= model.capabilities
    found: Customised = attack.customise(subject.published, "person", model, Context("key", tmp_path))
    assert found.model.parts or found.model.adapters
