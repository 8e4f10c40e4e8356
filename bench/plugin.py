"""Declare a plugin: one dataclass whose fields are its options and whose methods are the method.

    @plugin("defense", "mine", track=("customization",), acts_on="images")
    class Mine:
        \"\"\"One sentence: what a user gets.\"\"\"
        eps: float = 16.0

        def protect(self, subjects, model, ctx): ...

The decorator makes the class a dataclass, refuses a name that is taken, and stores the class in the registry
and in Hydra's ConfigStore, so ``OmegaConf.to_object(cfg.defense)`` is the plugin itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, dataclass_transform

from bench.errors import BenchError, unknown
from bench.identity import ADDED

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.protocols import EditingProtocol
    from bench.records import (
        Budget,
        Customised,
        Edit,
        Evidence,
        ImageSet,
        Measurement,
        Model,
        Report,
        Secret,
        Subject,
    )

KINDS = ("defense", "attack", "purifier", "metric", "data")
TRACKS = ("customization", "editing", "backdoor")
GROUPS = {"metric": "metrics"}
"""Hydra group of a kind where it is not the kind's own name: metrics are a list, ``metrics=[ism,fid]``."""


@dataclass(frozen=True)
class Facts:
    """What the planner knows about a plugin without running it.

    ``track``: where it can be used. ``acts_on``: of defenses, ``images`` (before the attack) or ``model`` (after it).
    ``needs``: capabilities of the model (``text_encoder``, ``unconditional``, ``ip_image`` ...) or of the data
    (``clean_data``); of metrics, samples that a track draws on demand (``induced_samples``). ``knows``: what the method
    is told beyond its threat model (``prompt``, ``trigger``, ``purifier``); the board prints it. ``control``: a row
    that boards carry for comparison; of attacks, one that does no harm. ``primary``: of metrics, boards rank by it.
    ``version`` is part of every key: raise it when results change.
    """

    kind: str
    name: str
    track: tuple[str, ...]
    acts_on: str = ""
    needs: tuple[str, ...] = ()
    knows: tuple[str, ...] = ()
    paper: str = ""
    official_code: str = ""
    version: int = 1
    variant: str = ""
    control: bool = False
    primary: bool = False
    origin: str = ""
    summary: str = ""


class ImageDefense(Protocol):
    """Protects set B of each subject, within a budget, before the attacker sees it.

    ``protect`` returns one ImageSet per subject, same sizes and names as ``subject.published``.
    """

    def budget(self) -> Budget: ...
    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]: ...


class ModelDefense(Protocol):
    """Cleans a suspicious model. ``data``: clean images the defender owns. ``secret`` is None unless the
    plugin declares ``knows=("trigger",)``. New weights go under ``ctx.folder``."""

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model: ...


class InputDetector(Protocol):
    """What a defense of models may do besides ``repair``: say how suspicious single inputs are.

    ``model``: the one that the defense was given to repair. ``inputs``: initial noise, float [n, 3, h, w], or n
    prompts. ``report``: what ``repair`` wrote, None if nothing. Returns [n] scores, higher is more suspicious; each may
    depend on its own input only: inputs come in a mixed order, and thresholds are set outside, on inputs without the
    trigger.
    """

    def score_inputs(
        self, model: Model, inputs: Tensor | tuple[str, ...], report: Report | None, ctx: Context,
    ) -> Tensor: ...


class CustomizationAttack(Protocol):
    """Learns a person from photos. ``identity`` seeds nothing: randomness comes from ``ctx``."""

    def customise(self, photos: ImageSet, class_noun: str, model: Model, ctx: Context) -> Customised: ...


class Editor(Protocol):
    """Edits photos as an attacker asks: one photo, one edit and one seed per picture, uint8 [n, 3, h, w] out.

    Picture i depends on photo, edit and seed i alone, so one seed means one start for a protected photo and its
    original. ``protocol``: sampler, steps and guidance. What it cannot do with certain edits or settings it may refuse
    before anything is protected, in a method ``check(edits, protocol)``.
    """

    def edit(
        self, photos: ImageSet, edits: Sequence[Edit], seeds: Sequence[int], model: Model, protocol: EditingProtocol,
        ctx: Context,
    ) -> Tensor: ...


class Implant(Protocol):
    """Plants a backdoor into a clean model and returns the public model with the attacker's secret."""

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]: ...


class Purifier(Protocol):
    """What an attacker does to photos before using them."""

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet: ...


class Metric(Protocol):
    """Scores the evidence of one cell. Never trains anything."""

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]: ...


class Data(Protocol):
    """Where photos come from. A source serves ``subjects`` (people), ``edits`` (photos and what is asked of each, a
    list of EditTask), ``images`` (plain training and reference images), or several; a track asks for what it needs."""

    def digest(self) -> str: ...


P = TypeVar("P")


@dataclass
class Registry:
    """Plugins by kind and name, and why some could not be imported."""

    facts: dict[tuple[str, str], Facts] = field(default_factory=dict)
    classes: dict[tuple[str, str], type] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, facts: Facts, cls: type) -> None:
        key = (facts.kind, facts.name)
        self.facts[key], self.classes[key] = facts, cls

    def refuse_taken(self, facts: Facts) -> None:
        """A name that is taken is refused, naming both owners (Hydra's store would overwrite)."""
        owner = self.facts.get((facts.kind, facts.name))
        if owner and owner.origin != facts.origin:
            raise BenchError(f"plugin: {facts.kind} '{facts.name}' of {facts.origin} is already taken "
                             f"by {owner.origin}.")

    def names(self, kind: str) -> list[str]:
        return sorted(name for k, name in self.facts if k == kind)

    def get(self, kind: str, name: str) -> type:
        if (kind, name) not in self.classes:
            raise unknown(kind, name, "plugin", self.names(kind))
        return self.classes[kind, name]


REGISTRY = Registry()


@dataclass_transform()
def plugin(kind: str, name: str, *, track: Sequence[str] = TRACKS, **facts: Any) -> Callable[[type[P]], type[P]]:
    """Declare a plugin of ``kind`` called ``name``; further keywords are the fields of :class:`Facts`."""
    if kind not in KINDS:
        raise unknown("kind", kind, f"plugin '{name}'", KINDS)
    for wrong in set(track) - set(TRACKS):
        raise unknown("track", wrong, f"plugin '{name}'", TRACKS)

    def declare(cls: type[P]) -> type[P]:
        made = cls if is_dataclass(cls) and "__dataclass_fields__" in cls.__dict__ else dataclass(cls)
        origin = f"{cls.__module__}:{cls.__qualname__}"
        told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        known = Facts(kind, name, tuple(track), origin=origin, summary=_summary(cls), **told)
        made.__plugin__ = known  # type: ignore[attr-defined]
        REGISTRY.refuse_taken(known)
        _store(known, made)
        REGISTRY.add(known, made)
        return made

    return declare


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def _store(facts: Facts, cls: type) -> None:
    """Raises if a field has no default or a type that a config cannot hold."""
    from hydra.core.config_store import ConfigStore

    group = GROUPS.get(facts.kind, facts.kind)
    package = f"metrics.{facts.name}" if facts.kind == "metric" else group
    ConfigStore.instance().store(group=group, name=facts.name, node=cls, package=package, provider="bench")


def facts_of(instance_or_class: Any) -> Facts:
    """The declared facts of a plugin class or instance."""
    found: Facts = instance_or_class.__plugin__
    return found


def parameters(instance: Any) -> dict[str, Any]:
    """The plugin's resolved options as plain JSON values: what a key is made of. Options that came later are left out
    while they have their default (`bench.identity.added`)."""
    late = {f.name for f in fields(instance) if f.metadata.get(ADDED) and getattr(instance, f.name) == f.default}
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(instance).items() if k not in late}


def changed(instance: Any) -> dict[str, Any]:
    """Those options that differ from the plugin's defaults."""
    default = type(instance)()
    return {f.name: getattr(instance, f.name) for f in fields(instance)
            if getattr(instance, f.name) != getattr(default, f.name)}


def identity(instance: Any) -> Mapping[str, Any]:
    """What names this plugin in a key: kind, name, version and every resolved option."""
    facts = facts_of(instance)
    return {"kind": facts.kind, "name": facts.name, "version": facts.version, "parameters": parameters(instance)}
