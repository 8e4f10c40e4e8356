"""Structural pruning: remove whole channels of a network, and save and load what is left.

A channel cannot be removed from one layer alone: what feeds it, what reads it and every layer that is added to it lose
the same channel. torch-pruning (Fang et al., DepGraph, CVPR 2023) finds these groups by tracing the network; which
channels go is decided here.

A pruned network's layers are narrower than its config says, so the share that was removed is written into the config,
and a network with that entry is loaded by cutting each layer to the shapes of its weights: safetensors, no pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError

FIELD = "removed_share"
"""Entry of a network's config: share of its parameters that pruning has removed."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
Score = Callable[[Any], "Tensor | None"]
"""A torch-pruning group of coupled layers -> one number per channel; the lowest are removed. None: leave it alone."""
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pruned:
    """``removed_share``: of all parameters, from 0 to 1; ``layers``: layer -> how many of its channels were removed."""

    removed_share: float
    layers: Mapping[str, int]


def prune(
    network: nn.Module, example: Any, score: Score, ratio: float, *, respect_groupnorm: bool = True,
    ignored: tuple[nn.Module, ...] = (), output: Callable[[Any], Any] | None = None,
) -> Pruned:
    """Remove the lowest scored share ``ratio`` of every group of coupled channels, in place.

    ``example``: input for tracing. ``ignored``: layers whose outputs stay. ``output``: tensor in what the network
    returns. ``respect_groupnorm``: as in the released code of Diff-Cleanse, a width of w loses
    n = w - int(w (1 - ratio)) channels, and n rounded down to a multiple of the channel groups (norm groups, attention
    heads) where there are any, so that small ratios leave most convolutions alone; false: the share is taken within
    each channel group, at least one channel of each, as torch-pruning does today.
    """
    import torch_pruning

    if not 0 <= ratio < 1:
        raise BenchError(f"pruning: ratio={ratio} is out of range; give 0 to less than 1.")
    before, was_trained = parameter_count(network), [p.requires_grad for p in network.parameters()]
    network.requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=example, output_transform=output)
    heads = attention_heads(network)
    kinds = [nn.Conv2d, nn.Linear]
    chosen = []
    for group in graph.get_all_groups(ignored_layers=list(ignored), root_module_types=kinds):
        values = score(group)
        if values is not None:
            parts = channel_groups(group, heads)
            chosen.append((group[0].dep, lowest(values, ratio, parts, respect_groupnorm)))
    removed = {}
    for root, places in chosen:
        group = graph.get_pruning_group(root.target.module, root.handler, places)
        if places and graph.check_pruning_group(group):
            removed[graph._module2name[root.target.module]] = len(places)
            group.prune()
    settle(network)
    for weight, wanted in zip(network.parameters(), was_trained, strict=True):
        weight.requires_grad_(wanted)
        weight.grad = None
    return Pruned(1 - parameter_count(network) / before, removed)


def prune_unet(
    unet: Any, score: Score, ratio: float, respect_groupnorm: bool = True,
) -> Pruned:
    """:func:`prune` for an unconditional UNet, its last convolution left alone; its config notes what was removed."""
    side, device = unet.config.sample_size, unet.device
    example = {"sample": torch.zeros(1, unet.config.in_channels, side, side, device=device),
               "timestep": torch.zeros(1, dtype=torch.long, device=device)}
    earlier = float(unet.config.get(FIELD, 0.0))
    done = prune(unet, example, score, ratio, respect_groupnorm=respect_groupnorm, ignored=(unet.conv_out,),
                 output=lambda found: found.sample)
    unet.register_to_config(**{FIELD: 1 - (1 - earlier) * (1 - done.removed_share)})
    return done


def parameter_count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def attention_heads(network: nn.Module) -> dict[nn.Module, int]:
    """Queries, keys and values of attention blocks, and into how many heads each is split: all heads stay."""
    blocks: list[Any] = [block for block in network.modules() if hasattr(block, "heads")]
    return {layer: int(block.heads) for block in blocks for layer in (block.to_q, block.to_k, block.to_v)}


def channel_groups(group: Any, heads: Mapping[nn.Module, int]) -> int:
    """Into how many equal parts the channels must stay divisible: norm groups, convolution groups, heads."""
    layers = [dep.target.module for dep, _ in group]
    norms = [layer.num_groups for layer in layers if isinstance(layer, nn.GroupNorm)]
    return math.lcm(*norms, *[heads[layer] for layer in layers if isinstance(layer, nn.Linear) and layer in heads])


def lowest(values: Tensor, ratio: float, parts: int, respect_groupnorm: bool) -> list[int]:
    """Places of the channels to remove, of ``values`` [width]: the same ones in each of ``parts`` equal parts."""
    size = len(values) // parts
    width = len(values) if respect_groupnorm else size
    wanted = width - int(width * (1 - ratio))
    count = min(wanted // parts if respect_groupnorm else wanted, size - 1)
    order = values.view(parts, size).mean(0).argsort(stable=True)[:count]
    return sorted(int(place) + part * size for place in order for part in range(parts))


def settle(network: nn.Module) -> None:
    """Layers of diffusers that check their width are told the new one."""
    resizing: list[Any] = [module for module in network.modules() if hasattr(module, "channels")]
    for module in resizing:
        inner = getattr(module, "conv", None)
        if isinstance(inner, nn.Conv2d):
            module.channels, module.out_channels = inner.in_channels, inner.out_channels


@dataclass(frozen=True)
class Taylor:
    """First-order importance of channels: sum |w dL/dw| over a channel's weights, averaged over the coupled layers and
    divided by the group's mean (Molchanov et al., CVPR 2019). ``gradients``: by parameter name, of ``network``."""

    network: nn.Module
    gradients: Gradients

    def __call__(self, group: Any) -> Tensor | None:
        from torch_pruning.pruner.importance import GroupTaylorImportance

        for name, weight in self.network.named_parameters():
            weight.grad = self.gradients[name]
        found: Tensor | None = GroupTaylorImportance()(group)
        return found


def random_score(generator: torch.Generator) -> Score:
    """Every channel alike: which ones go is chance."""
    return lambda group: torch.rand(len(group[0].idxs), generator=generator)


def collect_gradients(network: nn.Module, losses: Iterator[Tensor]) -> dict[str, Tensor]:
    """The gradient of the sum of ``losses``, by parameter name; the network is left frozen and without gradients.

    ``losses``: made one at a time, when asked for: a frozen network is set to take gradients first.
    """
    network.requires_grad_(True)
    network.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    found = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
             for name, weight in network.named_parameters()}
    network.requires_grad_(False).zero_grad(set_to_none=True)
    return found


def is_pruned(folder: Path) -> bool:
    """Whether the network in ``folder`` says that it was pruned."""
    config = folder / "config.json"
    return config.is_file() and FIELD in json.loads(config.read_text())


def load_pruned(kind: Any, folder: Path) -> nn.Module:
    """A pruned network of class ``kind``: built by its config, cut to the shapes of its weights, float32."""
    from safetensors.torch import load_file

    config = {name: value for name, value in kind.load_config(folder).items() if name != FIELD}
    network: Any = kind.from_config(config)
    state = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
    cut_to(network, state)
    network.load_state_dict(state)
    network.register_to_config(**{FIELD: json.loads((folder / "config.json").read_text())[FIELD]})
    return network  # type: ignore[no-any-return]


def cut_to(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make every layer as narrow as its weights in ``state``; none may be wider than it is."""
    own = dict(network.named_parameters())
    for name, weight in own.items():
        if name not in state or state[name].ndim != weight.ndim or any(
                new > old for new, old in zip(state[name].shape, weight.shape)):
            raise BenchError(f"pruning: '{name}' of the checkpoint is missing or wider than its config says.")
        holder, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(holder), leaf, nn.Parameter(torch.empty_like(state[name])))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.GroupNorm):
            layer.num_channels = len(layer.weight)
    settle(network)
