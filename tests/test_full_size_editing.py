"""Every editor, unchanged, on the architectures of Stable Diffusion 1.5, its inpainting model and InstructPix2Pix.

Random weights, 64-pixel photos, two steps. Slow, and left out of the default run.
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
from bench.data.micro_edits import MicroEdits
from bench.diffusion.checkpoints import resolve
from bench.plugin import REGISTRY, facts_of
from bench.protocols import EditingProtocol
from bench.records import Model
from tests.diffusion.test_loading import save_sd15

pytestmark = pytest.mark.slow
bench.discovery.load()

KINDS = {"StableDiffusionPipeline": 4, "StableDiffusionInpaintPipeline": 9,
         "StableDiffusionInstructPix2PixPipeline": 8}
EDITORS = [name for (kind, name), facts in REGISTRY.facts.items() if kind == "attack" and "editing" in facts.track]
SERVED = {"StableDiffusionPipeline": {"sdedit", "inpaint"}, "StableDiffusionInpaintPipeline": {"inpaint"},
          "StableDiffusionInstructPix2PixPipeline": {"instruct_pix2pix"}}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("full") / request.param
    save_sd15(folder, (320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12, request.param, KINDS[request.param])
    yield resolve(str(folder))
    shutil.rmtree(folder)  # four gigabytes


def test_a_model_draws_every_edit_that_it_offers(model: Model, tmp_path: Path) -> None:
    [task] = MicroEdits(count=1, photos=1).edits()
    photo, drawn = task.subject.published, set()
    for name in EDITORS:
        attack: Any = REGISTRY.get("attack", name)()
        if set(facts_of(attack).needs) <= model.capabilities:
            protocol = EditingProtocol(steps=2)
            found = attack.edit(photo, [task.edit], [1], model, protocol, Context("key", tmp_path))
            assert found.shape == photo.pixels.shape and not torch.equal(found, photo.pixels)
            drawn.add(name)
    assert drawn == SERVED[model.base.name]
