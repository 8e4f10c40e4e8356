"""An attacker who brings a sampler draws every model's triggered samples with it, and nobody's plain ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.sampling import draw_unconditional, initial_noise
from bench.diffusion.trojan_path import draw_trojan, sampler_detail
from bench.protocols import BackdoorProtocol
from bench.records import Model, Secret
from bench.tracks.backdoor import draw, fingerprint, noises_to_score, seeds_of

PROTOCOL = BackdoorProtocol(samples=2, steps=20)


@pytest.fixture
def model(tiny_ddpm: Path) -> Model:
    return resolve(str(tiny_ddpm))


def secret(gamma: float | None) -> Secret:
    detail = {} if gamma is None else {"sampler": sampler_detail(gamma, [0, 0, 4, 4], False)}
    trigger = torch.zeros(3, 8, 8)
    trigger[:, :4, :4] = 0.5
    return Secret(trigger, torch.zeros(3, 8, 8, dtype=torch.uint8), detail)


def test_triggered_samples_come_from_the_attackers_sampler_and_plain_ones_do_not(model: Model, tmp_path: Path) -> None:
    ctx, own = Context("key", tmp_path), secret(0.3)
    triggered, plain = (draw(model, told, (), [1, 2], PROTOCOL, ctx).images.pixels for told in (own, None))
    assert torch.equal(triggered, draw_trojan(model, [1, 2], own, PROTOCOL, ctx))
    assert torch.equal(plain, draw_unconditional(model, [1, 2], None, PROTOCOL, ctx))
    ordinary = draw(model, secret(None), (), [1, 2], PROTOCOL, ctx).images.pixels
    assert torch.equal(ordinary, draw_unconditional(model, [1, 2], own.trigger, PROTOCOL, ctx))  # type: ignore[arg-type]


def test_samples_are_stored_by_trigger_and_sampler() -> None:
    marks = [fingerprint(None), *(fingerprint(secret(gamma)) for gamma in (None, 0.3, 0.4))]
    assert len(set(marks)) == 4
    assert fingerprint(replace(secret(0.3), target=torch.ones(3, 8, 8, dtype=torch.uint8))) == marks[2]


def test_detectors_of_inputs_see_the_noise_that_the_attacker_starts_from(model: Model) -> None:
    _, clean, triggered = noises_to_score(model, secret(0.3), 0)
    assert torch.equal(clean[:2], initial_noise(seeds_of(2, 0), (3, 8, 8)))
    assert torch.allclose(triggered[:, :, :4, :4], 0.3 * clean[:, :, :4, :4] + 0.5)
    assert torch.equal(triggered[:, :, 4:], clean[:, :, 4:])
