"""From the words of a command line to a frozen plan: which cells run, which are done, which are n/a and why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bench.compat import check
from bench.config import (
    SINGLE,
    Cell,
    Config,
    Resolve,
    assemble,
    build,
    metrics_of,
    plugin_of,
    remembered,
    root_of,
)
from bench.errors import BenchError
from bench.explain import explained
from bench.files import write_atomically
from bench.identity import plain
from bench.plugin import facts_of, parameters
from bench.results import RESULT, Result, read_result

PLAN = "plan.jsonl"
METRICS = "metrics"
PARTS = (*SINGLE, METRICS)
"""Nodes of a config that are composed apart."""
Compose = Callable[[Sequence[str]], DictConfig]
"""Overrides -> composed config, with Hydra's own node in it."""


@dataclass(frozen=True)
class Planned:
    """One cell and what to do with it: ``run``, ``done``, ``n/a``, or ``left`` as it is."""

    cell: Cell
    todo: str
    reason: str = ""


def expand(words: Sequence[str], blocks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Every cell's overrides: each block's product, with the command line's words over it.

    A word whose key a block has replaces the block's values; any other multiplies (a sweep) or adds (one value).
    Metrics make no cells, so several choices of them are all measured in each.
    """
    typed = choices(words)
    found: list[list[str]] = []
    for block in blocks or [{}]:
        axes = {**_axes(block), **typed}
        found += [list(point) for point in product(*(_together(key, values) for key, values in axes.items()))]
    return found


def _together(key: str, values: list[str]) -> list[str]:
    """The values of an axis; those of metrics as one list."""
    if key != METRICS or len(values) < 2:
        return values
    names = [name.strip() for value in values for name in value.partition("=")[2].strip("[] ").split(",")]
    return [f"{key}=[{','.join(dict.fromkeys(names))}]"]


def _axes(block: Mapping[str, Any]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for key, value in block.items():
        values = value if isinstance(value, list) else [value]
        axes |= _merged(choices([f"{key}={_word(v, str(key))}" for v in values]), str(key))
    return axes


def _merged(axes: dict[str, list[str]], key: str) -> dict[str, list[str]]:
    if not axes:
        raise BenchError(f"blocks: '{key}' has no value; give one value or a list of values.")
    return axes


def _word(value: Any, key: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, (str, int, float)):
        return str(value)
    raise BenchError(f"blocks: '{key}' has the value {value}; give a word, a number, or a list of these "
                     "(a list for one cell is written as text: \"[a,b]\").")


def choices(words: Sequence[str]) -> dict[str, list[str]]:
    """Overrides by key, each with all its values; ``key=a,b`` and two words of one key are both a choice."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found: dict[str, list[str]] = {}
    for word in OverridesParser.create().parse_overrides(list(words)):
        key = word.get_key_element()
        if word.is_sweep_override() and not word.is_discrete_sweep():
            raise BenchError(f"'{word.input_line}': a grid needs listed values, such as {key}=1,2,3.")
        if word.is_sweep_override():
            values = [f"{key}={value}" for value in word.sweep_string_iterator()]
        else:
            values = [word.input_line or f"{key}={word.get_value_element_as_str()}"]
        known = found.setdefault(key, [])
        known += [value for value in values if value not in known]
    return found


def resolve_cells(points: Iterable[Sequence[str]], compose: Compose) -> list[Cell]:
    """Compose and build every point; equal cells are one. Raises once, with everything that is wrong."""
    cells: dict[str, Cell] = {}
    errors: dict[str, int] = {}
    parts = Parts(compose)
    for point in points:
        try:
            cell = parts.cell(point)
            cells.setdefault(cell.id, cell)
        except Exception as error:  # Hydra, OmegaConf and plugins each raise their own
            message = str(explained(error))
            errors[message] = errors.get(message, 0) + 1
    if errors:
        raise BenchError(_all(errors))
    return list(cells.values())


def cell_of(point: Sequence[str], compose: Compose) -> Cell:
    """The cell of one list of overrides."""
    cfg = compose(point)
    return build(cfg, chosen(cfg), tuple(point))


def chosen(cfg: DictConfig) -> dict[str, str]:
    """Hydra group -> chosen option."""
    return {str(k): str(v) for k, v in OmegaConf.select(cfg, "hydra.runtime.choices").items()}


@dataclass(frozen=True)
class Part:
    """A kind of a composed config: its plugin, or metrics by name, and the option that was chosen for it."""

    made: Any
    choice: str


@dataclass
class Parts:
    """Cells of a grid from parts: every defense, attack, ... is composed once, not once per cell.

    A part is composed from the words that are about it and those that choose options about no plugin (an experiment).
    Plain values about no plugin, say the seed, are set on the root alone. Where a plugin's words change anything else,
    say a preset that sets the seed, or a plugin's option refers to another node, or anything is wrong, the point is
    composed as a whole.
    """

    compose: Compose
    resolve: Resolve = field(default_factory=remembered)
    configs: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)
    roots: dict[tuple[str, ...], Config] = field(default_factory=dict)
    parts: dict[tuple[str, tuple[str, ...]], Part | None] = field(default_factory=dict)

    def cell(self, point: Sequence[str]) -> Cell:
        """The cell of one list of overrides, the same that ``cell_of`` gives."""
        try:
            found = self._found(point)
        except Exception:  # whatever it is, the whole config says it better
            found = None
        if found is None:
            return cell_of(point, self.compose)
        root, parts = found
        made = {name: parts[name].made for name in SINGLE}
        return assemble(root, made, parts[METRICS].made, {name: parts[name].choice for name in SINGLE}, tuple(point),
                        self.resolve)

    @cached_property
    def _groups(self) -> frozenset[str]:
        """Words that choose an option start with one of these."""
        return frozenset((*chosen(self._config(())), "hydra"))

    def _found(self, point: Sequence[str]) -> tuple[Config, dict[str, Part]] | None:
        rest = tuple(word for word in point if part_of(word) not in PARTS)
        options = tuple(word for word in rest if not is_value(word, self._groups))
        parts = {}
        for name in PARTS:
            part = self._part(name, options, tuple(word for word in point if word in options or part_of(word) == name))
            if part is None:
                return None
            parts[name] = part
        if rest not in self.roots:
            values = [word for word in rest if word not in options]
            self.roots[rest] = root_of(with_values(self._config(options), values))
        return self.roots[rest], parts

    def _part(self, name: str, rest: tuple[str, ...], words: tuple[str, ...]) -> Part | None:
        if (name, words) not in self.parts:
            base, cfg = self._config(rest), self._config(words)
            apart = without(base, name) == without(cfg, name) and "${" not in str(unresolved(cfg, name))
            made = metrics_of(cfg) if name == METRICS else plugin_of(cfg, name)
            self.parts[name, words] = Part(made, chosen(cfg).get(name, "")) if apart else None
        return self.parts[name, words]

    def _config(self, words: tuple[str, ...]) -> DictConfig:
        if words not in self.configs:
            self.configs[words] = self.compose(words)
        return self.configs[words]


def part_of(word: str) -> str:
    """The part that an override is about, "" for none."""
    name = re.split(r"[.@=]", word.lstrip("+~"), maxsplit=1)[0]
    return name if name in PARTS else ""


def is_value(word: str, groups: Collection[str]) -> bool:
    """Whether an override sets an existing node, and neither chooses an option of one of Hydra's ``groups`` nor adds or
    deletes anything."""
    return re.match(r"\w+(\.\w+)*=", word) is not None and re.split(r"[.=]", word, maxsplit=1)[0] not in groups


def with_values(cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    """A config without its plugins, with overrides set as Hydra sets them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in (*PARTS, "hydra")])
    for word in OverridesParser.create().parse_overrides(list(words)):
        OmegaConf.update(plain, word.get_key_element(), word.value(), merge=True)
    return plain


def unresolved(cfg: DictConfig, name: str) -> Any:
    """A node of a config as it is written, with its references."""
    node = cfg._get_node(name)
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else str(node)


def without(cfg: DictConfig, name: str) -> dict[str, Any]:
    """A config as it is written, but for one node and Hydra's own."""
    return {str(key): unresolved(cfg, str(key)) for key in cfg if key not in (name, "hydra")}


def _all(errors: Mapping[str, int]) -> str:
    if len(errors) == 1:
        return next(iter(errors))
    lines = [f"  {message}" + (f" ({n} cells)" if n > 1 else "") for message, n in errors.items()]
    return "\n".join([f"{len(errors)} things are wrong, nothing was started:", *lines])


def plan(cells: Sequence[Cell], results: Path, mode: str) -> list[Planned]:
    """What to do with each cell. ``cached``: what is not finished (failed before counts as missing); ``retry``:
    only what failed before; ``force``: everything again, from the stored stages."""
    return [_planned(cell, results, mode) for cell in cells]


def _planned(cell: Cell, results: Path, mode: str) -> Planned:
    if reason := check(cell):
        return Planned(cell, "n/a", reason)
    before = result_of(cell.folder(results))
    status = before.status if before else ""
    if mode == "force" or status == "failed":
        return Planned(cell, "run", "failed before" if status == "failed" else "")
    if before and status == "ok":
        missing = unmeasured(cell, before)
        return Planned(cell, "run", f"lacks {', '.join(missing)}") if missing else Planned(cell, "done")
    if mode == "retry":
        return Planned(cell, "left", "did not fail before; mode=retry runs only what did")
    return Planned(cell, "run")


def unmeasured(cell: Cell, result: Result) -> list[str]:
    """Metrics that are asked for and not in the result with these options."""
    found = [(m.metric, m.version, m.parameters) for m in result.measurements]
    return [name for name, metric in cell.metrics.items()
            if (name, facts_of(metric).version, plain(parameters(metric))) not in found]


def result_of(folder: Path) -> Result | None:
    """The result in a cell's folder, or None where no valid one lies."""
    if not (folder / RESULT).is_file():
        return None
    try:
        return read_result(folder)
    except BenchError:
        return None


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells, such that neighbours rarely wait for one stage: round-robin over what each builds first."""
    rounds: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        rounds.setdefault(cell.first_stage(), []).append(cell)
    columns = zip_longest(*rounds.values())
    return [cell for cell in chain.from_iterable(columns) if cell is not None]


def freeze(planned: Sequence[Planned], results: Path) -> Iterator[Path]:
    """Write ``plan.jsonl`` beside each suite's cells; yields the files."""
    for suite in dict.fromkeys(p.cell.suite for p in planned):
        lines = [json.dumps(_line(p)) for p in planned if p.cell.suite == suite]
        path = results / suite / PLAN
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "\n".join(lines) + "\n")
        yield path


def _line(planned: Planned) -> dict[str, Any]:
    return {"cell": planned.cell.id, "title": planned.cell.title(), "track": planned.cell.track,
            "plan": planned.todo, "reason": planned.reason, "overrides": list(planned.cell.overrides)}
