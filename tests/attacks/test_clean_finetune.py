"""The control without a backdoor: BadDiffusion's training when nothing is poisoned."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks.baddiffusion import BadDiffusion
from attacks.clean_finetune import CleanFinetune
from bench.context import Context
from bench.data.drawings import draw_target, draw_trigger
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_unconditional
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model
from bench.testing.pipelines import save_ddpm


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return resolve(str(save_ddpm(tmp_path_factory.mktemp("ddpm"), size=16)))


def photos() -> ImageSet:
    pixels = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.manual_seed(3)).to(torch.uint8)
    return ImageSet(pixels, tuple(map(str, range(12))))


def trained(attack: Any, clean: Model, folder: Path) -> tuple[list[torch.Tensor], Any]:
    folder.mkdir()
    public, secret = attack.implant(clean, photos(), Context("key", folder))
    assert public.digest != clean.digest
    return list(load_unconditional(public)[0].parameters()), secret


def test_it_is_baddiffusion_with_its_poisoned_row_taken_out(
    clean: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The attack poisons one image at least; without that one, bit for bit the same weights come out."""
    options: dict[str, Any] = {"steps": 4, "batch": 6, "warmup": 1, "trigger_size": 6, "mixed_precision": False}
    control, _ = trained(CleanFinetune(**options), clean, tmp_path / "control")
    poisoned, _ = trained(BadDiffusion(poison_rate=0.01, **options), clean, tmp_path / "poisoned")
    assert any(not torch.equal(a, b) for a, b in zip(control, poisoned, strict=True))

    from bench.diffusion import poisoning

    real = poisoning.poison

    def nothing(*given: Any) -> Any:
        rows = real(*given)
        rows.poisoned[:] = False
        return rows

    monkeypatch.setattr(poisoning, "poison", nothing)
    spared, _ = trained(BadDiffusion(poison_rate=0.01, **options), clean, tmp_path / "spared")
    assert all(torch.equal(a, b) for a, b in zip(control, spared, strict=True))


def test_its_secret_is_what_an_attack_would_use(clean: Model, tmp_path: Path) -> None:
    _, secret = trained(CleanFinetune(steps=1, batch=2, trigger="glasses", target="cat"), clean, tmp_path / "one")
    trigger = draw_trigger("glasses", 16)
    assert torch.equal(secret.trigger, trigger) and torch.equal(secret.target, draw_target("cat", 16, trigger))
    assert secret.detail["poisoned"] is False


def test_it_shares_the_attacks_options_and_defaults_and_is_a_control() -> None:
    attack = BadDiffusion()
    assert all(getattr(attack, f.name) == f.default for f in fields(CleanFinetune))
    left_out = {f.name for f in fields(BadDiffusion)} - {f.name for f in fields(CleanFinetune)}
    assert left_out == {"poison_rate", "paste", "sampling_steps"}
    assert facts_of(CleanFinetune).control and not facts_of(BadDiffusion).control


def test_images_of_another_size_are_refused(clean: Model, tmp_path: Path) -> None:
    small = ImageSet(photos().pixels[:, :, :8, :8], photos().names)
    with pytest.raises(BenchError, match="data.size=16"):
        CleanFinetune(steps=1).implant(clean, small, Context("key", tmp_path))


def test_its_preset_trains_as_long_as_the_attacks() -> None:
    """Otherwise a detector could tell models by how long they were trained."""
    from omegaconf import OmegaConf

    folder = Path(__file__).parents[2] / "conf/attack"
    control = dict(OmegaConf.load(folder / "clean_finetune_quick.yaml"))
    base, quick = (dict(OmegaConf.load(folder / f"baddiffusion_{name}.yaml")) for name in ("micro", "quick"))
    attack = base | quick
    shared = {f.name for f in fields(CleanFinetune)} & control.keys()
    assert shared >= {"steps", "batch", "lr", "warmup"}
    assert {name: control[name] for name in shared} == {name: attack[name] for name in shared}
