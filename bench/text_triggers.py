"""Text triggers: how a secret word gets into a prompt. Imports no torch."""

from __future__ import annotations

from bench.errors import unknown
from bench.records import Secret

PLACEMENTS = ("prefix", "replace")


def with_trigger(prompt: str, secret: Secret) -> str:
    """The prompt with the trigger in it, as ``secret.detail["placement"]`` says.

    ``prefix`` (default): before the prompt, with a blank unless the trigger is a character that shows nothing (the
    zero-width space of BadT2I). ``replace``: in place of the first ``detail["replaces"]``; a prompt without it gets
    the trigger in front.
    """
    word = str(secret.trigger)
    placement = secret.detail.get("placement", "prefix")
    if placement not in PLACEMENTS:
        raise unknown("placement", placement, "secret", PLACEMENTS)
    replaced = str(secret.detail.get("replaces", ""))
    if placement == "replace" and replaced and replaced in prompt:
        return prompt.replace(replaced, word, 1)
    return f"{word} {prompt}" if word.isprintable() else f"{word}{prompt}"
