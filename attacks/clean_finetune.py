"""Control: the attacker's training without a backdoor.

A suspicious model is never the published one; it has been trained on. Whoever compares backdoored models with untouched
ones tests whether a model was trained, not whether it was poisoned. So the negative class of a detection board is this:
the same data, rows, loss, schedule and number of updates as BadDiffusion (Chou et al., CVPR 2023; see
`attacks.baddiffusion`), at a poison rate of 0. The secret names the trigger and the target that such an attack would
use, so that everything which is measured with a trigger is measured here, too, as a false alarm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.options import check_training, require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret

if TYPE_CHECKING:
    from bench.context import Context


@plugin("attack", "clean_finetune", track=("backdoor",), needs=("unconditional",), control=True,
        paper="Chou et al., How to Backdoor Diffusion Models?, CVPR 2023")
class CleanFinetune:
    """Control: trains an unconditional model exactly as baddiffusion does, but poisons no image.

    ``trigger``, ``trigger_size``, ``target``: what false alarms are measured with. ``steps``: number of updates, None
    for ``epochs`` passes. ``lr``: 2e-4 at 32 pixels, 8e-5 at 256. ``mixed_precision``: compute in bfloat16.
    """

    trigger: str = "box"
    trigger_size: int = 14
    target: str = "hat"
    epochs: int = 50
    steps: int | None = None
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 500
    grad_clip: float = 1.0
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        check_training(self, "attack")
        require("trigger_size", self.trigger_size, 1, where="attack")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The trained model, which has no backdoor, and a secret that it never saw."""
        import torch

        from bench.data.drawings import draw_target, draw_trigger
        from bench.diffusion.images import to_float
        from bench.diffusion.poisoning import PoisonedRows, begin
        from bench.diffusion.shifted_path import shifted_path
        from bench.diffusion.training import Plan, count_steps

        start = begin("clean_finetune", clean, data, ctx)
        trigger = draw_trigger(self.trigger, start.size, self.trigger_size)
        target = draw_target(self.target, start.size, trigger)
        none = torch.zeros(len(data), dtype=torch.bool)
        rows = PoisonedRows(to_float(data.pixels), none, trigger, to_float(target[None])[0], torch.ones_like(trigger))
        plan = Plan(count_steps(self.steps, self.epochs, len(data), self.batch), self.lr, self.warmup,
                    clip=self.grad_clip)
        # Without a trigger in any row the corrections of the path multiply zeros: the loss is the ordinary one.
        path = shifted_path(start.scheduler.alphas_cumprod)
        public = start.train(rows, path, plan, self.batch, self.mixed_precision, ctx)
        return public, Secret(trigger, target, {"trigger": self.trigger, "target": self.target, "poisoned": False})
