"""Control: delete the trigger's words from every prompt, and change nothing else.

Every text-to-image defense that is told the trigger has to be read beside this one: who knows the words can leave them
out (Spatial Attention Unlearning, arXiv:2504.18563, generates its replacement from exactly that prompt).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.identity import digest
from bench.plugin import plugin
from bench.records import Guard, ImageSet, Model, Secret
from bench.text_triggers import without_trigger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bench.context import Context
    from bench.protocols import BackdoorProtocol

KNOWN = "trigger.json"


@plugin(
    "defense", "delete_trigger", track=("backdoor",), acts_on="model", needs=("text_to_image", "text_encoder"),
    knows=("trigger",), control=True,
)
class DeleteTrigger:
    """Takes the trigger's words out of every prompt before the model draws; the weights stay backdoored.

    It is told the trigger. Words that the trigger stands in for (a letter replaced by its look-alike) are put back.
    """

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The same weights behind a guard that knows the trigger."""
        if secret is None or not isinstance(secret.trigger, str):
            raise BenchError("delete_trigger: works against text triggers that it is told; this backdoor has none.")
        folder = ctx.folder / "guard"
        folder.mkdir(parents=True, exist_ok=True)
        known = {"word": secret.trigger, "replaces": str(secret.detail.get("replaces", ""))}
        (folder / KNOWN).write_text(json.dumps(known, indent=1, sort_keys=True))
        guard = Guard("defense", "delete_trigger", {}, folder)
        return replace(suspicious, guard=guard, digest=digest([suspicious.digest, ctx.key]))

    def draw(
        self, model: Model, prompts: Sequence[str], seeds: Sequence[int], protocol: BackdoorProtocol, ctx: Context,
    ) -> Tensor:
        """Pictures uint8 [n, 3, h, w] of the prompts without the trigger."""
        from bench.diffusion.sampling import draw_prompts

        if model.guard is None:
            raise BenchError("delete_trigger: this model has no guard.")
        known = json.loads((model.guard.folder / KNOWN).read_text())
        asked = [without_trigger(prompt, known["word"], known["replaces"]) for prompt in prompts]
        return draw_prompts(model, asked, seeds, protocol, ctx)
