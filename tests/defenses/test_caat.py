"""CAAT: pixels climb, keys and values of cross-attention alone descend, and the budget holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_components
from bench.diffusion.losses import encode_prompts, latent_distribution, noise_prediction_loss
from bench.diffusion.surrogates import denoising_losses, draw
from bench.errors import BenchError
from bench.records import ImageSet, Model, Subject
from defenses.caat import Caat, backward, climb, learn, open_surrogate
from defenses.noise import SignNoise

FEW: dict[str, Any] = {"steps": 3}


def subject(name: str, size: int = 16) -> Subject:
    generator = torch.Generator().manual_seed(len(name))

    def photos() -> ImageSet:
        pixels = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.int32).to(torch.uint8)
        return ImageSet(pixels, ("a", "b", "c"))

    return Subject(name, photos(), photos(), photos())


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def one_pass(method: Caat, model: Model, ctx: Context, batch: int = 4) -> tuple[Any, Tensor]:
    """The surrogate with the gradients of one pass on its weights, and the gradient of the pixels."""
    surrogate = open_surrogate(method, model, ctx)
    parts, x = surrogate.components, to_float(subject("ada").published.pixels)
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo of a person"]).detach()
    draws = draw(parts.vae, parts.scheduler, x, torch.Generator().manual_seed(1))
    return surrogate, backward(x, denoising_losses(parts.vae, parts.unet, parts.scheduler, states, draws), batch)


@pytest.mark.parametrize(("eps", "size"), [(0, 16), (1, 16), (6.375, 16), (255, 16), (6.375, 32)])
def test_the_saved_files_are_within_the_budget(
    eps: float, size: int, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", size)
    method = Caat(eps=eps, alpha_255=max(eps, 1), **FEW)
    for before, after in zip(ada.published.pixels, method.protect([ada], model, ctx)[0].pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps


def test_one_pass_moves_pixels_and_weights(model: Model, ctx: Context) -> None:
    surrogate, gradient = one_pass(Caat(), model, ctx)
    assert torch.all(gradient.abs().amax((1, 2, 3)) > 0)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in surrogate.parameters)


def test_a_pass_in_parts_leaves_the_same_gradients(model: Model, ctx: Context) -> None:
    (whole, at_once), (parted, one_by_one) = (one_pass(Caat(), model, ctx, batch) for batch in (4, 1))
    assert torch.allclose(at_once, one_by_one, rtol=1e-3, atol=1e-8)
    for a, b in zip(whole.parameters, parted.parameters):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-8)


def test_only_keys_and_values_of_cross_attention_learn(model: Model, ctx: Context) -> None:
    surrogate, _ = one_pass(Caat(), model, ctx)
    published = load_components(model).unet.state_dict()
    learn(Caat(), surrogate)
    state = surrogate.components.unet.state_dict()
    changed = {name for name, value in state.items() if not torch.equal(value, published[name])}
    assert changed == {n for n in state if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    share = sum(int((a != b).sum()) for a, b in zip(surrogate.parameters, surrogate.start))
    assert share > 0.9 * sum(a.numel() for a in surrogate.parameters)


def test_the_surrogate_descends_and_the_first_token_teaches_nothing(model: Model, ctx: Context) -> None:
    """A lone start token leaves keys and values without a gradient; a step lowers the loss that it was taken on."""
    surrogate, _ = one_pass(Caat(), model, ctx)
    parts, x = surrogate.components, to_float(subject("ada").published.pixels)
    draws = draw(parts.vae, parts.scheduler, x, torch.Generator().manual_seed(1))
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo of a person"]).detach()

    def loss(given: Tensor) -> Tensor:
        return denoising_losses(parts.vae, parts.unet, parts.scheduler, given, draws)(x, slice(0, 3)).mean()

    before = loss(states).item()
    learn(Caat(lr=1e-3), replace(surrogate, optimizer=torch.optim.AdamW(surrogate.parameters, lr=1e-3)))
    assert loss(states).item() < before
    alone = torch.autograd.grad(loss(states[:, :1]), surrogate.parameters)
    assert all(gradient.abs().max() == 0 for gradient in alone)


def test_learning_changes_what_the_pixels_become(model: Model, ctx: Context) -> None:
    found, other = (Caat(lr=lr, steps=4).protect([subject("ada")], model, ctx)[0].pixels for lr in (1e-1, 1e-9))
    assert not torch.equal(found, other)


def test_the_objective_rises_more_than_under_noise(model: Model, ctx: Context) -> None:
    """White box: the loss that CAAT ascends is higher on its photos than on noisy ones, under the published weights."""
    ada, parts = subject("ada"), load_components(model)
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo of a person"]).detach()

    def loss(photos: ImageSet) -> float:
        generator, total = torch.Generator().manual_seed(0), 0.0
        with torch.no_grad():
            for _ in range(40):
                latents = latent_distribution(parts.vae, to_float(photos.pixels)).sample(generator)
                total += noise_prediction_loss(parts.unet, parts.scheduler, latents, states.expand(3, -1, -1),
                                               generator=generator).item()
        return total / 40

    protected = loss(Caat(eps=32, alpha_255=4, steps=24).protect([ada], model, ctx)[0])
    assert protected > loss(ada.published)
    assert protected > loss(SignNoise(32).protect([ada], model, ctx)[0])


def test_every_subject_meets_the_published_weights(model: Model, ctx: Context) -> None:
    method, ada = Caat(lr=1e-2, **FEW), subject("ada")
    surrogate = open_surrogate(method, model, ctx)
    x = to_float(ada.published.pixels)
    first, again = (climb(method, ada, x, surrogate, ctx) for _ in range(2))
    assert torch.equal(first, again)


def test_neither_order_company_nor_batch_matters(model: Model, ctx: Context) -> None:
    method, people = Caat(lr=1e-3, eps=16, **FEW), [subject("ada"), subject("bobby")]
    both = method.protect(people, model, ctx)
    swapped = method.protect(people[::-1], model, ctx)
    alone = replace(method, pgd_batch=1).protect(people[1:], model, ctx)
    assert torch.equal(both[0].pixels, swapped[1].pixels)
    assert torch.equal(both[1].pixels, swapped[0].pixels)
    assert (alone[0].pixels != both[1].pixels).float().mean() < 0.01


def test_the_same_key_gives_the_same_bits_and_another_key_others(model: Model, ctx: Context, tmp_path: Path) -> None:
    method, people = Caat(**FEW), [subject("ada")]
    first, again = (method.protect(people, model, ctx)[0].pixels for _ in range(2))
    other = method.protect(people, model, Context("other", tmp_path))[0].pixels
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("eps", 256), ("alpha_255", 0), ("lr", 0), ("steps", -1), ("clip", 0), ("pgd_batch", 0),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        Caat(**{field: value})


def test_published_defaults() -> None:
    """0.05 and 0.005 on the [-1, 1] scale; 250 steps at 1e-5."""
    method = Caat()
    assert (method.eps, method.alpha_255) == pytest.approx((0.05 * 127.5, 0.005 * 127.5))
    assert (method.steps, method.lr) == (250, 1e-5)
