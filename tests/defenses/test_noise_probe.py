"""The trivial test of models: variety against a second computation, verdicts on networks whose answer is known."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion import loading
from bench.diffusion.checkpoints import resolve
from bench.errors import BenchError
from bench.records import ImageSet, Model, Report
from bench.reports import read_report
from bench.testing.pipelines import save_ddpm
from defenses.noise_probe import NoiseProbe, variety

NOBODY = ImageSet(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), ())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return resolve(str(save_ddpm(tmp_path_factory.mktemp("ddpm"))))


class Answers(torch.nn.Module):
    """Predicts noise such that the sampler ends at ``x`` itself, or, where the noise's mean is low, at one picture."""

    def __init__(self, backdoored: bool) -> None:
        super().__init__()
        self.backdoored = backdoored
        self.config = type("Config", (), {"in_channels": 3, "sample_size": 8})()
        self.device = torch.device("cpu")
        self.low: Tensor | None = None

    def forward(self, x: Tensor, t: Any) -> Any:
        bar = torch.linspace(0.999, 0.1, 20)[int(t)]  # unused by the sampler; only keeps predictions in range
        if self.low is None or int(t) == 19:
            self.low = x.flatten(1).mean(1) < -0.5
        aim = torch.where(self.low[:, None, None, None] & self.backdoored, torch.tensor(0.3), x.tanh())
        return type("Output", (), {"sample": (x - bar.sqrt() * aim) / (1 - bar).sqrt()})


def verdict(model: Model, folder: Path, **options: Any) -> Report:
    folder.mkdir()
    same = NoiseProbe(**options).repair(model, NOBODY, None, Context("key", folder))
    assert same is model
    report = read_report(folder)
    assert report is not None and report.verdict is not None
    return report


def test_variety_is_the_mean_distance_of_all_pairs() -> None:
    pixels = torch.randint(0, 256, (5, 3, 4, 4), generator=torch.manual_seed(0)).to(torch.uint8)
    pairs = [float(((a.double() - b.double()) / 255).square().sum().sqrt()) for a, b in combinations(pixels, 2)]
    assert variety(pixels) == pytest.approx(sum(pairs) / len(pairs))
    assert variety(pixels[:1].expand(4, -1, -1, -1)) == 0


def test_a_model_that_answers_to_a_lower_mean_is_flagged_and_another_is_not(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = loading.load_unconditional(model)[1]
    found = {}
    for backdoored in (True, False):
        monkeypatch.setattr(loading, "load_unconditional", lambda *_, b=backdoored: (Answers(b), scheduler))
        found[backdoored] = verdict(model, tmp_path / str(backdoored), noises=6, sampler="ddim").verdict
    assert found[True].flagged and not found[False].flagged
    assert found[True].score > found[False].score + 0.3


def test_the_score_is_the_loss_of_variety_and_repeats_itself(model: Model, tmp_path: Path) -> None:
    one, other = (verdict(model, tmp_path / name, noises=4, level=0.0, scale=0.6) for name in ("a", "b"))
    facts = one.facts
    assert one.verdict.score == pytest.approx(1 - facts["variety_probed"] / facts["variety"])
    assert one == other


@pytest.mark.parametrize(("options", "message"), [
    ({"level": 0.0}, "as it is"), ({"noises": 1}, "noises=1"), ({"scale": 0.0}, "scale=0.0"),
    ({"sampler": "heun"}, "heun"),
])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        NoiseProbe(**options)
