"""What a comparison within a track must share: prompts, samplers, sample counts. Part of a cell's identity."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.errors import BenchError, unknown
from bench.identity import added

SAMPLERS = ("ddim", "ddpm")


def _prompts() -> list[str]:
    return ["a photo of {token} person", "a dslr portrait of {token} person"]


@dataclass
class CustomizationProtocol:
    """How the attacker's model is asked for pictures of a subject.

    ``prompts``: ``{token}`` stands for the word that names the person. ``per_prompt``: images per prompt and
    subject. ``steps``, ``guidance``: of the sampler, guidance 1 means none. ``clean_share``: partial protection, the
    share of each subject's published photos of which the attacker has the original; of n photos it is the nearest
    whole number, a half to the even one. ``protect_seed``: seed of the protection alone; then ``seed`` is that of the
    attacker, and several attackers meet the same protected photos. None: the protection has the cell's seed too.
    """

    prompts: list[str] = field(default_factory=_prompts)
    per_prompt: int = 8
    sampler: str = "ddim"
    steps: int = 25
    guidance: float = 7.5
    clean_share: float = added(0.0)
    protect_seed: int | None = added(None)

    def __post_init__(self) -> None:
        _require_prompts(self.prompts)
        _require_range("customization.clean_share", self.clean_share, 0, 0.75)
        _require_sampler("customization", self.sampler)
        _require_range("customization.per_prompt", self.per_prompt, 1, 10_000)
        _require_range("customization.steps", self.steps, 1, 1000)
        _require_range("customization.guidance", self.guidance, 0, 100)


@dataclass
class BackdoorProtocol:
    """How models are sampled, without and with the trigger. ``samples``: images per model, from the same seeds.

    ``steps``: of the sampler; a model whose chain is shorter is sampled over its whole chain. ``clip``: clip the
    estimate of the clean image to [-1, 1] at every step. Backdoor papers sample without it, for it is itself a
    mitigation; published checkpoints' own configs often have it on. ``guidance``: of text-to-image models, whose
    prompts are the captions of the data's reference images, over and over. ``judge``: the CLIP model, micro-clip or a
    folder, that says whether a picture shows what a caption says, where that is the backdoor's target.
    """

    samples: int = 128
    sampler: str = "ddpm"
    steps: int = 1000
    clip: bool = False
    guidance: float = added(7.5)
    judge: str = added("micro-clip")

    def __post_init__(self) -> None:
        _require_sampler("backdoor", self.sampler)
        _require_range("backdoor.samples", self.samples, 2, 1_000_000)
        _require_range("backdoor.steps", self.steps, 1, 1000)
        _require_range("backdoor.guidance", self.guidance, 0, 100)


@dataclass
class EditingProtocol:
    """How the attacker's editor is asked. ``seeds``: pictures per photo. ``sampler``, ``steps``, ``guidance``: of the
    editor, guidance 1 means none; an editor's own options, say its strength, are the attack's. ``told``: whether the
    defender knows what will be asked. ``judge``: the CLIP model, micro-clip or a folder, that says which caption fits a
    picture."""

    seeds: int = 2
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 7.5
    told: bool = True
    judge: str = "micro-clip"

    def __post_init__(self) -> None:
        _require_sampler("editing", self.sampler)
        _require_range("editing.seeds", self.seeds, 2, 1000)
        _require_range("editing.steps", self.steps, 1, 1000)
        _require_range("editing.guidance", self.guidance, 0, 100)


Protocol = CustomizationProtocol | EditingProtocol | BackdoorProtocol


def _require_prompts(prompts: list[str]) -> None:
    if not prompts:
        raise BenchError("customization.prompts is empty; give at least one prompt with {token} in it.")
    for prompt in prompts:
        if "{token}" not in prompt or _fields(prompt) != {"token"}:
            raise BenchError(f"customization.prompts: '{prompt}' must contain {{token}}, the word that names the "
                             "person, and no other braces.")


def _fields(prompt: str) -> set[str | None]:
    from string import Formatter

    try:
        return {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
    except ValueError:
        return set()


def _require_sampler(where: str, sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, f"{where}.sampler", SAMPLERS)


def _require_range(where: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BenchError(f"{where}={value} is out of range; give {low:g} to {high:g}.")
