"""The one error that users see."""

from collections.abc import Iterable
from difflib import get_close_matches


class BenchError(ValueError):
    """Bad input, told in one message: what was wrong, where, and what is valid."""


class Incompatible(BenchError):
    """A pair that cannot run: recorded as n/a with this reason, never as a failure."""


def unknown(what: str, value: str, where: str, choices: Iterable[str]) -> BenchError:
    """An error for a name that is not among ``choices``, with the nearest ones first."""
    names = sorted(choices)
    close = get_close_matches(value, names, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return BenchError(f"{where}: unknown {what} '{value}'.{hint} Valid: {', '.join(names) or '(none)'}.")
