"""One training loop for methods that train a whole network: Adam, linear warm-up, cosine decay, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.errors import BenchError

if TYPE_CHECKING:
    from bench.context import Context


@dataclass(frozen=True)
class Plan:
    """``steps`` updates at ``lr``: linear warm-up over ``warmup`` of them, then, if ``cosine``, half a cosine to 0.

    ``clip``: largest norm of the gradient, 0 for none. ``milestone``: the step from which on the rate is a tenth, 0
    for never. ``decay``: of the weights (AdamW), 0 for plain Adam.
    """

    steps: int
    lr: float
    warmup: int = 0
    cosine: bool = True
    clip: float = 1.0
    milestone: int = 0
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.warmup < 0 or self.clip < 0:
            raise BenchError(f"training: steps={self.steps}, lr={self.lr}, warmup={self.warmup}, clip={self.clip}: "
                             f"steps must be at least 1, lr above 0, warmup and clip at least 0.")

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at ``step`` (from 0)."""
        if step < self.warmup:
            return step / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.cosine:
            return 0.5 * (1 + math.cos(math.pi * done))
        return 0.1 if self.milestone and step >= self.milestone else 1.0


def mixed(device: str, wanted: bool) -> torch.autocast:
    """Within it, modules compute in bfloat16 where that is safe; weights and losses stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=wanted)


def count_steps(steps: int | None, epochs: int, images: int, batch: int) -> int:
    """``steps`` if given, else as many as ``epochs`` passes over ``images`` take, the last batch of each kept."""
    if epochs < 1 or batch < 1 or images < 1:
        raise BenchError(f"training: epochs={epochs}, batch={batch}, images={images}: each must be at least 1.")
    return epochs * math.ceil(images / batch) if steps is None else steps


def shuffled_batches(images: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices int64 of endless batches: every pass visits each image once, in a new order."""
    while True:
        order = torch.randperm(images, generator=generator)
        yield from (order[start:start + batch] for start in range(0, images, batch))


def nothing() -> None:
    """What a training run does after an update unless told otherwise."""


def fit(
    network: nn.Module, batch_loss: Callable[[], Tensor], plan: Plan, ctx: Context, what: str,
    after: Callable[[], None] = nothing,
) -> None:
    """Train ``network`` in place on ``batch_loss()``, called once a step; it ends frozen and in eval mode.

    ``after``: called after each update, say to average the weights.
    """
    network.requires_grad_(True).train()
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(weights, lr=plan.lr, weight_decay=plan.decay, fused=True) if plan.decay else \
        torch.optim.Adam(weights, lr=plan.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.factor)
    for _ in ctx.track(range(plan.steps), what, plan.steps):
        loss = batch_loss()
        if not torch.isfinite(loss):
            raise BenchError(f"{what}: the loss is {float(loss)}; lower the learning rate ({plan.lr}).")
        loss.backward()  # type: ignore[no-untyped-call]
        if plan.clip:
            nn.utils.clip_grad_norm_(weights, plan.clip)
        optimizer.step()
        schedule.step()
        after()
        optimizer.zero_grad(set_to_none=True)
    network.requires_grad_(False).eval()
