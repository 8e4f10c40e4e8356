"""Hydra's and OmegaConf's errors, told the way this project tells errors: the value, the place, what is valid."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from bench.discovery import raise_if_broken
from bench.errors import BenchError, unknown
from bench.plugin import GROUPS

EXPLAINABLE = (ValueError, HydraException, OmegaConfBaseException)
"""What bad input raises on its way through Hydra and the plugins; anything else is a defect and keeps its traceback."""

INTERNAL = ("cell", "blocks")
"""Root options that users do not set."""


def explained(error: Exception) -> BenchError:
    """``error`` as one clear message. A plugin that could not be imported answers with its own import error."""
    if isinstance(error, BenchError):
        return error
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return BenchError(f"'{error.override}' is not understood; write option=value, for example seed=1 or "
                          f"metrics=[a,b]. {_joined(error)}")
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return _bad_value(cause)
    return BenchError(_joined(error))


def _missing_option(error: MissingConfigException) -> BenchError:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    try:
        raise_if_broken(name)
    except BenchError as broken:
        return broken
    if not group:
        return BenchError(_joined(error))
    return unknown("name", name, group, error.options or [])


def _bad_value(error: OmegaConfBaseException) -> BenchError:
    place = error.full_key or str(error.key or "config")
    if "not in struct" in str(error) or "not in '" in str(error):
        return _unknown_key(error, place)
    reason = str(error.msg).split("\n")[0] if error.msg else _joined(error)
    if place == "metrics":
        return BenchError(f"metrics: {reason}. Give a list of names: metrics=[a,b].")
    return BenchError(f"{place}: {reason}{_expected(error)}.")


def _unknown_key(error: OmegaConfBaseException, place: str) -> BenchError:
    parent, _, key = place.rpartition(".")
    owner = error.object_type
    if isinstance(owner, type) and is_dataclass(owner):
        names = [f.name for f in fields(owner) if parent or f.name not in INTERNAL]
        return unknown("option", key, parent or "command line", names if parent else [*names, "experiment"])
    if parent == "metrics":
        return BenchError(f"metrics.{key} is set, but {key} is not among the chosen metrics; add it: "
                          f"metrics=[{key}].")
    if parent.split(".")[0] in ("defense", "attack", "purifier", "data", *GROUPS.values()):
        return BenchError(f"{place} is set, but no {parent} is chosen that has it; give {parent}=<name> too.")
    return BenchError(f"{parent or 'command line'}: unknown option '{key}'.")


def _expected(error: OmegaConfBaseException) -> str:
    """The declared type of the option, where the owner's fields tell it."""
    owner = error.object_type
    if not (isinstance(owner, type) and is_dataclass(owner)):
        return ""
    declared = {f.name: f.type for f in fields(owner)}.get(str(error.key))
    return f" (declared as {getattr(declared, '__name__', declared)})" if declared else ""


def _joined(error: BaseException) -> str:
    """A message of several lines as one, without Hydra's search path and OmegaConf's technical lines."""
    text = str(error).split("Config search path:")[0]
    noise = ("full_key:", "object_type=", "reference_type=", "See https://")
    lines = [line.strip() for line in text.split("\n")]
    return " ".join(line for line in lines if line and not line.startswith(noise))


def nearest(word: str, names: list[str]) -> str:
    """" Did you mean x?" or nothing."""
    close = get_close_matches(word, names, n=1)
    return f" Did you mean {close[0]}?" if close else ""
