"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's cache."""
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random StableDiffusionPipeline of a few thousand parameters with an image-prompt adapter."""
    from bench.testing.pipelines import add_image_adapter, save_stable_diffusion

    return add_image_adapter(save_stable_diffusion(tmp_path_factory.mktemp("tiny") / "sd"))


@pytest.fixture(scope="session")
def tiny_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random DDPMPipeline of a few thousand parameters with a chain of 20 steps."""
    from bench.testing.pipelines import save_ddpm

    return save_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm")
