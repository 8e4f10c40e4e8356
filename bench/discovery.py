"""Find plugins: the modules of attacks/, defenses/, metrics/ and bench/data/, then installed entry points.

A plugin that cannot be imported never stops the others: it leaves a placeholder in ``REGISTRY.broken``, and
choosing its name raises its own error.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from bench.errors import BenchError
from bench.plugin import REGISTRY

FOLDERS = ("attacks", "defenses", "metrics", "bench.data")
GROUP = "bench.plugins"


@cache
def load() -> None:
    """Import every plugin once per process. Imports no torch."""
    for module in builtin_modules():
        _import(module.rpartition(".")[2], module, f"built-in module {module}")
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        _import(point.name, point.module, owner(point))


def builtin_modules() -> Iterator[str]:
    """Dotted names of all modules in the plugin folders, sorted, folder by folder."""
    for folder in FOLDERS:
        package = importlib.import_module(folder)
        for name in sorted(found.name for found in pkgutil.iter_modules(package.__path__)):
            yield f"{folder}.{name}"


def owner(point: EntryPoint) -> str:
    """The distribution that declares an entry point, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _import(name: str, module: str, origin: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a stranger's code: whatever it raises, the rest must work
        REGISTRY.broken[name] = f"{origin}: {type(error).__name__}: {error}"


def warnings() -> list[str]:
    """One line per plugin that could not be imported."""
    return [f"plugin '{name}' is broken and left out ({reason})" for name, reason in sorted(REGISTRY.broken.items())]


def raise_if_broken(name: str) -> None:
    """Raise the import error of a plugin that is chosen but could not be imported."""
    if name in REGISTRY.broken:
        raise BenchError(f"plugin '{name}' cannot be used, its import failed. {REGISTRY.broken[name]}")
