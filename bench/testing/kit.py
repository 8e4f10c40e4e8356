"""The conformance kit: the checks that every plugin must pass, as one pytest test.

In the tests of a plugin::

    from bench.testing import conformance

    test_mine = conformance("mine")

pytest then shows one test per check, ``test_mine[budget]``, and each failure says what to do. The checks run on random
models of a few thousand weights and on the drawn world, in seconds, without a GPU or a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import discovery
from bench.compat import SERVED_BY_MODEL
from bench.errors import BenchError, unknown
from bench.plugin import REGISTRY, facts_of
from bench.testing import declared
from bench.testing.case import Case, Check

DECLARED: dict[str, Check] = {
    "facts": declared.check_facts, "methods": declared.check_methods, "options": declared.check_options,
    "bad_input": declared.check_bad_input, "cheap_import": declared.check_cheap_import,
}
PHOTO_DEFENSES = ("output", "determinism", "seed", "budget", "order")
MODEL_DEFENSES = ("output", "determinism", "seed")
ATTACKS = {
    "customization": ("customises", "customise_determinism", "customise_seed", "customise_photos"),
    "editing": ("edits", "edits_apart"),
    "backdoor": ("implants", "implant_determinism", "implant_seed"),
}
METRICS = ("values", "direction", "determinism", "order", "degenerate", "foreign")


def conformance(
    plugin: str | type, *, options: Mapping[str, Any] | None = None, apart: bool = False, negative: Sequence[str] = (),
    bad: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[..., None]:
    """A pytest test with one case per check that fits the plugin; bind it to a name that starts with ``test``.

    ``plugin``: its class, its name, or ``<kind>/<name>`` where kinds share the name. ``options``: settings that make it
    fast on tiny models, say ``{"steps": 2}``. ``apart``: of a defense of photos, also check that a photo is protected
    alone as it is among the person's others. ``negative``: numeric options that may be below zero. ``bad``: option ->
    further values that must be refused. Raises BenchError for a plugin that is not installed and an unknown option.
    """
    import pytest

    cls: Any = plugin if isinstance(plugin, type) else find(plugin)
    case = Case(cls, dict(options or {}), apart, tuple(negative), dict(bad or {}))
    for option in (*case.options, *case.negative, *case.bad):
        if option not in (known := [field.name for field in fields(cls)]):
            raise unknown("option", option, f"conformance of {case.name}", known)

    checks = checks_of(case)

    @pytest.mark.parametrize("check", list(checks.values()), ids=list(checks))
    def test(check: Check, tmp_path: Path) -> None:
        __tracebackhide__ = True
        check(case, tmp_path)

    return test


def find(name: str) -> type:
    """A plugin's class by name, or by kind and name."""
    discovery.load()
    kind, _, bare = name.rpartition("/")
    found = sorted(key for key in REGISTRY.classes if key[1] == bare and kind in ("", key[0]))
    if len(found) == 1:
        return REGISTRY.classes[found[0]]
    if found:
        raise BenchError(f"conformance: '{name}' is a name of {' and '.join(k for k, _ in found)}; give "
                         f"{' or '.join('/'.join(key) for key in found)}.")
    discovery.raise_if_broken(bare)
    raise unknown("plugin", name, "conformance (is its package installed? pip install -e .)",
                  [bare for _, bare in REGISTRY.classes])


def checks_of(case: Case) -> dict[str, Check]:
    """The checks that fit a plugin by what it declares, by name."""
    facts, kind = facts_of(case.cls), facts_of(case.cls).kind
    if kind == "metric":
        return {**DECLARED, **_checks("metrics", METRICS)}
    if kind == "attack":
        return {**DECLARED, **_checks("attacks", ATTACKS[facts.track[0]])}
    if kind == "defense" and hasattr(case.cls, "protect"):
        return {**DECLARED, **_checks("photo_defenses", photo_checks(case))}
    if kind == "defense":
        return {**DECLARED, **_checks("model_defenses", model_checks(case))}
    if kind == "data":  # checked when it is read: its folder may not be there yet
        return {name: check for name, check in DECLARED.items() if name != "bad_input"}
    return dict(DECLARED)


def photo_checks(case: Case) -> list[str]:
    found = [*PHOTO_DEFENSES, *(["photos_apart"] if case.apart else [])]
    found += [] if case.facts.control else ["moves_pixels"]
    return [*found, "follows_model"] if set(case.facts.needs) & set(SERVED_BY_MODEL) else found


def model_checks(case: Case) -> list[str]:
    found = [*MODEL_DEFENSES, *(["scores"] if hasattr(case.cls, "score_inputs") else [])]
    return found if case.facts.control else [*found, "does_something"]


def _checks(module: str, names: Sequence[str]) -> dict[str, Check]:
    """Checks of a module that imports torch: found when they run."""
    return {name: _later(f"bench.testing.{module}", f"check_{name}") for name in names}


def _later(module: str, name: str) -> Check:
    def check(case: Case, folder: Path) -> None:
        __tracebackhide__ = True
        getattr(import_module(module), name)(case, folder)

    return check
