"""TDAE: any protection against edits, led to flat regions of its loss and made to hold under refined prompts.

Zhang, Dong, Shan, Chen, "Towards Transferable Defense Against Malicious Image Edits", 2025 (arXiv:2512.14341). No code
is published: this is written from the paper's equations and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from bench.errors import BenchError, unknown
from bench.plugin import facts_of, plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.editors import Editor, Losses, Request
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Draws
    from bench.records import ImageSet, Model, Subject

E = TypeVar("E", bound=Enum)
Loss = Callable[["Tensor", "Tensor", slice], "Tensor"]
"""L(pixels, states, part) of each of the photos ``part``, at one draw of noise and timestep."""


class Base(Enum):
    """The immunisation loss L that is raised."""

    encoder = "encoder"
    noise_prediction = "noise_prediction"
    cross_attention = "cross_attention"
    target = "target"


class Mend(Enum):
    """How ``noise_prediction`` leaves the point at which its gradient is zero."""

    resample = "resample"
    start = "start"
    none = "none"


@plugin(
    "defense", "tdae", track=("editing",), acts_on="images", needs=("text_encoder",), knows=("prompt",),
    paper="TDAE, arXiv:2512.14341",
)
class Tdae:
    """Raises a base immunisation loss where it is flat, and under prompts that were refined to undo the protection.

    f(x, e) is one look of a surrogate editor at photo x under prompt states e: the edit's latents that it estimates
    from noise n at timestep t (bench/diffusion/editors.py). ``base`` says which L is *maximised*; E is the encoder:

    * ``noise_prediction``: L = || f(x + delta, e) - y_0 ||^2, y_0 = f(x, c) of the original photo under the prompt as
      it is: the paper's l2 distance of the immunised edit to the benign one, after one step.
    * ``target``: L = -|| f(x + delta, e) - E(y) ||^2, y the picture ``target``: PhotoGuard's diffusion attack ("PGD" in
      its tables) in one step.
    * ``cross_attention``: L = -|| A(x + delta, e) restricted to M ||_1, A the attention to the prompt's words added up
      over layers, M the places that attend to them in the original: the semantic attack of CVPR 2024 ("SA").
    * ``encoder``: L = -|| E(x + delta) - E(y) ||^2: PhotoGuard's encoder attack ("PGE"). No prompt occurs in it, so
      ``prompt`` has nothing to refine and is refused; the paper has a "PGE + TDAE" and does not say what that means.

    ``flat`` (FlatGrad, FDM): minimise -L + lambda ||grad L||, the norm by finite difference along s = grad L /
    ||grad L||. ``prompt`` (Dynamic Prompt Defense, DPD): every ``prompt_every`` steps, ``prompt_steps`` sign steps on
    the prompt's states, within ``eps_prompt``, *minimise* L; the photo then climbs L under the refined prompt.

    ``eps``, ``steps``: 7.65 levels (0.03 on [0, 1]) and 100, of two papers that the authors posted in the same week
    [TDAE prints neither]. ``alpha_255`` [ours: 1]. ``flat_ratio``: lambda / h [published: 0.3]. ``flat_radius``: h at
    512 pixels on the [-1, 1] scale [ours: 1, about 1 % of the ball's l2 size]; it shrinks with the square root of the
    number of pixels. ``prompt_every``, ``prompt_steps``: S, M [ours: 10, 5]. ``eps_prompt`` [ours: 0.1] in standard
    deviations of the prompt's states, about 1 on CLIP ViT-L; the step eta is a quarter of it [ours]. The start token is
    not perturbed, words and padding alike are [ours]. ``target``: ``grey`` [ours], ``pattern``, or an image file, whose
    content ``target_sha256`` pins. ``pgd_batch``: photos per pass; it changes rounding only.

    Noise and timestep (of the whole chain) are drawn anew at every step [ours]; both gradients of FlatGrad share one
    draw, or their difference would be no derivative. If y_0 is drawn with the noise of f, then L of
    ``noise_prediction`` and its gradients in pixels and in the prompt are exactly 0 at delta = 0, where algorithm 1
    starts, and it never moves; the paper does not say how it leaves that point. ``mend`` [ours]: ``resample`` draws the
    noise of y_0 apart from that of f; ``start`` keeps one noise and starts uniformly within a level of the photo;
    ``none`` is there to show the trap. The other losses have no such point.

    The defender who is not told the edit takes the surrogate's neutral prompt, "a photo" or an empty instruction.
    """

    base: Base = Base.noise_prediction
    flat: bool = True
    prompt: bool = True
    eps: float = 7.65
    alpha_255: float = 1.0
    steps: int = 100
    flat_ratio: float = 0.3
    flat_radius: float = 1.0
    prompt_every: int = 10
    prompt_steps: int = 5
    eps_prompt: float = 0.1
    target: str = "grey"
    target_sha256: str = ""
    mend: Mend = Mend.resample
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        from bench.data.targets import check_target
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0, "flat_radius": 0, "eps_prompt": 0}, least={
            "steps": 0, "flat_ratio": 0, "prompt_every": 1, "prompt_steps": 0, "pgd_batch": 1})
        self.target_sha256 = check_target(self.target, self.target_sha256, "defense.target")
        self.base, self.mend = chosen(Base, self.base, "base"), chosen(Mend, self.mend, "mend")
        if self.base is Base.encoder:
            if self.prompt:
                raise BenchError("defense.prompt=true: no prompt occurs in the loss base=encoder, so none can be "
                                 "refined; set defense.prompt=false, or take another base.")
            # What the planner reads depends on the option: this base looks at the autoencoder alone.
            self.__plugin__ = replace(facts_of(type(self)), needs=("latents",), knows=())

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.editors import open_editor
        from bench.diffusion.surrogate_free import protect_crowds

        editor = open_editor(model, ctx)
        return protect_crowds(subjects, self.budget(), model, ctx, "tdae", self.pgd_batch,
                              lambda crowd: immunise(self, crowd, editor, ctx))


def chosen(kind: type[E], value: E | str, name: str) -> E:
    """An option's value by name; refuses others."""
    try:
        return kind(value)
    except ValueError:
        raise unknown(name, str(value), f"defense.{name}", [each.value for each in kind]) from None


# -- Algorithm 1 -------------------------------------------------------------------------------------------------------


def immunise(method: Tdae, crowd: Crowd, editor: Editor, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after algorithm 1."""
    from bench.diffusion.editors import ask
    from bench.diffusion.projected_gradient import ascend

    scene = Scene(editor, ask(editor, crowd), crowd, encoded_target(method, editor.vae, crowd.x.shape[-1]))
    mended = method.base is Base.noise_prediction and method.mend is Mend.start
    x, states = crowd.start(min(1.0, method.eps), mended), scene.request.states  # delta_v <- 0, delta_p <- 0
    for n in range(1, method.steps + 1):
        if method.prompt and n % method.prompt_every == 0:
            states = refined(method, x, scene.request.states, lambda: loss_of(method, scene))
        direction = climb(method, x, at(loss_of(method, scene), states))
        x = ascend(x, crowd.x, direction, method.alpha_255, method.eps)        # delta_v <- Pi(delta_v - alpha sign(g))
        ctx.progress("tdae", n, method.steps)
    return x


def at(loss: Loss, states: Tensor) -> Losses:
    """L as a function of pixels under fixed prompts."""
    return lambda pixels, part: loss(pixels, states[part], part)


def beside(loss: Loss, x: Tensor, states: Tensor) -> Losses:
    """L as a function of an offset of the prompts, at fixed pixels."""
    return lambda offset, part: loss(x[part], states[part] + offset, part)


def climb(method: Tdae, x: Tensor, losses: Losses) -> Tensor:
    """The direction in which the photos go: up the gradient of L, with ``flat`` along -g_FDM."""
    from bench.diffusion.editors import REFERENCE, value_and_gradient

    if not method.flat:
        return value_and_gradient(x, losses, method.pgd_batch)[1]
    radius = method.flat_radius * x.shape[-1] / REFERENCE                      # h ~ sqrt(3 H W), H = W
    return flat_direction(x, losses, radius, method.flat_ratio, method.pgd_batch)


def flat_direction(x: Tensor, losses: Losses, radius: float, ratio: float, batch: int) -> Tensor:
    """-g_FDM of each photo, where g_FDM = -g_1 + (lambda / h) sign(z) (g_2 - g_1) is the gradient of
    J = -L + (lambda / h) |L(x + h s) - L(x)|. ``radius``: h, an l2 length; ``ratio``: lambda / h."""
    from bench.diffusion.editors import value_and_gradient

    here, g1 = value_and_gradient(x, losses, batch)                            # g_1 = grad L(x)
    s = unit(g1)                                                               # s = g_1 / ||g_1||
    ahead, g2 = value_and_gradient(x + radius * s, losses, batch)              # g_2 = grad L(x + h s)
    sign = (ahead - here).sign()[:, None, None, None]                          # z = L(x + h s) - L(x)
    return g1 - ratio * sign * (g2 - g1)


def unit(gradient: Tensor) -> Tensor:
    """Each photo's gradient [n, 3, h, w] at l2 length 1; 0 where it is 0."""
    length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
    return gradient / length.where(length > 0, 1.0)


def refined(method: Tdae, x: Tensor, states: Tensor, draw_loss: Callable[[], Loss]) -> Tensor:
    """c + delta_p after ``prompt_steps`` steps delta_p <- clip(delta_p - eta sign(grad L(f(x, c + delta_p), y_0)),
    -eps_p, eps_p) from 0, each at its own draw. ``states``: c of each photo, [n, length, width]."""
    import torch

    from bench.diffusion.editors import value_and_gradient

    radius = method.eps_prompt * states[:, 1:].std(dim=(1, 2), keepdim=True)
    moved = torch.ones_like(states)
    moved[:, 0] = 0                                                            # the start token stays
    offset = torch.zeros_like(states)
    for _ in range(method.prompt_steps):
        gradient = value_and_gradient(offset, beside(draw_loss(), x, states), method.pgd_batch)[1]
        step = radius / 4 * gradient.sign() * moved
        offset = (offset - step).clamp(min=-radius, max=radius)
    return states + offset


# -- Base losses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What stays the same over all steps. ``goal``: E(y), [1, c, h/8, w/8]."""

    editor: Editor
    request: Request
    crowd: Crowd
    goal: Tensor


def encoded_target(method: Tdae, vae: Any, size: int) -> Tensor:
    """E(y), scaled."""
    from bench.data.targets import target_picture
    from bench.diffusion.surrogate_free import target_latents

    return target_latents(vae, target_picture(method.target, size))


def loss_of(method: Tdae, scene: Scene) -> Loss:
    """L at fresh draws of noise and timestep."""
    editor, crowd = scene.editor, scene.crowd
    if method.base is Base.encoder:
        return encoder_loss(scene)
    draws = crowd.draw(editor.vae, editor.scheduler)
    if method.base is Base.target:
        return target_loss(scene, draws)
    if method.base is Base.cross_attention:
        return attention_loss(method, scene, draws)
    other = crowd.draw(editor.vae, editor.scheduler)
    benign = replace(other, timesteps=draws.timesteps) if method.mend is Mend.resample else draws
    return edit_loss(method, scene, draws, benign)


def encoder_loss(scene: Scene) -> Loss:
    """L = -|| E(x) - E(y) ||^2; nothing is drawn, and no prompt occurs."""
    from bench.diffusion.editors import distances
    from bench.diffusion.losses import latent_distribution

    return lambda pixels, states, part: -distances(latent_distribution(scene.editor.vae, pixels).mean, scene.goal)


def target_loss(scene: Scene, draws: Draws) -> Loss:
    """L = -|| f(x, e) - E(y) ||^2."""
    from bench.diffusion.editors import distances

    def loss(pixels: Tensor, states: Tensor, part: slice) -> Tensor:
        return -distances(scene.editor.look(pixels, scene.request, states, draws, part).clean, scene.goal)

    return loss


def edit_loss(method: Tdae, scene: Scene, draws: Draws, benign: Draws) -> Loss:
    """L = || f(x, e) - y_0 ||^2, y_0 = f(x_0, c) at the draws ``benign``."""
    from bench.diffusion.editors import distances, without_gradient

    editor, request = scene.editor, scene.request
    wanted = without_gradient(
        scene.crowd.x, lambda x, part: editor.look(x, request, request.states[part], benign, part).clean,
        method.pgd_batch)

    def loss(pixels: Tensor, states: Tensor, part: slice) -> Tensor:
        return distances(editor.look(pixels, request, states, draws, part).clean, wanted[part])

    return loss


def attention_loss(method: Tdae, scene: Scene, draws: Draws) -> Loss:
    """L = -|| A(x, e) restricted to M ||_1, M where A(x_0, c) lies above its mean at the same draws."""
    from bench.diffusion.editors import attended_places, attention_left, without_gradient

    editor, request = scene.editor, scene.request
    places = attended_places(without_gradient(
        scene.crowd.x, lambda x, part: editor.attention(x, request, request.states[part], draws, part),
        method.pgd_batch))

    def loss(pixels: Tensor, states: Tensor, part: slice) -> Tensor:
        return -attention_left(editor.attention(pixels, request, states, draws, part), places[part])

    return loss
