"""Checks of what a plugin declares: facts, methods, options and what its import costs. None of them runs a model."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from bench.compat import ACTS_ON, SERVED_BY_MODEL
from bench.config import SERVED_BY_DATA
from bench.errors import BenchError
from bench.identity import canonical_json
from bench.plugin import (
    CustomizationAttack,
    Data,
    Editor,
    Facts,
    ImageDefense,
    Implant,
    Metric,
    ModelDefense,
    Purifier,
    identity,
)
from bench.testing.case import Case, expect

NEEDS = {*SERVED_BY_MODEL, *SERVED_BY_DATA, "induced_samples"}
KNOWS = {"prompt", "trigger", "purifier", "mask"}
HEAVY = ("torch", "diffusers", "transformers", "peft", "wandb", "pandas", "scipy", "torchmetrics", "torchvision")
ATTACKS: dict[str, type] = {"customization": CustomizationAttack, "editing": Editor, "backdoor": Implant}
OTHERS: dict[str, type] = {"metric": Metric, "purifier": Purifier, "data": Data}
ADVICE = r"\b(give|valid|choose|take|name|use|must|set)\b"
"""A refusal that helps says what is right with one of these words."""


def contract(facts: Facts) -> type:
    """The protocol in `bench.plugin` that a plugin must follow."""
    if facts.kind == "defense":
        return ImageDefense if facts.acts_on == "images" else ModelDefense
    return ATTACKS[facts.track[0]] if facts.kind == "attack" else OTHERS[facts.kind]


def check_facts(case: Case, folder: Path) -> None:
    facts = case.facts
    where = f"@plugin of {facts.name}"
    expect(bool(facts.summary), f"{where}: write a docstring; its first paragraph is what `bench list` shows.")
    expect(bool(facts.track), f"{where}: track=() can be used nowhere; name at least one track.")
    expect(bool(facts.paper) or facts.control or facts.kind not in ("defense", "attack"),
           f"{where}: paper is empty; give authors, title, venue and year, or 'unpublished'.")
    expect(facts.version >= 1, f"{where}: version={facts.version}; start at 1, and raise it when results change.")
    for name, found, known in (("needs", facts.needs, NEEDS), ("knows", facts.knows, KNOWS)):
        for word in found:
            expect(word in known, f"{where}: {name} holds '{word}', which nothing reads; valid: {sorted(known)}.")
    if facts.kind == "attack":
        expect(len(facts.track) == 1, f"{where}: an attack belongs to one track, not to {facts.track}; write one "
                                      "plugin for each.")
    if facts.kind == "defense":
        wanted = {ACTS_ON[track] for track in facts.track}
        expect(not facts.acts_on or wanted == {facts.acts_on},
               f"{where}: acts_on='{facts.acts_on}', but defenses of the {' and '.join(facts.track)} track act on "
               f"{' and '.join(sorted(wanted))}; make the two agree.")


def check_methods(case: Case, folder: Path) -> None:
    """The methods of the contract are there and take what they will be called with."""
    wanted = contract(case.facts)
    for name, method in vars(wanted).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        own, said = getattr(case.cls, name, None), f"{name}{inspect.signature(method)}"
        expect(callable(own), f"{case.name}: has no method {name}; write {said}, see "
                              f"bench.plugin.{wanted.__name__}.")
        assert own is not None
        count = len(inspect.signature(method).parameters)
        expect(_takes(own, count), f"{case.name}: {name}{inspect.signature(own)} cannot be called with what the "
                                   f"bench hands it; write {said}.")


def _takes(method: Any, count: int) -> bool:
    try:
        inspect.signature(method).bind(*([None] * count))
    except TypeError:
        return False
    return True


def check_options(case: Case, folder: Path) -> None:
    """Every option has a default, and all of them can be part of a key."""
    try:
        canonical_json(identity(case.cls()))
        canonical_json(identity(case.make()))
    except BenchError as error:
        raise AssertionError(f"{case.name}: an option cannot be part of a cell's key: {error}") from error
    except TypeError as error:
        raise AssertionError(f"{case.name}: give every option a default that works: {error}.") from error


def check_bad_input(case: Case, folder: Path) -> None:
    """Numbers below zero where they make no sense, what the case lists, and eps beyond 255 are refused, with help."""
    for name, value in _bad(case):
        refused(case, name, value)


def _bad(case: Case) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(case.cls)
    for option in fields(case.cls):
        kinds = _kinds(hints[option.name])
        if kinds <= {int, float} and option.name not in case.negative:
            yield option.name, -1.0 if kinds == {float} else -1
        if option.name == "eps" and hasattr(case.cls, "protect"):
            yield option.name, 256.0
    for name, values in case.bad.items():
        yield from ((name, value) for value in values)


def _kinds(hint: Any) -> set[Any]:
    """``int | None`` holds integers."""
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    return set(typing.get_args(hint)) - {NoneType} if union else {hint}


def refused(case: Case, name: str, value: Any) -> None:
    """The option is refused when the plugin is made, in one BenchError with its name, the value and what is valid."""
    said = f"{case.name}({name}={value!r})"
    try:
        case.make(**{name: value})
    except BenchError as error:
        text = str(error)
        for part, what in ((name, "the option's name"), (str(value), "the value")):
            expect(part in text, f"{said}: the error lacks {what}: '{text}'.")
        expect(bool(re.search(ADVICE, text.lower())), f"{said}: the error does not say what is valid: '{text}'; end it "
                                                      "with 'give ...' or 'Valid: ...'.")
    except Exception as error:
        raise AssertionError(f"{said}: raises {type(error).__name__}; raise a bench.errors.BenchError.") from error
    else:
        raise AssertionError(f"{said} is accepted; check it in __post_init__ (bench.options.require does), or list the "
                             f"option for the kit: conformance(..., negative=('{name}',)).")


def check_cheap_import(case: Case, folder: Path) -> None:
    """Importing the plugin's module imports none of the heavy libraries."""
    script = ("import importlib, json, sys\nsys.path[:] = json.loads(sys.argv[1])\n"
              "importlib.import_module(sys.argv[2])\nprint(json.dumps(sorted(set(sys.argv[3:]) & set(sys.modules))))")
    done = subprocess.run([sys.executable, "-c", script, json.dumps(sys.path), case.cls.__module__, *HEAVY],
                          capture_output=True, text=True)
    expect(done.returncode == 0, f"{case.cls.__module__} cannot be imported by itself; install the package "
                                 f"(pip install -e .): {done.stderr.strip()[-300:]}")
    heavy = json.loads(done.stdout.splitlines()[-1])
    expect(not heavy, f"importing {case.cls.__module__} imports {', '.join(heavy)}, and so would `bench --help`; move "
                      "these imports into the functions that need them.")
