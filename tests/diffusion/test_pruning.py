"""Pruning: importance against a sum done by hand, the published counts, and networks that come back from disk."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from bench.diffusion.loading import load_module, save_part
from bench.diffusion.pruning import FIELD, Taylor, collect_gradients, lowest, parameter_count, prune, prune_unet
from bench.diffusion.pruning import random_score as random_channels
from bench.errors import BenchError


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    made: UNet2DModel = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return made.eval().requires_grad_(False)


def answers(unet: UNet2DModel) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(1))
    with torch.no_grad():
        found: Tensor = unet(x, torch.tensor([3, 7])).sample
    return found


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1))


def test_taylor_importance_is_the_sum_of_weight_times_gradient_over_the_coupled_layers() -> None:
    """Channel k of the first layer: its own filter and what the second layer reads of it, both |w g|, averaged."""
    network, x = toy(), torch.randn(4, 3, 5, 5, generator=torch.manual_seed(2))
    gradients = collect_gradients(network, iter([network(x).square().mean(), network(x[:2]).mean()]))
    seen: list[Tensor] = []
    score = Taylor(network, gradients)
    prune(network, x, lambda group: seen.append(score(group)) or None, 0.5, ignored=(network[2],))  # type: ignore[func-returns-value]

    fresh = toy()
    (fresh(x).square().mean() + fresh(x[:2]).mean()).backward()  # type: ignore[no-untyped-call]
    first, second = fresh[0].weight, fresh[2].weight
    assert isinstance(first, nn.Parameter) and isinstance(second, nn.Parameter)
    assert first.grad is not None and second.grad is not None
    own = torch.stack([(first[k] * first.grad[k]).abs().sum() for k in range(6)])
    read = torch.stack([(second[:, k] * second.grad[:, k]).abs().sum() for k in range(6)])
    by_hand = (own + read) / 2
    assert len(seen) == 1 and torch.allclose(seen[0], by_hand / by_hand.mean(), rtol=1e-4)


def test_the_lowest_channels_go_and_the_rest_is_untouched() -> None:
    network, before = toy(), toy()
    scores = torch.tensor([5.0, 1.0, 4.0, 0.0, 3.0, 2.0])
    done = prune(network, torch.zeros(1, 3, 5, 5), lambda group: scores, 0.5, ignored=(network[2],))
    assert torch.equal(network[0].weight, before[0].weight[[0, 2, 4]])  # type: ignore[index]
    assert torch.equal(network[2].weight, before[2].weight[:, [0, 2, 4]])  # type: ignore[index]
    assert dict(done.layers) == {"0": 3}
    assert done.removed_share == pytest.approx(1 - parameter_count(network) / parameter_count(before))


def test_a_small_ratio_prunes_only_what_no_norm_group_holds() -> None:
    """Width 512 loses 11 at 2 %; width 256 in 32 norm groups loses none, unless the groups are not respected."""
    assert len(lowest(torch.rand(512), 0.02, 1, True)) == 11
    assert lowest(torch.rand(256), 0.02, 32, True) == []
    assert len(lowest(torch.rand(256), 0.02, 32, False)) == 32
    assert len(lowest(torch.rand(128), 0.3, 32, True)) == 32
    assert len(lowest(torch.rand(8), 0.99, 1, True)) == 7


def test_channels_go_alike_from_each_norm_group() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 9.0, 0.0, 9.0])
    assert lowest(values, 0.34, 2, True) == [1, 4]


def test_a_norm_respecting_ratio_spares_convolutions_that_feed_a_norm() -> None:
    spared, cut = tiny_unet(), tiny_unet()
    kept = prune_unet(spared, random_channels(torch.manual_seed(0)), 0.1)
    all_layers = prune_unet(cut, random_channels(torch.manual_seed(0)), 0.1, respect_groupnorm=False)
    assert set(kept.layers) < set(all_layers.layers)
    assert spared.conv_in.weight.shape == (8, 3, 3, 3) and cut.conv_in.weight.shape == (4, 3, 3, 3)
    assert {name.split(".")[0] for name in kept.layers} >= {"time_embedding"}
    assert spared.time_embedding.linear_1.out_features == 28  # of 32: 32 - int(28.8) = 4 go
    assert kept.removed_share < all_layers.removed_share


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "share", "time", "inner"), [
    (0.01, 0.0024, 6, 3), (0.02, 0.0046, 11, 6), (0.03, 0.0064, 16, 8),
])
def test_the_published_network_loses_what_the_released_pruner_takes(
    ratio: float, share: float, time: int, inner: int,
) -> None:
    """Counts that the authors' own pruner gives on the architecture of google/ddpm-cifar10-32."""
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
        norm_num_groups=32, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    done = prune_unet(unet, random_channels(torch.manual_seed(0)), ratio)
    assert done.removed_share == pytest.approx(share, abs=5e-5)
    assert sorted(done.layers.values()) == [inner] * 8 + [time] * 2


@pytest.mark.parametrize("respect_groupnorm", [True, False])
@pytest.mark.parametrize("ratio", [0.1, 0.6])
def test_a_pruned_network_comes_back_with_the_same_answers(
    tmp_path: Path, ratio: float, respect_groupnorm: bool,
) -> None:
    unet = tiny_unet()
    done = prune_unet(unet, random_channels(torch.manual_seed(0)), ratio, respect_groupnorm)
    folder = save_part(unet, tmp_path, "unet", half=False)
    loaded = load_module(folder, "diffusers", "UNet2DModel")
    assert torch.equal(answers(loaded), answers(unet))
    assert loaded.config[FIELD] == pytest.approx(done.removed_share) and done.removed_share > 0
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert [path.suffix for path in folder.iterdir() if path.name != "config.json"] == [".safetensors"]


def test_it_can_be_pruned_again_and_saved_again(tmp_path: Path) -> None:
    unet, whole = tiny_unet(), parameter_count(tiny_unet())
    prune_unet(unet, random_channels(torch.manual_seed(0)), 0.3)
    once = load_module(save_part(unet, tmp_path / "a", "unet"), "diffusers", "UNet2DModel")
    prune_unet(once, random_channels(torch.manual_seed(1)), 0.3)
    twice = load_module(save_part(once, tmp_path / "b", "unet", half=False), "diffusers", "UNet2DModel")
    assert torch.equal(answers(twice), answers(once))
    assert twice.config[FIELD] == pytest.approx(1 - parameter_count(twice) / whole)


def test_a_checkpoint_wider_than_its_config_is_refused(tmp_path: Path) -> None:
    unet = tiny_unet()
    prune_unet(unet, random_channels(torch.manual_seed(0)), 0.1)
    folder = save_part(unet, tmp_path, "unet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [4, 8]}))
    with pytest.raises(BenchError, match="wider"):
        load_module(folder, "diffusers", "UNet2DModel")


def test_a_network_without_the_mark_is_never_cut_to_fit(tmp_path: Path) -> None:
    unet = tiny_unet()
    prune_unet(unet, random_channels(torch.manual_seed(0)), 0.3)
    folder = save_part(unet, tmp_path, "unet")
    config = json.loads((folder / "config.json").read_text())
    del config[FIELD]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BenchError, match="cannot be read"):
        load_module(folder, "diffusers", "UNet2DModel")


def test_pruning_leaves_no_gradient_and_no_trainable_weight_behind() -> None:
    unet = tiny_unet()
    before = copy.deepcopy(unet)
    gradients = collect_gradients(unet, (unet(torch.ones(1, 3, 8, 8), t).sample.square().mean() for t in (3, 4)))
    assert set(gradients) == {name for name, _ in before.named_parameters()}
    assert float(gradients["conv_in.weight"].abs().sum()) > 0
    prune_unet(unet, Taylor(unet, gradients), 0.3)
    assert all(weight.grad is None and not weight.requires_grad for weight in unet.parameters())


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_bad_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(BenchError, match="ratio"):
        prune(toy(), torch.zeros(1, 3, 5, 5), lambda group: None, ratio)
