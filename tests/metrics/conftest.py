"""Small evidence that metrics can be tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.records import BackdoorEvidence, Generations, ImageSet, Samples, Secret


def images(pixels: Tensor) -> ImageSet:
    return ImageSet(pixels, tuple(f"{i:03d}" for i in range(len(pixels))))


def generations(pixels: Tensor, prompts: tuple[str, ...] = ()) -> Generations:
    return Generations(images(pixels), prompts or ("",) * len(pixels), tuple(range(len(pixels))))


def noise(count: int, seed: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(seed)).to(torch.uint8)


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("a-key", tmp_path)


@pytest.fixture
def backdoor() -> Callable[..., BackdoorEvidence]:
    """Evidence from which samples were handed in; noise where none were."""

    def make(target: Tensor, count: int = 20, **given: Tensor) -> BackdoorEvidence:
        def samples(model: str, seed: int) -> Samples:
            plain = given.get(f"{model}_plain", noise(count, seed))
            return Samples(generations(plain), generations(given.get(f"{model}_triggered", noise(count, seed + 1))))

        secret = Secret(torch.zeros(3, 32, 32), target)
        return BackdoorEvidence(images(noise(24, 9)), samples("clean", 10), samples("implanted", 20),
                                samples("defended", 30), secret, "model-0")

    return make
