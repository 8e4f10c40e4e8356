"""The conformance kit on plugins with one fault each: every check finds its own, and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import discovery
from bench.errors import BenchError
from bench.plugin import REGISTRY, plugin
from bench.records import Budget, Customised, Measurement, Row
from bench.testing import conformance
from bench.testing.case import Case
from bench.testing.kit import checks_of, find

Declare = Callable[..., Case]
IMAGES: dict[str, Any] = {"kind": "defense", "track": ("customization",), "acts_on": "images", "paper": "unpublished"}
MODELS: dict[str, Any] = {"kind": "defense", "track": ("backdoor",), "acts_on": "model", "paper": "unpublished"}
ATTACK: dict[str, Any] = {"kind": "attack", "track": ("customization",), "paper": "unpublished"}
EDITOR: dict[str, Any] = {"kind": "attack", "track": ("editing",), "paper": "unpublished"}
METRIC: dict[str, Any] = {"kind": "metric", "track": ("customization",), "paper": "unpublished"}


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Declare:
    """A case of a class, declared in a registry that ends with the test."""
    discovery.load()  # before the registry is copied: it loads once per process
    monkeypatch.setattr(REGISTRY, "facts", dict(REGISTRY.facts))
    monkeypatch.setattr(REGISTRY, "classes", dict(REGISTRY.classes))

    def make(cls: type, facts: dict[str, Any], **case: Any) -> Case:
        told = dict(facts)
        return Case(plugin(told.pop("kind"), f"kit_{cls.__name__.lower()}", **told)(cls), **case)

    return make


def fails(case: Case, check: str, folder: Path, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        checks_of(case)[check](case, folder)


@dataclass
class Good:
    """Moves every value up or down by a level of its own photo's coin."""

    eps: float = 8.0

    def __post_init__(self) -> None:
        Budget(self.eps)

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects, model, ctx):
        return [replace(s.published, pixels=self.moved(s, ctx)) for s in subjects]

    def moved(self, subject, ctx):
        coins = [self.coin(photo, ctx, subject.name, name)
                 for photo, name in zip(subject.published.pixels, subject.published.names)]
        return (subject.published.pixels.int() + torch.stack(coins)).clamp(0, 255).to(torch.uint8)

    def coin(self, photo, ctx, *names):
        return torch.randint(2, photo.shape, generator=ctx.generator(*names), dtype=torch.int32) * 2 - 1


def test_a_good_defense_passes_every_check(declare: Declare, tmp_path: Path) -> None:
    case = declare(Good, IMAGES, apart=True)
    checks = checks_of(case)
    assert {"budget", "order", "photos_apart", "moves_pixels", "bad_input", "facts"} <= set(checks)
    assert "follows_model" not in checks
    for name in set(checks) - {"cheap_import"}:
        checks[name](case, tmp_path)


class Floats(Good):
    """Forgets to round."""

    def moved(self, subject, ctx):
        return subject.published.pixels / 255


class Scribbles(Good):
    """Writes into its input."""

    def moved(self, subject, ctx):
        return subject.published.pixels.bitwise_xor_(torch.tensor(1, dtype=torch.uint8))


class Careless(Good):
    """Draws from the process-wide generator."""

    def coin(self, photo, ctx, *names):
        return torch.randint(2, photo.shape, dtype=torch.int32) * 2 - 1


class Deaf(Good):
    """Asks for randomness and uses none."""

    def coin(self, photo, ctx, *names):
        return ctx.generator(*names) and torch.ones(photo.shape, dtype=torch.int32)


class Beyond(Good):
    """Rounds up."""

    def coin(self, photo, ctx, *names):
        return super().coin(photo, ctx, *names) * (int(self.eps) + 1)


class InTurn(Good):
    """One generator for everybody."""

    def protect(self, subjects, model, ctx):
        self.shared = ctx.generator("all")
        return super().protect(subjects, model, ctx)

    def coin(self, photo, ctx, *names):
        return torch.randint(2, photo.shape, generator=self.shared, dtype=torch.int32) * 2 - 1


class ByPerson(Good):
    """One generator for a person's photos."""

    def moved(self, subject, ctx):
        pixels = subject.published.pixels
        return (pixels.int() + self.coin(pixels, ctx, subject.name)).clamp(0, 255).byte()


class Lost(Good):
    """Its gradient never arrives."""

    def coin(self, photo, ctx, *names):
        return torch.zeros(photo.shape, dtype=torch.int32)


@pytest.mark.parametrize(("cls", "check", "message"), [
    (Floats, "output", "quantise_within"), (Scribbles, "output", "work on a clone"),
    (Careless, "determinism", r"draw from ctx\.generator"), (Deaf, "seed", "another key gives the same photos"),
    (Beyond, "budget", "over its budget of 1"), (InTurn, "order", "generator of its own"),
    (ByPerson, "photos_apart", r"ctx\.generator\(subject\.name, photo_name\)"), (Lost, "moves_pixels", "unchanged"),
])
def test_faults_of_photo_defenses_are_found(
    cls: type, check: str, message: str, declare: Declare, tmp_path: Path,
) -> None:
    fails(declare(cls, IMAGES, apart=True), check, tmp_path, message)


def test_a_need_of_the_model_that_is_not_used_is_found(declare: Declare, tmp_path: Path) -> None:
    fails(declare(Good, {**IMAGES, "needs": ("latents",)}), "follows_model", tmp_path, "another model gives the same")


@pytest.mark.parametrize(("changed", "message"), [
    ({"paper": ""}, "paper is empty"), ({"needs": ("latnets",)}, "'latnets', which nothing reads"),
    ({"knows": ("everything",)}, "knows holds 'everything'"), ({"track": ("backdoor",)}, "make the two agree"),
    ({"track": ()}, "at least one track"), ({"version": 0}, "start at 1"),
])
def test_facts_that_do_not_hold_are_found(
    changed: dict[str, Any], message: str, declare: Declare, tmp_path: Path,
) -> None:
    fails(declare(Good, {**IMAGES, **changed}), "facts", tmp_path, message)


def test_methods_are_compared_with_the_contract(declare: Declare, tmp_path: Path) -> None:
    class Short(Good):
        """Too few parameters."""

        def protect(self, subjects, ctx):
            return []

    class Bare:
        """No budget."""

        def protect(self, subjects, model, ctx):
            return []

    fails(declare(Short, IMAGES), "methods", tmp_path, r"cannot be called .* write protect\(self, subjects")
    fails(declare(Bare, IMAGES), "methods", tmp_path, "has no method budget")


def test_options_that_are_not_refused_are_found(declare: Declare, tmp_path: Path) -> None:
    class Lenient(Good):
        """Takes any number of steps."""

        steps: int | None = 3
        offset: float = 0.0

    class Terse(Good):
        """Refuses without help."""

        def __post_init__(self) -> None:
            if self.eps < 0:
                raise BenchError(f"eps={self.eps}!")

    class Foreign(Good):
        """Refuses with an error of its own."""

        def __post_init__(self) -> None:
            if self.eps < 0:
                raise ValueError(self.eps)

    fails(declare(Lenient, IMAGES), "bad_input", tmp_path, r"steps=-1\) is accepted; check it in __post_init__")
    fails(declare(Lenient, IMAGES, negative=("steps",)), "bad_input", tmp_path, r"offset=-1\.0\) is accepted")
    spared = declare(Lenient, IMAGES, negative=("steps", "offset"), bad={"steps": ["many"]})
    fails(spared, "bad_input", tmp_path, r"steps='many'\) is accepted")
    fails(declare(Terse, IMAGES), "bad_input", tmp_path, "does not say what is valid")
    fails(declare(Foreign, IMAGES), "bad_input", tmp_path, "raises ValueError; raise a bench.errors.BenchError")


def test_an_import_that_is_not_cheap_is_found(declare: Declare, tmp_path: Path) -> None:
    fails(declare(Good, IMAGES), "cheap_import", tmp_path, "imports torch.* move these imports into the functions")
    case = Case(find("noise"))
    checks_of(case)["cheap_import"](case, tmp_path)


def test_faults_of_model_defenses_are_found(declare: Declare, tmp_path: Path) -> None:
    class Idle:
        """Does nothing."""

        def repair(self, suspicious, data, secret, ctx):
            return suspicious

    class Shaken(Idle):
        """Draws from the process-wide generator, and scores inputs by their neighbours."""

        def repair(self, suspicious, data, secret, ctx):
            from bench.diffusion.loading import load_unconditional, save_part

            unet = load_unconditional(suspicious)[0]
            for weight in unet.parameters():
                weight += torch.randn(weight.shape)
            return replace(suspicious, parts={"unet": save_part(unet, ctx.folder, "unet")})

        def score_inputs(self, model, inputs, report, ctx):
            return inputs.mean((1, 2, 3)).cumsum(0)

    fails(declare(Idle, MODELS), "does_something", tmp_path, "comes back as it was")
    shaken = declare(Shaken, MODELS)
    checks_of(shaken)["output"](shaken, tmp_path)
    fails(shaken, "determinism", tmp_path, "other weights")
    fails(shaken, "scores", tmp_path, "score each input by itself")


def test_faults_of_attacks_are_found(declare: Declare, tmp_path: Path) -> None:
    class Idle:
        """Learns nothing."""

        def customise(self, photos, class_noun, model, ctx):
            return Customised(model, "sks")

    class Painter:
        """Ignores seeds, and looks at the others."""

        def edit(self, photos, edits, seeds, model, protocol, ctx):
            mean = photos.pixels.float().mean(0, keepdim=True)
            return ((photos.pixels.float() + mean) / 2).byte()

    fails(declare(Idle, ATTACK), "customises", tmp_path, "left with the clean model")
    fails(declare(Idle, ATTACK), "customise_photos", tmp_path, "learns the same from another person's photos")
    fails(declare(Painter, EDITOR), "edits", tmp_path, "other seeds give the same pictures")
    fails(declare(Painter, EDITOR), "edits_apart", tmp_path, "alone is .* levels from")


def test_faults_of_metrics_are_found(declare: Declare, tmp_path: Path) -> None:
    class Spread:
        """Brightness of the first subject, relative to the contrast of all."""

        def measure(self, evidence, ctx):
            first = evidence.generated[evidence.subjects[0].name].images.pixels.double()
            value = float(first.mean() / first.std())
            return [Measurement("spread", value, 1, "", None, rows=(Row("a", "a", value),))]

    class Fragile(Spread):
        """Divides by nothing, and changes its mind."""

        def measure(self, evidence, ctx):
            pictures = torch.cat([g.images.pixels for g in evidence.generated.values()])
            value = 1 / int(pictures.sum() > 0)
            return [Measurement("fragile", value, 1, "", None)]

    class Turning(Spread):
        """Prefers dark pictures to be bright."""

        def measure(self, evidence, ctx):
            bright = any(bool(g.images.pixels.any()) for g in evidence.generated.values())
            return [Measurement("turning", 1.0, 1, "", bright)]

    spread = declare(Spread, METRIC)
    checks_of(spread)["values"](spread, tmp_path)
    fails(spread, "order", tmp_path, "opposite order; pair by name")
    fails(spread, "degenerate", tmp_path, "not finite; give None with a reason")
    fails(spread, "foreign", tmp_path, "raises AttributeError on (editing|backdoor) evidence")
    fails(declare(Fragile, METRIC), "degenerate", tmp_path, "raises ZeroDivisionError on black pictures")
    fails(declare(Turning, METRIC), "direction", tmp_path, "state them once")


def test_plugins_are_found_by_name_and_options_checked() -> None:
    assert find("noise").__name__ == "SignNoise"
    with pytest.raises(BenchError, match="name of defense and purifier; give defense/none or purifier/none"):
        find("none")
    with pytest.raises(BenchError, match=r"unknown plugin 'niose'\. Did you mean noise"):
        find("niose")
    with pytest.raises(BenchError, match=r"unknown option 'epsilon'.*Valid: eps"):
        conformance("noise", options={"epsilon": 3})
