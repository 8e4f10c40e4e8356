"""Recorded attention maps equal a reference attention, carry gradients, and leave the network as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.diffusion.attention import latent_fractions, recorded
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_components


@pytest.fixture
def unet(tiny_sd: Path) -> Any:
    return load_components(resolve(str(tiny_sd))).unet


def reference(attn: Any, x: Tensor, context: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) written out, averaged over heads: [n, queries, keys]."""
    q, k = attn.to_q(x), attn.to_k(context)
    heads, d = attn.heads, q.shape[-1] // attn.heads
    q, k = (t.reshape(len(t), -1, heads, d).permute(0, 2, 1, 3) for t in (q, k))
    return torch.softmax(torch.einsum("nhqd,nhkd->nhqk", q, k) / d**0.5, dim=-1).mean(1)


def passed(unet: Any, latents: Tensor, states: Tensor) -> Tensor:
    return unet(latents, torch.tensor([5, 7]), states).sample


def test_maps_equal_a_reference_attention(unet: Any) -> None:
    torch.manual_seed(0)
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 32, 16)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            context = kwargs.get("encoder_hidden_states")
            seen[name] = (args[0], args[0] if context is None else context)
        return hook

    layers = {name: unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors}
    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    with recorded(unet) as maps:
        passed(unet, latents, states)
    for hook in hooks:
        hook.remove()
    found = maps.cross | maps.self
    assert set(found) == set(layers)
    for name, probabilities in found.items():
        assert torch.allclose(probabilities, reference(layers[name], *seen[name]), atol=1e-6)


def test_the_output_stays_the_same_and_the_processors_come_back(unet: Any) -> None:
    torch.manual_seed(0)
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 32, 16)
    before, plain = dict(unet.attn_processors), passed(unet, latents, states)
    with recorded(unet):
        inside = passed(unet, latents, states)
    assert torch.allclose(plain, inside, atol=1e-5)
    assert unet.attn_processors == before


def test_a_gradient_flows_from_the_maps_to_the_latents(unet: Any) -> None:
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    with recorded(unet) as maps:
        passed(unet, latents, torch.randn(2, 32, 16))
    for kept in (maps.cross, maps.self):
        gradient = torch.autograd.grad(sum(m.square().sum() for m in kept.values()), latents, retain_graph=True)[0]
        assert gradient.abs().sum() > 0


def test_only_the_wanted_sides_are_kept(unet: Any) -> None:
    with recorded(unet, latent_fractions(8, (2,))) as maps:
        passed(unet, torch.randn(2, 4, 8, 8), torch.randn(2, 32, 16))
    assert all(m.shape[1] == 16 for m in (maps.cross | maps.self).values())
