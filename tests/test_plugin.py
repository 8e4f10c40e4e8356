"""Declaring a plugin: it is a dataclass, a registry entry and a Hydra schema at once."""

from __future__ import annotations

from enum import Enum
from types import ModuleType

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from bench.errors import BenchError
from bench.plugin import REGISTRY, changed, facts_of, identity, parameters, plugin
from tests import fakes


@pytest.fixture(autouse=True)
def _own_registry(fakes: ModuleType) -> None:
    """What a test declares is forgotten after it."""


def test_a_plugin_is_a_dataclass_with_facts_from_its_docstring() -> None:
    facts = facts_of(fakes.FakeShield)
    assert fakes.FakeShield(eps=2).eps == 2
    assert (facts.kind, facts.name, facts.track) == ("defense", "fake_shield", ("customization",))
    assert facts.summary == "Protects nothing, quickly."
    assert REGISTRY.get("defense", "fake_shield") is fakes.FakeShield


def test_its_options_are_typed_by_hydra_even_as_string_annotations() -> None:
    schema = ConfigStore.instance().load("defense/fake_shield.yaml").node
    merged = OmegaConf.merge(schema, {"eps": "8", "steps": 3, "variant": "released", "layers": ["c"]})
    made = OmegaConf.to_object(merged)
    assert made == fakes.FakeShield(8.0, 3, fakes.Variant.released, ["c"])
    assert isinstance(made, fakes.FakeShield)
    with pytest.raises(Exception, match="could not be converted"):
        OmegaConf.merge(schema, {"eps": "wide"})


def test_a_metric_is_stored_below_the_list_of_metrics() -> None:
    assert ConfigStore.instance().load("metrics/fake_score.yaml").package == "metrics.fake_score"


def test_a_taken_name_is_refused_and_names_both_owners() -> None:
    with pytest.raises(BenchError, match=r"defense 'fake_shield' of .*Again.* taken by tests\.fakes:FakeShield"):
        @plugin("defense", "fake_shield")
        class Again:
            """Another one."""

    assert REGISTRY.get("defense", "fake_shield") is fakes.FakeShield


def test_an_option_that_no_config_can_hold_registers_nothing() -> None:
    with pytest.raises(Exception, match="not a valid input"):
        @plugin("defense", "fake_odd")
        class Odd:
            """Holds a thing."""

            thing: Enum = object()  # type: ignore[assignment]

    assert "fake_odd" not in REGISTRY.names("defense")


@pytest.mark.parametrize(("kind", "track", "said"), [
    ("defence", ("customization",), "unknown kind 'defence'. Did you mean defense"),
    ("defense", ("personalization",), "unknown track 'personalization'"),
])
def test_a_wrong_kind_or_track_is_refused(kind: str, track: tuple[str, ...], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        plugin(kind, "fake_new", track=track)


def test_identity_holds_every_option_and_changed_only_the_others() -> None:
    made = fakes.FakeShield(eps=8.0)
    assert identity(made) == {"kind": "defense", "name": "fake_shield", "version": 1, "parameters": parameters(made)}
    assert parameters(made) == {"eps": 8.0, "steps": None, "variant": "described", "layers": ["a", "b"]}
    assert changed(made) == {"eps": 8.0}


def test_an_option_that_came_later_changes_no_key_until_it_is_used() -> None:
    from attacks.badt2i import BadT2I

    before = {name: value for name, value in parameters(BadT2I(cosine=True)).items() if name != "cosine"}
    assert parameters(BadT2I()) == before
    assert identity(BadT2I()) != identity(BadT2I(cosine=True))
