"""The conformance kit on the methods of this repository: what all of them declare, and what the cheap ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import discovery
from bench.plugin import REGISTRY
from bench.testing.case import Case
from bench.testing.kit import DECLARED, checks_of, find

discovery.load()
NEGATIVE = {
    "anp": ("threshold",), "dladiff": ("face_threshold",), "edit_success": ("threshold",), "elijah": ("threshold",),
    "noise_probe": ("level", "threshold"), "sau": ("similarity", "activation", "flag_cosine"),
    "t2ishield": ("threshold", "similarity"), "textual_perturbation": ("similarity",),
}
"""Cosines, logits and mean levels may be below zero."""
CHEAP: dict[str, dict[str, Any]] = {
    "defense/noise": {}, "defense/photoguard": {"steps": 2}, "defense/finetune": {"steps": 2, "batch": 4},
    "attack/zero_shot": {}, "attack/lora": {"steps": 2}, "attack/sdedit": {},
    "attack/baddiffusion": {"steps": 2, "batch": 4, "mixed_precision": False},
    "metric/image_quality": {}, "metric/asr": {},
}
DEARER: dict[str, dict[str, Any]] = {
    "defense/aspl": {"outer_steps": 1, "surrogate_steps": 1, "pgd_steps": 2, "class_images": 2, "class_steps": 2},
    "defense/advdm": {"steps": 2}, "defense/mist": {"steps": 2}, "defense/sds": {"steps": 2},
    "defense/prune_random": {"synthetic_images": 4, "synthetic_steps": 2, "steps": 2, "batch": 4, "ratio": 0.2},
    "attack/dreambooth": {"steps": 2, "class_images": 2, "class_steps": 2, "lr": 1e-3},
    "attack/villandiffusion": {"steps": 2, "batch": 4, "mixed_precision": False},
    "metric/ism": {}, "metric/fid": {"components": 4, "draws": 20}, "metric/kid": {"draws": 20},
    "metric/clip_score": {}, "metric/no_reference_quality": {}, "metric/perceptual": {}, "metric/edit_shift": {},
    "metric/trigger_removal_rate": {}, "metric/target_distance": {}, "metric/defense_report": {},
}
"""Plugin -> options that make it fast on tiny models."""


def named(found: tuple[str, str]) -> str:
    return "/".join(found)


@pytest.mark.parametrize("key", [key for key in sorted(REGISTRY.classes) if key[1][:5] != "fake_"], ids=named)
def test_what_is_declared_conforms(key: tuple[str, str], tmp_path: Path) -> None:
    """All but the import, which `tests/test_discovery.py` checks for all at once."""
    case = Case(REGISTRY.classes[key], negative=NEGATIVE.get(key[1], ()))
    for name in checks_of(case).keys() & DECLARED.keys() - {"cheap_import"}:
        DECLARED[name](case, tmp_path)


def conforms(name: str, options: dict[str, Any], folder: Path) -> None:
    case, failed = Case(find(name), options), []
    for label, check in checks_of(case).items():
        if label not in DECLARED:
            (folder / label).mkdir()
            try:
                check(case, folder / label)
            except AssertionError as error:
                failed.append(f"{label}: {error}")
    assert not failed


@pytest.mark.parametrize("name", CHEAP)
def test_what_is_done_conforms(name: str, tmp_path: Path) -> None:
    conforms(name, CHEAP[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEARER)
def test_what_is_done_at_more_cost_conforms(name: str, tmp_path: Path) -> None:
    conforms(name, DEARER[name], tmp_path)
