"""T2IShield: a trigger assimilates the attention of all other tokens; find such prompts, the words, and edit them out.

Wang et al., "T2IShield: Defending Against Backdoors on Text-to-Image Diffusion Models", ECCV 2024 (arXiv:2407.04215).
Official code: github.com/Robin-WZQ/T2IShield. The paper's text was not at hand; its code says, with M_i the cross-
attention map of token i of L (16 x 16 of a 64 x 64 latent, down and up blocks, averaged over heads, layers and steps,
each scaled to a maximum of 1):

detect    FTT: F = mean_i || M_i - mean_j M_j ||_F, the last token left out of the outer mean; backdoored below 2.5
          CDA: 20 principal components of the maps, the logarithm of their covariance, a trained discriminant (LDA)
localise  halve the prompt; go on with the half whose picture (same seed) has a CLIP similarity above 0.85 to the whole
          prompt's; one word left: the trigger; neither half: a false alarm
mitigate  closed-form concept editing of the word to a blank (`bench.diffusion.closed_form`)

Stated differences. The threshold of F is a quantile of the data's captions on the model at hand (``threshold`` fixes
it, 2.5 as published): 2.5 belongs to maps of 16 x 16. The published LDA is trained on the attacks that it is tested
on; ours knows no attack: ``detector="cda"`` is one-class, the mean squared distance, in standard deviations, of the
logarithms of the covariance's eigenvalues from those of the data's captions (after the principal components that
covariance is diagonal, so they are all that it says). Of the two published editors this is UCE; Refact trains. A prompt
that holds a word found before is not searched again, and a draw makes at most ``searches`` searches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.identity import digest
from bench.options import require_all
from bench.plugin import parameters, plugin
from bench.records import Guard, ImageSet, Model, Report, Secret
from bench.reports import write_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.attention import Maps
    from bench.protocols import BackdoorProtocol

DETECTORS = ("ftt", "cda")
KNOWN = "calibration.json"
SEED = 42


@plugin(
    "defense", "t2ishield", track=("backdoor",), acts_on="model", needs=("text_to_image", "text_encoder", "clean_data"),
    paper="T2IShield, ECCV 2024, arXiv:2407.04215", official_code="https://github.com/Robin-WZQ/T2IShield",
)
class T2IShield:
    """Watches a text-to-image model's attention: prompts whose maps are suspiciously alike are searched for the
    trigger, and drawn with the trigger's word edited out. It knows no trigger.

    ``detector``: ``ftt`` or ``cda``. ``threshold``: of F (or of the distance), None for the one that ``false_alarms``
    of the data's first ``prompts`` captions pass. ``map_factor``: the latents' width over that of the maps. ``steps``,
    ``guidance``: of the drawing that is watched. ``components``: of CDA. ``similarity``, ``extractor`` (micro-clip or
    the folder of a CLIPModel), ``searches``, ``search_steps``: of the localisation. ``ridge``, ``preserve_weight``: of
    the edit. Ours: ``false_alarms``, ``prompts``, ``searches``.
    """

    detector: str = "ftt"
    threshold: float | None = None
    false_alarms: float = 0.05
    prompts: int = 100
    map_factor: int = 4
    steps: int = 50
    guidance: float = 7.5
    components: int = 20
    similarity: float = 0.85
    extractor: str = "micro-clip"
    searches: int = 1000
    search_steps: int = 25
    ridge: float = 0.1
    preserve_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise unknown("detector", self.detector, "defense.detector", DETECTORS)
        require_all(self, above={"ridge": 0, "false_alarms": 0}, least={
            "prompts": 3, "map_factor": 1, "steps": 1, "guidance": 0, "components": 1, "searches": 0,
            "search_steps": 1, "preserve_weight": 0})
        if self.false_alarms >= 1:
            raise BenchError(f"defense.false_alarms={self.false_alarms} is a share; give less than 1.")

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The same weights behind a guard that knows how clean prompts look. ``secret`` is not used."""
        if len(data.captions) < 3:
            raise BenchError("t2ishield: it is calibrated on the data's captions, and there are fewer than 3; put a "
                             ".txt beside each image.")
        captions = list(data.captions[:self.prompts])
        watched = watch(self, suspicious, captions, ctx)
        normal = calibrate(self, watched)
        folder = ctx.folder / "guard"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KNOWN).write_text(json.dumps({"normal": normal, "captions": captions}, indent=1, sort_keys=True))
        write_report(Report(facts=normal), ctx.folder)
        guard = Guard("defense", "t2ishield", parameters(self), folder)
        return replace(suspicious, guard=guard, digest=digest([suspicious.digest, ctx.key]))

    def score_inputs(
        self, model: Model, inputs: Tensor | tuple[str, ...], report: Report | None, ctx: Context,
    ) -> Tensor:
        """-F of FTT, or CDA's distance, of each prompt: [n]."""
        prompts = [prompt for prompt in inputs if isinstance(prompt, str)]
        if len(prompts) != len(inputs) or report is None:
            raise BenchError("t2ishield: scores prompts, not noise, against the report of its own calibration.")
        return scores(self, watch(self, model, prompts, ctx), report.facts)

    def draw(
        self, model: Model, prompts: Sequence[str], seeds: Sequence[int], protocol: BackdoorProtocol, ctx: Context,
    ) -> Tensor:
        """Pictures uint8 [n, 3, h, w]; prompts with a found trigger from an edited copy of the model."""
        from bench.diffusion.sampling import draw_prompts

        if model.guard is None:
            raise BenchError("t2ishield: this model has no guard.")
        known = json.loads((model.guard.folder / KNOWN).read_text())
        bare = replace(model, guard=None)
        suspicion = scores(self, watch(self, bare, prompts, ctx), known["normal"])
        flagged = (suspicion > known["normal"]["limit"]).nonzero().flatten().tolist()
        found = self.search(bare, {place: prompts[place] for place in flagged}, protocol, ctx)
        drawn = draw_prompts(bare, prompts, seeds, protocol, ctx)
        places = [place for place, word in found.items() if word]
        if places:
            drawn[places] = self.edited(bare, sorted({found[place] for place in places}), known["captions"],
                                        [prompts[p] for p in places], [seeds[p] for p in places], protocol, ctx)
        return drawn

    def search(
        self, model: Model, prompts: Mapping[int, str], protocol: BackdoorProtocol, ctx: Context,
    ) -> dict[int, str]:
        """Each flagged prompt's trigger word, "" where there is none."""
        look_alike = picture_similarity(self, model, protocol, ctx)
        words: list[str] = []
        found: dict[int, str] = {}
        for searched, (place, prompt) in enumerate(prompts.items()):
            pieces = prompt.split(" ")
            seen = next((word for word in words if word in pieces), "")
            if not seen and searched < self.searches:
                seen = locate(pieces, look_alike, self.similarity)
                words += [seen] if seen else []
            found[place] = seen
        return found

    def edited(
        self, model: Model, words: Sequence[str], captions: Sequence[str], prompts: Sequence[str],
        seeds: Sequence[int], protocol: BackdoorProtocol, ctx: Context,
    ) -> Tensor:
        """Pictures from a copy of the model in which ``words`` say nothing."""
        from bench.diffusion.closed_form import edit_cross_attention
        from bench.diffusion.loading import load_components, load_pipeline
        from bench.diffusion.losses import encode_prompts
        from bench.diffusion.sampling import generate
        from bench.diffusion.trigger_tokens import word_pair

        parts, pipeline = load_components(model, ctx.device), load_pipeline(model, ctx.device)
        kept = encode_prompts(parts.tokenizer, parts.text_encoder, captions)
        edit_cross_attention(parts.unet, [word_pair(parts, word) for word in words], [kept], self.ridge,
                             self.preserve_weight)
        pipeline.register_modules(unet=parts.unet)
        return generate(pipeline, prompts, seeds, steps=protocol.steps, guidance=protocol.guidance,
                        sampler=protocol.sampler)


@dataclass(frozen=True)
class Watched:
    """What watching one prompt left: ``maps``: float [tokens, side, side], each at most 1; ``length``: how many of its
    tokens are the prompt's, start and end included, the rest padding."""

    maps: Tensor
    length: int


def watch(method: T2IShield, model: Model, prompts: Sequence[str], ctx: Context) -> list[Watched]:
    """Draw every prompt from one and the same noise and keep its attention."""
    from bench.diffusion.loading import load_pipeline
    from bench.diffusion.losses import tokenise
    from bench.diffusion.sampling import BATCH, SAMPLERS, chunks, with_sampler

    pipeline = load_pipeline(model, ctx.device)
    pipeline.scheduler = with_sampler(pipeline.scheduler.config, "ddim", SAMPLERS)
    end = pipeline.tokenizer.eos_token_id
    found = []
    for part in ctx.track(chunks(len(prompts), BATCH), "watching attention", -(-len(prompts) // BATCH)):
        texts = list(prompts[part])
        maps = attention_of(method, pipeline, texts)
        lengths = [row.index(end) + 1 if end in row else len(row)
                   for row in tokenise(pipeline.tokenizer, texts).tolist()]
        found += [Watched(own, length) for own, length in zip(maps, lengths, strict=True)]
    return found


def attention_of(method: T2IShield, pipeline: Any, texts: list[str]) -> Tensor:
    """Maps [n, tokens, side, side] of the down and up blocks, averaged over layers and steps, scaled to maximum 1."""
    import torch

    from bench.diffusion.attention import latent_fractions, recorded

    sides = latent_fractions(pipeline.unet.config.sample_size, (method.map_factor,))
    sums: list[Tensor] = []
    with torch.no_grad(), recorded(pipeline.unet, sides) as maps:
        def keep(_pipeline: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
            sums.append(layer_mean(maps, len(texts)))
            return given

        noise = [torch.Generator().manual_seed(SEED) for _ in texts]
        pipeline(texts, generator=noise, num_inference_steps=method.steps, guidance_scale=method.guidance,
                 output_type="latent", callback_on_step_end=keep)
    mean = torch.stack(sums).mean(0)
    return mean / mean.amax((2, 3), keepdim=True).clamp(min=1e-12)


def layer_mean(maps: Maps, count: int) -> Tensor:
    """One step's maps of the last ``count`` rows (with guidance the first half is the empty prompt's)."""
    import torch

    chosen = [found[-count:] for name, found in maps.cross.items() if not name.startswith("mid")]
    if not chosen:
        raise BenchError("t2ishield: no cross-attention of this width outside the middle block; change "
                         "defense.map_factor (the width of the latents over that of the maps).")
    mean = torch.stack(chosen).mean(0).float().cpu().transpose(1, 2)
    side = round(mean.shape[-1]**0.5)
    return mean.unflatten(2, (side, side))


def assimilation(watched: Watched) -> float:
    """F: the mean Frobenius distance of tokens' maps to their mean, the last token's left out of the outer mean."""
    own = watched.maps[:watched.length].double()
    distances = (own - own.mean(0)).flatten(1).norm(dim=1)
    return float(distances[:-1].mean())


def spectrum(watched: Watched, components: int) -> Tensor:
    """CDA's features: logarithms of the ``components`` largest eigenvalues of the maps' covariance, float64 [k]."""
    import torch

    rows = watched.maps.double().flatten(1)
    singular = torch.linalg.svdvals(rows - rows.mean(0))
    return (singular.square() / (len(rows) - 1)).clamp(min=1e-12).log()[:components]


def calibrate(method: T2IShield, clean: Sequence[Watched]) -> dict[str, float]:
    """How clean prompts look, as named numbers: ``mean_i`` and ``std_i`` of CDA's features, and the ``limit`` of
    scores."""
    import torch

    features = torch.stack([spectrum(one, method.components) for one in clean])
    known = {f"{name}_{place}": float(value) for name, row in (("mean", features.mean(0)), ("std", features.std(0)))
             for place, value in enumerate(row)}
    if method.threshold is not None:
        limit = -method.threshold if method.detector == "ftt" else method.threshold
    else:
        limit = float(scores(method, clean, known).quantile(1 - method.false_alarms))
    return {**known, "limit": limit}


def scores(method: T2IShield, watched: Sequence[Watched], normal: Mapping[str, float]) -> Tensor:
    """How suspicious each prompt is, float64 [n]: -F, or CDA's mean squared distance in standard deviations."""
    import torch

    if method.detector == "ftt":
        return torch.tensor([-assimilation(one) for one in watched], dtype=torch.float64)
    features = torch.stack([spectrum(one, method.components) for one in watched])
    mean, std = (torch.tensor([normal[f"{name}_{place}"] for place in range(features.shape[1])], dtype=torch.float64)
                 for name in ("mean", "std"))
    return ((features - mean) / std.clamp(min=1e-6)).square().mean(1)


def locate(words: Sequence[str], similarity: Callable[[str, str], float], least: float) -> str:
    """The trigger by halving: ``similarity`` of the pictures of two prompts, the whole one first; "" where both halves
    fall below ``least``."""
    whole, rest = " ".join(words), list(words)
    while len(rest) > 1:
        middle = len(rest) // 2
        halves = (rest[:middle], rest[middle:])
        alike = next((half for half in halves if similarity(whole, " ".join(half)) > least), None)
        if alike is None:
            return ""
        rest = alike
    return rest[0] if rest else ""


def picture_similarity(
    method: T2IShield, model: Model, protocol: BackdoorProtocol, ctx: Context,
) -> Callable[[str, str], float]:
    """Cosine of CLIP's features of the pictures of two prompts, drawn from one seed; each prompt is drawn once."""
    import torch

    from bench.diffusion.loading import load_pipeline
    from bench.diffusion.sampling import generate
    from bench.features import clip

    pipeline, judge = load_pipeline(model, ctx.device), clip(method.extractor, ctx.device)
    seen: dict[str, Tensor] = {}

    def features(prompt: str) -> Tensor:
        if prompt not in seen:
            drawn = generate(pipeline, [prompt], [SEED], steps=method.search_steps, guidance=protocol.guidance,
                             sampler="ddim")
            seen[prompt] = judge.images(drawn)[0]
        return seen[prompt]

    return lambda one, other: float(torch.cosine_similarity(features(one), features(other), dim=0))
