"""Control: a mean test of the initial noise.

A standard normal input of d values has a mean of variance 1/d. Published triggers are pictures whose background is -1,
added to that noise: their inputs' mean lies tens of standard deviations away. A detector of inputs has to beat this, on
triggers that this does not catch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.errors import Incompatible
from bench.plugin import plugin
from bench.records import ImageSet, Model, Report, Secret

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context


@plugin("defense", "input_mean", track=("backdoor",), acts_on="model", needs=("unconditional",), control=True)
class InputMean:
    """Calls an input suspicious whose mean is far from 0; looks at no model, returns it as it was, gives no verdict on
    it."""

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """``suspicious`` itself."""
        return suspicious

    def score_inputs(
        self, model: Model, inputs: Tensor | tuple[str, ...], report: Report | None, ctx: Context,
    ) -> Tensor:
        """|mean| sqrt(d), of noise [n, 3, h, w]: the absolute value of a standard normal without a trigger."""
        if isinstance(inputs, tuple):
            raise Incompatible("input_mean: tests initial noise, not prompts.")
        flat = inputs.double().flatten(1)
        scores: Tensor = flat.mean(1).abs() * flat.shape[1] ** 0.5
        return scores
