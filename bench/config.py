"""The typed root config, and the cell that one resolved config describes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import bench
from bench.errors import BenchError, unknown
from bench.identity import digest
from bench.plugin import REGISTRY, facts_of, identity
from bench.protocols import BackdoorProtocol, CustomizationProtocol, EditingProtocol, Protocol

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bench.records import Model

SCHEMA_VERSION = 1
"""Part of every cell id: raise it when the meaning of a cell's fields changes."""

MODES = ("cached", "retry", "force")
ON_ERROR = ("continue", "stop")
WANDB = ("offline", "online", "disabled")
SINGLE = ("data", "defense", "purifier", "attack")
"""Kinds of which a cell has exactly one."""
SERVED_BY_DATA = {"subjects": "subjects", "edits": "edits", "images": "images", "clean_data": "images"}
"""Needs that the data answers -> the method of a data plugin that does."""
PROTECTING = ("customization", "editing")
"""Tracks whose defenses protect photos, and may do so on another model than the attacker's."""


@dataclass
class Tracker:
    """Weights & Biases. ``wandb``: ``offline`` (default), ``online`` or ``disabled``."""

    wandb: str = "offline"
    project: str = "diffusion-defense-bench"

    def __post_init__(self) -> None:
        if self.wandb not in WANDB:
            raise unknown("mode", self.wandb, "tracker.wandb", WANDB)


@dataclass
class Config:
    """Every option that is not a plugin's own. The comments in ``conf/config.yaml`` explain them."""

    suite: str = "adhoc"
    stamp: str = ""
    model: str = "micro-sd-a"
    surrogate: str = ""
    allow_pickle: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    workers: int = 0
    time_limit: float = 0.0
    on_error: str = "continue"
    mode: str = "cached"
    results: str = "results"
    store: str = "results/.store"
    tracker: Tracker = field(default_factory=Tracker)
    customization: CustomizationProtocol = field(default_factory=CustomizationProtocol)
    editing: EditingProtocol = field(default_factory=EditingProtocol)
    backdoor: BackdoorProtocol = field(default_factory=BackdoorProtocol)
    data: Any = None
    defense: Any = None
    purifier: Any = None
    attack: Any = None
    metrics: dict[str, Any] = field(default_factory=dict)
    blocks: list[Any] = field(default_factory=list)
    cell: str = ""

    def __post_init__(self) -> None:
        _require_at_least("seed", self.seed, 0)
        _require_at_least("threads", self.threads, 1)
        _require_at_least("workers", self.workers, 0)
        _require_at_least("time_limit", self.time_limit, 0)
        _require_choice("mode", self.mode, MODES)
        _require_choice("on_error", self.on_error, ON_ERROR)
        _require_folder_name(self.suite)


@dataclass(frozen=True)
class Settings:
    """How cells are run; nothing here changes a result. ``device``: a torch device name."""

    results: Path
    store: Path
    device: str = "cpu"
    threads: int = 1
    tracker: Tracker = field(default_factory=Tracker)


@dataclass(frozen=True)
class Cell:
    """One point of a grid, fully resolved.

    ``data``, ``defense``, ``purifier``, ``attack`` and the values of ``metrics`` are plugin instances. ``skipped``:
    metrics that were asked for and cannot score this track, with the reason. ``labels``: kind -> what a board calls
    the choice. ``capabilities``: what the model can do. ``overrides``: the command-line words that made the cell.
    ``stamp``: what every result of this suite says about itself. ``surrogate``: the model on which the photos are
    protected, where it is not the attacked one; "" where it is, or where the defense looks at no model.
    """

    id: str
    suite: str
    track: str
    model: str
    model_digest: str
    capabilities: frozenset[str]
    allow_pickle: bool
    seed: int
    data: Any
    defense: Any
    purifier: Any
    attack: Any
    protocol: Protocol
    metrics: Mapping[str, Any]
    skipped: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    stamp: str = ""
    surrogate: str = ""
    surrogate_digest: str = ""
    surrogate_capabilities: frozenset[str] = frozenset()

    def folder(self, results: Path) -> Path:
        """Where this cell's result lies."""
        return results / self.suite / self.id

    def first_stage(self) -> tuple[Any, ...]:
        """What it builds first, and shares: of customization the protected photos, of backdoors the implant."""
        method = self.attack if self.track == "backdoor" else self.defense
        return self.track, self.surrogate or self.model, repr(self.data), repr(method), self.seed

    def title(self) -> str:
        """One line for people."""
        parts = [self.shown("defense"), self.shown("purifier"), self.shown("attack"), self.model, f"seed {self.seed}"]
        return " · ".join(parts[:1] + parts[2:] if parts[1] == "none" else parts)

    def shown(self, kind: str) -> str:
        """A choice's label with its variant; of a defense also the model it protects on, where it is another."""
        variant = getattr(getattr(self, kind), "variant", "")
        variant = variant.value if isinstance(variant, Enum) else variant
        label = self.labels.get(kind) or facts_of(getattr(self, kind)).name
        said = f"{label} ({variant})" if variant else label
        return f"{said} on {self.surrogate}" if kind == "defense" and self.surrogate else said


Resolve = Callable[[str, bool], "Model"]


def config_folder() -> Path:
    """The folder ``conf``, beside the package ``bench`` in a checkout and in an installed copy alike."""
    folder = Path(bench.__file__).resolve().parent.parent / "conf"
    if not (folder / "config.yaml").is_file():
        raise BenchError(f"config: {folder} holds no config.yaml; the installation is incomplete, install it again.")
    return folder


def store_schema() -> None:
    """Register the root config's types with Hydra."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="bench_schema", node=Config, provider="bench")


def build(
    cfg: DictConfig, choices: Mapping[str, str] | None = None, overrides: tuple[str, ...] = (),
    resolve: Resolve | None = None,
) -> Cell:
    """The cell that a composed config describes.

    ``choices``: Hydra group -> chosen option, for labels. ``resolve``: finds a model by name. Raises
    :class:`BenchError` for a missing choice and for whatever a plugin, the protocol or the model refuses.
    """
    root, made, metrics = root_of(cfg), {kind: plugin_of(cfg, kind) for kind in SINGLE}, metrics_of(cfg)
    return assemble(root, made, metrics, choices or {}, overrides, resolve or remembered())


def remembered() -> Resolve:
    """Finds models, each once: a model's weights are hashed."""
    found: dict[tuple[str, bool], Model] = {}

    def resolve(name: str, allow_pickle: bool) -> Model:
        if (name, allow_pickle) not in found:
            found[name, allow_pickle] = _resolve(name, allow_pickle)
        return found[name, allow_pickle]

    return resolve


def assemble(
    root: Config, made: Mapping[str, Any], metrics: Mapping[str, Any], choices: Mapping[str, str],
    overrides: tuple[str, ...], resolve: Resolve,
) -> Cell:
    """The cell of a root and its plugins; what ``build`` does once they are made."""
    track = facts_of(made["attack"]).track[0]
    protocol = protocol_of(root, track)
    model = resolve(root.model, root.allow_pickle)
    scored, skipped = fitting(metrics, track)
    labels = {kind: label(kind, made[kind], choices.get(kind, ""), overrides) for kind in SINGLE}
    cell = Cell("", root.suite, track, root.model, model.digest, model.capabilities, root.allow_pickle, root.seed,
                made["data"], made["defense"], made["purifier"], made["attack"], protocol, scored, skipped, labels,
                overrides, root.stamp)
    cell = on_surrogate(cell, root.surrogate, resolve)
    return replace(cell, id=cell_id(cell))


def on_surrogate(cell: Cell, name: str, resolve: Resolve) -> Cell:
    """The cell with its photos protected on the model ``name``. The same cell where that changes nothing: the model is
    the attacked one, or the defense needs nothing of a model."""
    needs = set(facts_of(cell.defense).needs) - set(SERVED_BY_DATA)
    if not name or (cell.track in PROTECTING and not needs):
        return cell
    found = resolve(name, cell.allow_pickle)
    if found.digest == cell.model_digest:
        return cell
    return replace(cell, surrogate=name, surrogate_digest=found.digest, surrogate_capabilities=found.capabilities)


def root_of(cfg: DictConfig) -> Config:
    """The typed root, checked, without its plugins."""
    from omegaconf import OmegaConf, open_dict

    left_out = (*SINGLE, "metrics", "hydra", "blocks")
    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in left_out])
    with open_dict(plain):
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
    return cast(Config, OmegaConf.to_object(merged))


def settings(cfg: DictConfig) -> Settings:
    """How to run cells, from a composed config."""
    root = root_of(cfg)
    return Settings(Path(root.results).absolute(), Path(root.store).absolute(), device_of(root.device), root.threads,
                    root.tracker)


def cell_id(cell: Cell) -> str:
    """16 hexadecimal digits that name everything which can change the cell's artefacts.

    Device, paths, launcher, tracker, workers, threads, suite and metrics are no part of it. What was added to cells
    later is left out where it means "as before": a surrogate that is the attacked model, fields declared with
    :func:`bench.identity.added`.
    """
    data = facts_of(cell.data)
    surrogate = {"surrogate": cell.surrogate_digest} if cell.surrogate else {}
    return digest({
        "schema": SCHEMA_VERSION, "track": cell.track, "model": cell.model_digest, "seed": cell.seed,
        "data": {"name": data.name, "version": data.version, "digest": data_digest(cell.data)},
        "defense": identity(cell.defense), "purifier": identity(cell.purifier), "attack": identity(cell.attack),
        "protocol": cell.protocol, **surrogate,
    })


def protocol_of(root: Config, track: str) -> Protocol:
    """The protocol node of a track."""
    protocols: dict[str, Protocol] = {"customization": root.customization, "editing": root.editing,
                                      "backdoor": root.backdoor}
    return protocols[track]


def label(kind: str, instance: Any, choice: str, overrides: tuple[str, ...] = ()) -> str:
    """What a board calls this choice: preset or plugin name, and options changed by hand. The result adds the
    variant."""
    words = [word.lstrip("+") for word in overrides]
    by_hand = [word.removeprefix(f"{kind}.") for word in words if word.startswith(f"{kind}.")]
    shown = [word for word in by_hand if not word.startswith("variant=")]
    return " ".join([choice or facts_of(instance).name, *shown])


def plugin_of(cfg: DictConfig, kind: str) -> Any:
    """The chosen plugin of a kind."""
    node = cfg.get(kind)
    if node is None:
        raise BenchError(f"{kind}: nothing chosen; give {kind}=<name>. Valid: {', '.join(REGISTRY.names(kind))}.")
    return _made(node, kind)


def _made(node: Any, where: str) -> Any:
    """The plugin instance of a config node; its own ``__post_init__`` checks ranges."""
    from omegaconf import OmegaConf

    made: Any = OmegaConf.to_object(node)
    if not hasattr(made, "__plugin__"):
        kind = where.partition(".")[0]
        raise BenchError(f"{where}: {node} is no plugin; choose one by name, {kind}=<name>. "
                         f"Valid: {', '.join(REGISTRY.names(kind))}.")
    for extra in set(vars(made)) - {f.name for f in fields(made)}:
        if extra in node:
            raise unknown("option", extra, where, [f.name for f in fields(made)])
    return made


def metrics_of(cfg: DictConfig) -> dict[str, Any]:
    """The chosen metrics by name."""
    return {str(name): _made(node, f"metrics.{name}") for name, node in (cfg.get("metrics") or {}).items()}


def fitting(chosen: Mapping[str, Any], track: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The chosen metrics that fit the track, those that boards rank by first, and why the others do not fit; without a
    choice, all that fit."""
    made = chosen or _all_metrics(track)
    fits = {name: metric for name, metric in made.items() if track in facts_of(metric).track}
    reasons = {name: f"{name} scores the {' and '.join(facts_of(metric).track)} track, not {track}"
               for name, metric in made.items() if name not in fits}
    return dict(sorted(fits.items(), key=lambda item: not facts_of(item[1]).primary)), reasons


def _all_metrics(track: str) -> dict[str, Any]:
    classes = {name: REGISTRY.classes["metric", name] for name in REGISTRY.names("metric")}
    return {name: cls() for name, cls in classes.items() if track in facts_of(cls).track}


def _resolve(name: str, allow_pickle: bool) -> Model:
    from bench.diffusion.checkpoints import resolve

    return resolve(name, allow_pickle)


_DIGESTS: dict[str, str] = {}


def data_digest(data: Any) -> str:
    """Photos are hashed once per process, not once per cell."""
    key = digest(identity(data))
    if key not in _DIGESTS:
        _DIGESTS[key] = data.digest()
    return _DIGESTS[key]


def device_of(name: str) -> str:
    """A torch device name; ``auto`` as this machine has it."""
    if name != "auto":
        return name
    return "cuda" if gpus() else "cpu"


def gpus() -> list[str]:
    """The GPUs that this process may use, found without torch; none if torch is a build for CPUs."""
    try:
        if "+cpu" in version("torch"):
            return []
    except PackageNotFoundError:
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1")]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _require_at_least(where: str, value: float, low: int) -> None:
    if value < low:
        raise BenchError(f"{where}={value} is out of range; give {low} or more.")


def _require_choice(where: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown("value", value, where, choices)


def _require_folder_name(suite: str) -> None:
    if not suite or suite.startswith(".") or suite != Path(suite).name:
        raise BenchError(f"suite: '{suite}' must be the plain name of a folder, such as quickstart.")
