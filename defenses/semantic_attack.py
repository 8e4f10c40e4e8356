"""Semantic attack: the editor's cross-attention no longer finds what is in the photo.

Lo et al., "Distraction is All You Need: Memory-Efficient Image Immunization against Diffusion-Based Image Editing",
CVPR 2024. Written from the paper's abstract and from descriptions of its equations 3 to 5 by others; no line of its
code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.editors import Editor, Losses, Request
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Draws
    from bench.records import ImageSet, Model, Subject


@plugin(
    "defense", "semantic_attack", track=("editing",), acts_on="images", needs=("text_encoder",),
    paper="Distraction is All You Need, CVPR 2024",
)
class SemanticAttack:
    """Minimises the attention of the photo's places to the word that names what is in it, at many timesteps at once.

    min over ||delta||_inf <= eps of sum_t || A_t(x + delta) restricted to M_t ||_1. A_t: cross-attention to the content
    word, averaged over heads, layers brought to one size and added up (eq. 3); M_t: the places where A_t of the
    original photo is large (eq. 4); eq. 5 is the sum over M_t. Gradients of ``timesteps`` timesteps are added up for
    one sign step, so that one perturbation serves all noise levels, and only one pass is held in memory at a time.

    ``eps``, ``steps``, ``timesteps`` [published: 0.06, 100, 10]. 0.06 is read on the [-1, 1] scale, as in PhotoGuard,
    which it compares itself with: 7.65 levels. ``alpha_255`` [ours: 1]. ``prompt``: what the photo shows, ``{noun}``
    last: it stands for the subject's class noun, the content word, which the defender knows without knowing the edit
    [ours: "a photo of a {noun}"]. ``pgd_batch``: photos per pass; it changes rounding only.

    Ours where the sources are silent: M_t is where A_t exceeds its mean, from the same noise; one timestep is drawn
    from each of ``timesteps`` equal parts of the chain, noise and timesteps anew at every step.
    """

    eps: float = 7.65
    alpha_255: float = 1.0
    steps: int = 100
    timesteps: int = 10
    prompt: str = "a photo of a {noun}"
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0}, least={"steps": 0, "timesteps": 1, "pgd_batch": 1})
        if not self.prompt.endswith("{noun}") or self.prompt.count("{") != 1 or self.prompt.count("}") != 1:
            raise BenchError(f"defense.prompt={self.prompt!r}: it must end with {{noun}}, which stands for what the "
                             "photo shows, and have no other braces.")

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.editors import open_editor
        from bench.diffusion.surrogate_free import protect_crowds

        editor = open_editor(model, ctx)
        return protect_crowds(subjects, self.budget(), model, ctx, "semantic_attack", self.pgd_batch,
                              lambda crowd: distract(self, crowd, editor, ctx))


def distract(method: SemanticAttack, crowd: Crowd, editor: Editor, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x - alpha * sign(sum_t grad_x L_t))."""
    import torch

    from bench.diffusion.projected_gradient import descend
    from bench.diffusion.surrogates import pixel_gradient

    request = described(method, crowd, editor)
    x = crowd.x
    for step in range(method.steps):
        gradient = torch.zeros_like(x)
        for place in range(method.timesteps):
            draws = stratified(crowd.draw(editor.vae, editor.scheduler), place, method.timesteps, editor)
            gradient += pixel_gradient(x, attentions(method, editor, request, crowd.x, draws), method.pgd_batch)
        x = descend(x, crowd.x, gradient, method.alpha_255, method.eps)
        ctx.progress("semantic_attack", step + 1, method.steps)
    return x


def described(method: SemanticAttack, crowd: Crowd, editor: Editor) -> Request:
    """Each photo under the words that say what it shows; of them the class noun counts."""
    import torch

    from bench.diffusion.editors import ask

    nouns = [subject.class_noun for subject, count in zip(crowd.subjects, crowd.counts) for _ in range(count)]
    asked = {noun: ask(editor, crowd, method.prompt.replace("{noun}", noun), noun) for noun in dict.fromkeys(nouns)}
    states, words = (torch.stack([getattr(asked[noun], name)[place] for place, noun in enumerate(nouns)])
                     for name in ("states", "words"))
    return replace(asked[nouns[0]], states=states, words=words)


def stratified(draws: Draws, place: int, parts: int, editor: Editor) -> Draws:
    """The same draws with their timesteps moved into one of ``parts`` equal parts of the chain."""
    total = int(editor.scheduler.config.num_train_timesteps)
    return replace(draws, timesteps=(draws.timesteps + place * total) // parts)


def attentions(method: SemanticAttack, editor: Editor, request: Request, clean: Tensor, draws: Draws) -> Losses:
    """|| A_t(x) restricted to M_t ||_1 of each photo, as a mean over all places."""
    from bench.diffusion.editors import attended_places, attention_left, without_gradient

    def found(pixels: Tensor, part: slice) -> Tensor:
        return editor.attention(pixels, request, request.states[part], draws, part)

    places = attended_places(without_gradient(clean, found, method.pgd_batch))

    return lambda pixels, part: attention_left(found(pixels, part), places[part])
