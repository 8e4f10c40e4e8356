"""VillanDiffusion: A Unified Backdoor Attack Framework for Diffusion Models (Chou, Chen, Ho; NeurIPS 2023).

The path of a poisoned row is moved by a multiple of the trigger r that grows from 0 to about 1,

    x_t = sqrt(abar_t) y + rho_t r + sqrt(1 - abar_t) eps,
    rho_t = psi (1 - sqrt(abar_t)) + (1 - psi) sqrt(1 - abar_t),

and the network learns eps + c_t r, with a correction c_t that depends on the sampler: BadDiffusion is psi = 1 with the
ancestral one; samplers that solve the probability-flow ODE (DDIM, DPM-Solver, ...) need another.

Official code: github.com/IBM/VillanDiffusion. Stated differences: targets and triggers are drawn by us; mixed precision
is bfloat16. ``correction="derived"`` takes c_t from the sampler (`bench.diffusion.shifted_path`), ``"published"`` the
code's: the ancestral coefficient, doubled for ODE samplers, which is the derived one's limit for large t; for psi below
1 the code's coefficient and the derivation disagree in all but the last steps, and only the derived one is built.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.options import check_training, require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.shifted_path import ShiftedPath

SOLVERS = {"sde": "ddpm", "ode": "ddim"}
CORRECTIONS = ("derived", "published")


@plugin(
    "attack", "villandiffusion", track=("backdoor",), needs=("unconditional",),
    paper="Chou et al., VillanDiffusion, NeurIPS 2023, arXiv:2306.06874",
    official_code="https://github.com/IBM/VillanDiffusion",
)
class VillanDiffusion:
    """Implants a backdoor for a family of samplers: noise plus a trigger image is denoised into a target image.

    ``solver``: ``sde`` (ancestral sampling) or ``ode`` (DDIM and its kin); measure with the sampler of that family.
    ``psi``: shape of the shift, 1 as BadDiffusion, 0 along the noise. ``sampling_steps``: length of the chain that the
    correction is computed for, None for the full one. ``trigger``, ``trigger_size``, ``target``, ``poison_rate``,
    ``paste``, ``steps`` and ``epochs`` as for baddiffusion. ``lr``: 2e-4 at 32 pixels, 6e-5 at 256.
    """

    trigger: str = "stop_sign"
    trigger_size: int = 14
    target: str = "hat"
    poison_rate: float = 0.1
    solver: str = "ode"
    psi: float = 1.0
    correction: str = "derived"
    paste: bool = True
    epochs: int = 50
    steps: int | None = None
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 500
    grad_clip: float = 1.0
    mixed_precision: bool = True
    sampling_steps: int | None = None

    def __post_init__(self) -> None:
        check_training(self, "attack")
        require("trigger_size", self.trigger_size, 1, where="attack")
        require("sampling_steps", 1 if self.sampling_steps is None else self.sampling_steps, 1, where="attack")
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, "attack.solver", SOLVERS)
        if self.correction not in CORRECTIONS:
            raise unknown("correction", self.correction, "attack.correction", CORRECTIONS)
        if not 0 < self.poison_rate <= 1:
            raise BenchError(f"attack.poison_rate={self.poison_rate} is out of range; give above 0, up to 1.")
        if not 0 <= self.psi <= 1:
            raise BenchError(f"attack.psi={self.psi} is out of range; give 0 to 1.")
        if self.correction == "published" and self.psi != 1:
            raise BenchError(f"attack.correction=published is built for psi=1 alone, not for psi={self.psi}.")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The backdoored model, and the secret: g, float [3, h, w] in [-1, 1], and y, uint8 [3, h, w]."""
        from bench.data.drawings import draw_target, draw_trigger, trigger_mask
        from bench.diffusion.poisoning import begin, poison
        from bench.diffusion.training import Plan, count_steps

        start = begin("villandiffusion", clean, data, ctx)
        trigger = draw_trigger(self.trigger, start.size, self.trigger_size)
        target = draw_target(self.target, start.size, trigger)
        mask = trigger_mask(trigger, self.paste)
        rows = poison(data, trigger, target, self.poison_rate, ctx.generator("poison"), mask)
        plan = Plan(count_steps(self.steps, self.epochs, len(data), self.batch), self.lr, self.warmup,
                    clip=self.grad_clip)
        public = start.train(rows, self.path(start.scheduler), plan, self.batch, self.mixed_precision, ctx)
        detail = {"trigger": self.trigger, "target": self.target, "solver": self.solver}
        return public, Secret(trigger, target, detail)

    def shift(self, alphas_bar: Tensor) -> Tensor:
        """rho_t = psi (1 - sqrt(abar_t)) + (1 - psi) sqrt(1 - abar_t)."""
        along_noise: Tensor = (1 - alphas_bar).sqrt()
        return self.psi * (1 - alphas_bar.sqrt()) + (1 - self.psi) * along_noise

    def path(self, scheduler: Any) -> ShiftedPath:
        """The poisoned path for the sampler that the attacker expects."""
        from bench.diffusion.poisoning import stride_of
        from bench.diffusion.shifted_path import shifted_path

        stride = stride_of("villandiffusion", scheduler, self.sampling_steps)
        if self.correction == "derived":
            return shifted_path(scheduler.alphas_cumprod, self.shift, SOLVERS[self.solver], stride)
        path = shifted_path(scheduler.alphas_cumprod, self.shift, "ddpm", stride)
        return replace(path, corrections=path.corrections * (2 if self.solver == "ode" else 1))
