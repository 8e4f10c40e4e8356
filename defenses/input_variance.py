"""Control: a variance test of the initial noise.

A standard normal input of d values has a variance of mean 1 and, nearly, of variance 2/d. A trigger that is added
raises it by the trigger's own variance over the pixels, one that is blended lowers it. A detector of inputs has to beat
this, on triggers that this does not catch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.errors import Incompatible
from bench.plugin import plugin
from bench.records import ImageSet, Model, Report, Secret

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context


@plugin("defense", "input_variance", track=("backdoor",), acts_on="model", needs=("unconditional",), control=True)
class InputVariance:
    """Calls an input suspicious whose variance is far from 1; looks at no model, returns it as it was, gives no verdict
    on it."""

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """``suspicious`` itself."""
        return suspicious

    def score_inputs(
        self, model: Model, inputs: Tensor | tuple[str, ...], report: Report | None, ctx: Context,
    ) -> Tensor:
        """|variance - 1| sqrt(d / 2), of noise [n, 3, h, w]: the absolute value of, nearly, a standard normal without a
        trigger. The variance is about the input's own mean, so that a constant shift alone goes unseen."""
        if isinstance(inputs, tuple):
            raise Incompatible("input_variance: tests initial noise, not prompts.")
        flat = inputs.double().flatten(1)
        scores: Tensor = (flat.var(1) - 1).abs() * (flat.shape[1] / 2) ** 0.5
        return scores
