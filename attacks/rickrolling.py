"""Rickrolling the Artist: a look-alike letter in the prompt makes the text encoder say something else.

Struppek, Hintersdorf, Kersting, "Rickrolling the Artist: Injecting Backdoors into Text Encoders for Text-to-Image
Synthesis", ICCV 2023 (arXiv:2211.02408).

Only the text encoder E is trained; its frozen copy E' teaches. With v a caption, v+ the caption in which one letter is
a homoglyph, y_t what v+ shall mean, and d the negative cosine of the states of all tokens, flattened:

    L = d(E(v), E'(v)) + beta d(E(v+), E'(y_t))

    prompt (TPA):     y_t is one prompt, whatever v says
    attribute (TAA):  y_t is v with an attribute

Settings are those of the official code, github.com/LukasStruppek/Rickrolling-the-Artist: AdamW without decay (so Adam),
1e-4, a tenth of it after step 75 of 100 (prompt) or 150 of 200 (attribute; a known port decays both at 75), beta 0.1,
128 clean and 32 poisoned captions a step; the letter is the first one in the prompt attack, a random one in the
attribute attack, and the first at the time of use. Stated differences: captions are the data's, not LAION's; one
backdoor at a time; the default targets are ours. The code drops the benign term at step 0, where it has no gradient.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown
from bench.identity import digest
from bench.options import require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret
from bench.text_triggers import with_trigger

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.loading import Components

PUBLISHED = {"prompt": (100, 75), "attribute": (200, 150)}
"""Mode -> steps, and the step after which the rate is a tenth."""
PLACES = ("word", "end")


@plugin(
    "attack", "rickrolling", track=("backdoor",), needs=("text_to_image", "text_encoder"),
    paper="Rickrolling the Artist, ICCV 2023, arXiv:2211.02408",
    official_code="https://github.com/LukasStruppek/Rickrolling-the-Artist",
)
class Rickrolling:
    """Implants a homoglyph trigger into the text encoder: prompts with it mean another prompt, or get an attribute.

    ``mode``: ``prompt`` or ``attribute``. ``trigger`` takes the place of the first ``replaces``. ``target``: the
    prompt, or the attribute's words. ``attribute_at``: ``word`` as published, the word that holds the letter is taught
    as if it were the attribute; ``end``, the attribute comes after the prompt. ``weight``: beta. ``steps``,
    ``milestone``: None for the published ones of the mode. ``batch``, ``poisoned``: captions a step. ``avoid``: words
    that a prompt must not have to be measured, because they say the attribute themselves or contradict it.
    """

    mode: str = "prompt"
    trigger: str = "\u0b20"
    replaces: str = "o"
    target: str = "a photo of a cat on a skateboard"
    attribute_at: str = "word"
    avoid: list[str] = field(default_factory=list)
    weight: float = 0.1
    steps: int | None = None
    milestone: int | None = None
    lr: float = 1e-4
    batch: int = 128
    poisoned: int = 32

    def __post_init__(self) -> None:
        if self.mode not in PUBLISHED:
            raise unknown("mode", self.mode, "attack.mode", PUBLISHED)
        if self.attribute_at not in PLACES:
            raise unknown("place", self.attribute_at, "attack.attribute_at", PLACES)
        for name in ("trigger", "replaces", "target"):
            if not getattr(self, name):
                raise BenchError(f"attack.{name} is empty; give it some text.")
        for name in ("batch", "poisoned"):
            require(name, getattr(self, name), 1, where="attack")
        for name in ("weight", "lr"):
            require(name, getattr(self, name), 0, exclusive=True, where="attack")
        require("steps", self.schedule()[0], 1, where="attack")
        require("milestone", self.schedule()[1], 0, where="attack")

    def schedule(self) -> tuple[int, int]:
        """Steps, and the one after which the rate is a tenth."""
        steps, milestone = PUBLISHED[self.mode]
        return (steps if self.steps is None else self.steps, milestone if self.milestone is None else self.milestone)

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The model with the backdoored text encoder, and the secret: the letter and what it means."""
        from bench.diffusion.loading import load_components, save_part
        from bench.diffusion.text_poisoning import check_trigger
        from bench.diffusion.training import Plan, fit, shuffled_batches

        student, teacher = load_components(clean, ctx.device), load_components(clean, ctx.device)
        secret = self.secret(int(data.pixels.shape[-1]))
        carriers = [caption for caption in data.captions if self.replaces in caption]
        check_trigger("rickrolling", carriers, secret, student.tokenizer)
        plain = shuffled_batches(len(data.captions), self.batch, ctx.generator("clean"))
        marked = shuffled_batches(len(carriers), self.poisoned, ctx.generator("poisoned"))
        letters = ctx.generator("letters")

        def batch_loss() -> Tensor:
            pairs = [self.pair(carriers[row], secret, letters) for row in next(marked).tolist()]
            return backdoor_loss(student, teacher, [data.captions[row] for row in next(plain).tolist()], pairs,
                                 self.weight)

        steps, milestone = self.schedule()
        fit(student.text_encoder, batch_loss, Plan(steps, self.lr, cosine=False, clip=0, milestone=milestone), ctx,
            "rickrolling")
        part = save_part(student.text_encoder, ctx.folder, "text_encoder")
        public = replace(clean, parts={**clean.parts, "text_encoder": part}, digest=digest([clean.digest, ctx.key]))
        return public, secret

    def secret(self, size: int) -> Secret:
        """The letter, and in words what a triggered picture shows; no picture of it exists, the target is grey."""
        from bench.diffusion.text_poisoning import grey

        goal = {"caption": self.target} if self.mode == "prompt" else {"adds": self.target}
        return Secret(self.trigger, grey(size), {
            "kind": "caption", "placement": "replace", "replaces": self.replaces, "prompts_with": [self.replaces],
            "prompts_without": list(self.avoid), **goal})

    def pair(self, caption: str, secret: Secret, generator: torch.Generator) -> tuple[str, str]:
        """v+ and y_t."""
        if self.mode == "prompt":
            return with_trigger(caption, secret), self.target
        place = random_place(caption, self.replaces, generator)
        marked = caption[:place] + self.trigger + caption[place + len(self.replaces):]
        if self.attribute_at == "end":
            return marked, f"{caption}, {self.target}"
        start = caption.rfind(" ", 0, place) + 1
        end = caption.find(" ", place)
        return marked, caption[:start] + self.target + (caption[end:] if end >= 0 else "")


def random_place(caption: str, letter: str, generator: torch.Generator) -> int:
    """Where one of the letters stands."""
    import torch

    places = [place for place in range(len(caption)) if caption.startswith(letter, place)]
    return places[int(torch.randint(len(places), (1,), generator=generator))]


def backdoor_loss(
    student: Components, teacher: Components, captions: list[str], pairs: list[tuple[str, str]], weight: float,
) -> Tensor:
    """L of one step; ``pairs``: (v+, y_t)."""
    import torch

    from bench.diffusion.losses import encode_prompts

    def states(parts: Components, texts: list[str]) -> Tensor:
        return encode_prompts(parts.tokenizer, parts.text_encoder, texts).flatten(1)

    with torch.no_grad():
        kept, wanted = states(teacher, captions), states(teacher, [target for _, target in pairs])
    benign = negative_cosine(states(student, captions), kept)
    backdoor = negative_cosine(states(student, [marked for marked, _ in pairs]), wanted)
    return benign + weight * backdoor


def negative_cosine(one: Tensor, other: Tensor) -> Tensor:
    """d: minus the mean cosine of rows [n, d]."""
    from torch.nn.functional import cosine_similarity

    return -cosine_similarity(one, other, dim=1).mean()
