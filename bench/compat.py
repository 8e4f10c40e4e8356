"""Why a cell cannot run: a reason for people, or None. Reads declared facts only, runs nothing."""

from __future__ import annotations

from typing import Any

from bench.config import PROTECTING, SERVED_BY_DATA, Cell
from bench.plugin import Facts, facts_of

ACTS_ON = {"customization": "images", "editing": "images", "backdoor": "model"}
"""Track -> what its defenses act on."""

SERVED_BY_MODEL = {
    "text_to_image": "a text-to-image model", "text_encoder": "a model with one text encoder",
    "unconditional": "an unconditional model", "ip_image": "a model with an image-prompt adapter",
    "ip_face": "a model with a face-prompt adapter", "edit": "an editing model",
    "inpaint": "a model that paints into a region", "latents": "a latent diffusion model",
}
"""Needs that the model answers, in words."""
ANSWERED_BY = {"latents": frozenset({"text_to_image", "edit", "inpaint"})}
"""Needs that several capabilities answer; any one will do."""

KINDS_OF_DATA = {"subjects": "photos of subjects", "edits": "photos and edits", "images": "plain images"}
TRACK_NEEDS = {"customization": ("subjects", "text_to_image"), "editing": ("edits",), "backdoor": ("images",)}


def check(cell: Cell) -> str | None:
    """The first reason why this cell is n/a, or None if it can run."""
    plugins = [cell.attack, cell.defense, cell.purifier, cell.data]
    for plugin in plugins:
        if reason := _track(facts_of(plugin), cell.track):
            return reason
    if reason := _shape(cell.defense, cell.track):
        return reason
    if cell.surrogate and cell.track not in PROTECTING:
        return f"surrogate={cell.surrogate} is a model to protect photos on; the {cell.track} track protects none"
    for asker, need in _needs(cell):
        if reason := _unmet(asker, need, cell):
            return reason
    return None


def _track(facts: Facts, track: str) -> str | None:
    if track in facts.track:
        return None
    if facts.kind == "defense" and facts.acts_on and facts.acts_on != ACTS_ON[track]:
        return f"{_acts(facts)}; the {track} track defends {_plural(ACTS_ON[track])}"
    return f"{facts.name} works on the {' and '.join(facts.track)} track, not on {track}"


def _shape(defense: Any, track: str) -> str | None:
    """A defense of either sort must act on what its track defends."""
    facts = facts_of(defense)
    wanted = ACTS_ON[track]
    method = "protect" if wanted == "images" else "repair"
    if facts.acts_on in ("", wanted) and hasattr(defense, method):
        return None
    return f"{_acts(facts)}; the {track} track defends {_plural(wanted)}"


def _acts(facts: Facts) -> str:
    return f"{facts.name} {'repairs models' if facts.acts_on == 'model' else 'protects images'}"


def _plural(acted_on: str) -> str:
    return "models" if acted_on == "model" else "images"


def _needs(cell: Cell) -> list[tuple[str, str]]:
    asked = [(f"the {cell.track} track", need) for need in TRACK_NEEDS[cell.track]]
    for plugin in (cell.attack, cell.defense, cell.purifier):
        facts = facts_of(plugin)
        asked += [(facts.name, need) for need in facts.needs]
    return asked


def _unmet(asker: str, need: str, cell: Cell) -> str | None:
    if need in SERVED_BY_DATA and not hasattr(cell.data, SERVED_BY_DATA[need]):
        return f"{asker} needs data with {KINDS_OF_DATA[SERVED_BY_DATA[need]]}; {facts_of(cell.data).name} has none"
    model, offers = _model_of(asker, cell)
    if need in SERVED_BY_MODEL and not offers & ANSWERED_BY.get(need, {need}):
        has = ", ".join(sorted(offers)) or "nothing"
        return f"{asker} needs {SERVED_BY_MODEL[need]} ({need}); {model} offers {has}"
    return None


def _model_of(asker: str, cell: Cell) -> tuple[str, frozenset[str]]:
    """The model that has to meet the asker's needs, and what it offers: a defense's is the surrogate."""
    if cell.surrogate and asker == facts_of(cell.defense).name:
        return cell.surrogate, cell.surrogate_capabilities
    return cell.model, cell.capabilities
