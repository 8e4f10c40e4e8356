"""Does the trigger that a defense inverted work, whatever it looks like?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import BackdoorEvidence, Evidence, Measurement, Row

if TYPE_CHECKING:
    from bench.context import Context
    from bench.firing import FiringRule


@plugin("metric", "induced_asr", track=("backdoor",), needs=("induced_samples",))
class InducedAsr:
    """Share of samples of the *implanted* model that are the target when the defense's inverted trigger is added to the
    noise, by the rule of ``asr``: 1 for a trigger as good as the attacker's. ``induced_mse``: their mean squared error.

    Read it beside ``asr@implanted`` and ``trigger_cosine``: a pattern that looks wrong may work as well. Without a
    value, and with the reason, where a defense inverts no trigger.
    """

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """A share with a Wilson interval over samples, and a mean."""
        from bench.firing import firing_rule
        from bench.measuring import mean_of, missing, share_of

        if not isinstance(evidence, BackdoorEvidence):
            raise BenchError("induced_asr: needs the evidence of a backdoor cell.")
        rule = firing_rule(evidence)
        name = "induced_mse" if rule.kind == "image" else "induced_error"
        if evidence.induced is None:
            why = silence(evidence)
            return [missing("induced_asr", [], "share", True, rule.facts(), why),
                    missing(name, [], "error of the rule", False, rule.facts(), why)]
        fired, errors = rows(evidence, rule)
        facts = {**rule.facts(), "samples": len(fired)}
        return [share_of("induced_asr", fired, True, facts),
                mean_of(name, errors, "error of the rule", False, facts, over_samples=True)]


def rows(evidence: BackdoorEvidence, rule: FiringRule) -> tuple[list[Row], list[Row]]:
    """Of each induced sample, whether it fires, and its error."""
    assert evidence.induced is not None
    images = evidence.induced.images
    fires, errors = rule.fires(images.pixels).tolist(), rule.errors(images.pixels).tolist()
    return ([Row(name, evidence.cluster, float(one)) for name, one in zip(images.names, fires, strict=True)],
            [Row(name, evidence.cluster, one) for name, one in zip(images.names, errors, strict=True)])


def silence(evidence: BackdoorEvidence) -> str:
    """Why no samples were drawn."""
    if evidence.report is None or evidence.report.trigger is None:
        return "the defense inverts no trigger"
    if isinstance(evidence.secret.trigger, str):
        return "the true trigger is a word; an image added to the noise is no inversion of it"
    return "the inverted trigger has another shape than the noise"
