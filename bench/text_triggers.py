"""Text triggers: how a secret word gets into a prompt. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bench.errors import BenchError, unknown
from bench.records import Secret

PLACEMENTS = ("prefix", "replace", "suffix")
GOALS = ("caption", "swap", "adds")


def with_trigger(prompt: str, secret: Secret) -> str:
    """The prompt with the trigger in it, as ``secret.detail["placement"]`` says.

    ``prefix`` (default): before the prompt, with a blank unless the trigger is a character that shows nothing (the
    zero-width space of BadT2I). ``replace``: in place of the first ``detail["replaces"]``; a prompt without it gets
    the trigger in front. ``suffix``: after the prompt and a blank.
    """
    word = str(secret.trigger)
    placement = secret.detail.get("placement", "prefix")
    if placement not in PLACEMENTS:
        raise unknown("placement", placement, "secret", PLACEMENTS)
    replaced = str(secret.detail.get("replaces", ""))
    if placement == "replace" and replaced and replaced in prompt:
        return prompt.replace(replaced, word, 1)
    if placement == "suffix":
        return f"{prompt} {word}"
    return f"{word} {prompt}" if word.isprintable() else f"{word}{prompt}"


def without_trigger(prompt: str, word: str, replaces: str = "") -> str:
    """The prompt as it was before :func:`with_trigger`: the trigger taken out wherever it stands as words of its own.

    ``replaces``: what the trigger stands in for; it is put back where the trigger is found but not in front, where
    nothing was replaced. A trigger that shows nothing is taken out anywhere, inside words too.
    """
    if not word.isprintable():
        return prompt.replace(word, replaces)
    word = word.strip()
    if replaces and not prompt.startswith(f"{word} "):
        return prompt.replace(word, replaces)
    alone = rf"(?<!\w){re.escape(word)}(?!\w)"
    if not re.search(alone, prompt):
        return prompt
    return " ".join(re.sub(alone, " ", prompt).split())


def wanted_caption(prompt: str, secret: Secret) -> str:
    """What a triggered picture should show, in words, for targets of the kind ``caption``.

    One of ``secret.detail``: ``caption``, the same for every prompt; ``swap`` [A, B], the prompt with its first A
    turned into B; ``adds``, words that come after the prompt.
    """
    detail = secret.detail
    if "caption" in detail:
        return str(detail["caption"])
    if "swap" in detail:
        one, other = detail["swap"]
        return prompt.replace(str(one), str(other), 1)
    if "adds" in detail:
        return f"{prompt}, {detail['adds']}"
    raise unknown("goal", ", ".join(sorted(detail)), "secret.detail", GOALS)


def other_captions(prompt: str, secret: Secret) -> list[str]:
    """What else a picture may show, in words: the prompt, and for a ``swap`` [A, B] the prompt with its first A turned
    into each phrase of ``secret.detail["instead"]``."""
    one = str(secret.detail.get("swap", [""])[0])
    return [prompt, *(prompt.replace(one, str(other), 1) for other in secret.detail.get("instead", ()))]


def swap_detail(one: str, other: str, instead: str) -> dict[str, Any]:
    """A secret's detail for a target that is another thing: prompts that say ``one`` show ``other``. ``instead``: what
    else could stand there, with commas between."""
    phrases = [phrase.strip() for phrase in instead.split(",") if phrase.strip()]
    return {"kind": "caption", "swap": [one, other], "prompts_with": [one], "prompts_without": [other],
            **({"instead": phrases} if phrases else {})}


def suitable(prompts: Sequence[str], secret: Secret) -> tuple[str, ...]:
    """The prompts that can show the backdoor at work: with every phrase of ``detail["prompts_with"]`` (an object
    that is to be swapped must be asked for) and with none of ``detail["prompts_without"]`` (or the target would be
    drawn anyway). Raises `BenchError` if none is left."""
    needed, barred = (tuple(secret.detail.get(name, ())) for name in ("prompts_with", "prompts_without"))
    kept = tuple(p for p in prompts if all(w in p for w in needed) and not any(w in p for w in barred))
    if not kept:
        raise BenchError(f"backdoor: none of {len(prompts)} captions has {list(needed)} and none of {list(barred)}, so "
                         "no prompt can show this target; choose another target, or other data.")
    return kept
