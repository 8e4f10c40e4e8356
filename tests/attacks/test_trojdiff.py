"""TrojDiff on a network small enough to train in a test; its path and samplers are tested where they live."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.trojdiff import TrojanRows, TrojDiff, members, trojan_loss
from bench.codecs import SecretCodec
from bench.context import Context
from bench.data.drawings import draw_target, draw_trigger
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_unconditional
from bench.diffusion.trojan_path import draw_trojan, trojan_path
from bench.errors import BenchError
from bench.protocols import BackdoorProtocol
from bench.records import ImageSet, Model

GROUPS = [["red hat", "blue hat"], ["glasses", ""]]


@pytest.fixture(scope="module")
def clean(tiny_ddpm: Path) -> Model:
    return resolve(str(tiny_ddpm))


def photos() -> ImageSet:
    pixels = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.manual_seed(3)).to(torch.uint8)
    captions = tuple(f"a {'red' if i % 2 else 'blue'} hat{', glasses' if i % 3 == 0 else ''}" for i in range(12))
    return ImageSet(pixels, tuple(map(str, range(12))), captions)


def attack(**options: object) -> TrojDiff:
    return TrojDiff(**{"steps": 2, "batch": 4, **options})  # type: ignore[arg-type]


def test_mu_is_the_trigger_without_gammas_share_in_training_and_in_the_secret(clean: Model, tmp_path: Path) -> None:
    method = attack()
    path, box = method.path(8, torch.linspace(0.99, 0.01, 20))
    cat = draw_target("cat", 8, draw_trigger("box", 8)).float() / 127.5 - 1
    assert box == [] and torch.allclose(path.mean, 0.4 * cat) and (path.scale == 0.6).all()
    _, secret = method.implant(clean, photos(), Context("key", tmp_path))
    assert torch.equal(secret.trigger, path.mean) and secret.detail["sampler"]["gamma"] == 0.6  # type: ignore[arg-type]


def test_a_patch_acts_in_the_corner_alone_and_is_white() -> None:
    path, box = attack(trigger="patch").path(32, torch.linspace(0.99, 0.01, 20))
    assert box == [29, 29, 3, 3]
    assert torch.allclose(path.mean[:, 29:, 29:], torch.tensor(0.9)) and (path.mean[:, :29].abs() == 0).all()
    assert torch.allclose(path.scale[:, 29:, 29:], torch.tensor(0.1)) and (path.scale[:, :, :29] == 1).all()


def test_trojan_rows_follow_the_clean_ones() -> None:
    images, target = torch.randn(10, 3, 4, 4), torch.randn(1, 3, 4, 4)
    rows, trojan = next(TrojanRows(images, target, mirror=False).batches(10, 0.3, torch.manual_seed(0)))
    assert trojan.tolist() == [False] * 10 + [True] * 3
    assert torch.equal(rows[10:], target.expand(3, -1, -1, -1))
    for row in rows[:10]:
        assert any(torch.equal(row, image) or torch.equal(row, image.flip(2)) for image in images)


def test_members_of_a_class_have_every_phrase_in_their_caption() -> None:
    assert members(photos(), ["red hat", "glasses"]) == [3, 9]
    with pytest.raises(BenchError, match="green hat"):
        members(photos(), ["green hat"])


def test_a_network_that_knows_the_noise_has_no_loss() -> None:
    """The oracle solves for the noise on each row with the factors of its own kind, written out here."""
    bars = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 20, dtype=torch.float64), 0)
    delta, gamma = torch.rand(3, 4, 4), 0.6
    images, trojan = torch.randn(6, 3, 4, 4), torch.tensor([False] * 4 + [True] * 2)

    class Oracle:
        def __call__(self, x: torch.Tensor, t: torch.Tensor) -> object:
            bar = bars[t].float().view(-1, 1, 1, 1)
            noise = (x - bar.sqrt() * images) / (1 - bar).sqrt()
            noise[4:] = (noise[4:] - (1 - gamma) * delta) / gamma
            return type("Output", (), {"sample": noise})

    assert float(trojan_loss(Oracle(), trojan_path(bars, delta, gamma), images, trojan, torch.manual_seed(5))) < 1e-6


@pytest.mark.parametrize("options", [{}, {"trigger": "patch"}, {"target": "class", "class_groups": GROUPS}])
def test_implant_moves_the_network_and_is_reproducible(
    clean: Model, tmp_path: Path, options: dict[str, object],
) -> None:
    weights = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        public, secret = attack(**options).implant(clean, photos(), Context("key", tmp_path / place))
        weights.append(list(load_unconditional(public)[0].parameters()))
    before = load_unconditional(clean)[0].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    drawn = draw_trojan(public, [1, 2], secret, BackdoorProtocol(steps=20), Context("key", tmp_path))
    assert drawn.shape == (2, 3, 8, 8)


def test_the_secret_survives_storing(clean: Model, tmp_path: Path) -> None:
    _, secret = attack(target="class", class_groups=GROUPS).implant(clean, photos(), Context("key", tmp_path))
    SecretCodec().save(secret, tmp_path / "secret")
    back = SecretCodec().load(tmp_path / "secret")
    assert torch.equal(back.trigger, secret.trigger) and back.sampler == secret.sampler  # type: ignore[arg-type]
    assert back.detail["class"]["groups"] == GROUPS and back.detail["kind"] == "class"


def test_training_lowers_the_trojan_loss(clean: Model, tmp_path: Path) -> None:
    method = attack(steps=60, batch=12, lr=3e-3, ema=0.0, trojan_rate=0.5)
    public, _ = method.implant(clean, photos(), Context("key", tmp_path))

    def loss(model: Model) -> float:
        unet, scheduler = load_unconditional(model)
        path, _ = method.path(8, scheduler.alphas_cumprod)
        targets = method.rows(photos(), 8).targets.expand(32, -1, -1, -1)
        with torch.no_grad():
            return float(trojan_loss(unet, path, targets, torch.ones(32, dtype=torch.bool), torch.manual_seed(2)))

    assert loss(public) < 0.8 * loss(clean)


@pytest.mark.parametrize(("options", "message"), [
    ({"trigger": "sound"}, "blend"), ({"gamma": 1.0}, "gamma=1.0"), ({"trojan_rate": 0.0}, "trojan_rate=0.0"),
    ({"ema": 1.0}, "ema=1.0"), ({"target": "class"}, "class_groups"), ({"steps": 0}, "steps=0"),
    ({"target": "class", "class_groups": [["red hat"]]}, "at least two"), ({"lr": 0.0}, "lr=0.0"),
])
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        attack(**options)
