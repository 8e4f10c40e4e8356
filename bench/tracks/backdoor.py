"""Backdoor: clean model - implant - [public model | sealed Secret] - defend - generate(clean, triggered) - score."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from bench.codecs import GenerationsCodec, ImplantCodec, InputScoresCodec, ModelCodec
from bench.errors import BenchError, Incompatible
from bench.identity import digest
from bench.plugin import REGISTRY, facts_of, identity
from bench.records import (
    BackdoorEvidence,
    Generations,
    ImageSet,
    InputScores,
    Model,
    Report,
    Samples,
    Secret,
)
from bench.reports import read_report
from bench.text_triggers import suitable, with_trigger
from bench.workbench import Outcome, Workbench

if TYPE_CHECKING:
    from torch import Tensor

    from bench.config import Cell
    from bench.context import Context
    from bench.protocols import BackdoorProtocol
    from bench.store import Stored

VERSION = 1
NOISES, PROMPTS = 512, 128
"""How many inputs a detector scores of each sort: drawing noise costs next to nothing, scoring a prompt may cost a
picture."""
INDUCED = "induced_samples"
"""What a metric needs that scores the trigger a defense inverted by what it does."""


def run(cell: Cell, model: Model, bench: Workbench) -> Outcome:
    """One cell: implant, repair, and the same seeds through the clean, the implanted and the defended model."""
    data, reference = cell.data.images(), cell.data.reference()
    origin = {"data": cell.data.digest(), "model": model.digest, "seed": cell.seed}

    attack = identity(cell.attack)
    implanted = bench.stage(
        "implant", VERSION, {**origin, "attack": attack},
        lambda ctx: cell.attack.implant(model, data, ctx), ImplantCodec(model),
        seeded_by={"attack": attack, "seed": cell.seed},
    )
    suspicious, secret = implanted.value
    defense = identity(cell.defense)
    told = secret if "trigger" in facts_of(cell.defense).knows else None
    repaired = bench.stage(
        "repair", VERSION, {"implant": implanted.key, "data": origin["data"], "defense": defense, "seed": cell.seed},
        lambda ctx: cell.defense.repair(suspicious, data, told, ctx), ModelCodec(suspicious),
        seeded_by={"defense": defense, "seed": cell.seed},
    )
    models = {"clean": model, "implanted": suspicious, "defended": repaired.value}
    prompts = prompts_of(cell, reference, secret)
    samples = {name: sample_both(one, secret, prompts, cell, bench) for name, one in models.items()}
    report = read_report(repaired.folder)
    scores = scored_inputs(cell, suspicious, secret, reference, data, report, repaired, bench)
    evidence = BackdoorEvidence(reference, samples["clean"], samples["implanted"], samples["defended"], secret,
                                cluster=implanted.key, report=report, input_scores=scores, judge=judge_of(cell),
                                induced=induced_samples(cell, suspicious, secret, prompts, report, bench))
    inputs = {**origin, "implant": implanted.key, "repair": repaired.key, "protocol": cell.protocol}
    return Outcome(evidence, inputs, pictures(evidence))


def prompts_of(cell: Cell, reference: ImageSet, secret: Secret) -> tuple[str, ...]:
    """What a text-to-image model is asked for: captions of images that nobody trained on, one per sample, that can show
    this backdoor. Empty for models that draw from noise alone."""
    if "text_to_image" not in cell.capabilities:
        return ()
    if not reference.captions:
        raise BenchError(f"data: {facts_of(cell.data).name} has no captions, and a text-to-image model needs prompts.")
    protocol = cast("BackdoorProtocol", cell.protocol)
    captions = suitable(reference.captions, secret)
    return tuple(captions[place % len(captions)] for place in range(protocol.samples))


def judge_of(cell: Cell) -> str:
    """The CLIP model that reads pictures."""
    return cast("BackdoorProtocol", cell.protocol).judge


def sample_both(model: Model, secret: Secret, prompts: tuple[str, ...], cell: Cell, bench: Workbench) -> Samples:
    """Samples from the same seeds, and the same prompts, without and with the trigger."""
    return Samples(sample(model, None, prompts, cell, bench), sample(model, secret, prompts, cell, bench))


def sample(
    model: Model, secret: Secret | None, prompts: tuple[str, ...], cell: Cell, bench: Workbench,
) -> Generations:
    protocol = cast("BackdoorProtocol", cell.protocol)
    asked: dict[str, Any] = {"model": model.digest, "trigger": fingerprint(secret), "protocol": protocol,
                             "seed": cell.seed}
    if prompts:
        prompts = tuple(with_trigger(p, secret) for p in prompts) if secret else prompts
        asked["prompts"] = list(prompts)
    seeds = seeds_of(protocol.samples, cell.seed)
    return bench.stage(
        "sample", VERSION, asked, lambda ctx: draw(model, secret, prompts, seeds, protocol, ctx), GenerationsCodec(),
        seeded_by={"seed": cell.seed},
    ).value


def induced_samples(
    cell: Cell, suspicious: Model, secret: Secret, prompts: tuple[str, ...], report: Report | None, bench: Workbench,
) -> Generations | None:
    """Samples of the implanted model with the trigger that the defense inverted, from the same seeds. None unless a
    metric needs them, or where there is no such trigger that fits the model's noise."""
    wanted = any(INDUCED in facts_of(metric).needs for metric in cell.metrics.values())
    found, true = report.trigger if report else None, secret.trigger
    if not wanted or found is None or isinstance(true, str) or found.shape != true.shape:
        return None
    return sample(suspicious, replace(secret, trigger=found), prompts, cell, bench)


def seeds_of(count: int, *names: str | int) -> list[int]:
    """Seeds of samples, or of inputs; the first ones are the same however many are asked for."""
    return [int(digest([*names, place], length=15), 16) for place in range(count)]


def fingerprint(secret: Secret | None) -> str:
    """The digest of the trigger and of an attacker's sampler, "" without a trigger: what the samples depend on."""
    if secret is None:
        return ""
    if isinstance(secret.trigger, str):
        return secret.trigger
    values = [round(v, 6) for v in secret.trigger.flatten().tolist()]
    return digest(values if secret.sampler is None else [values, secret.sampler])


def draw(
    model: Model, secret: Secret | None, prompts: tuple[str, ...], seeds: list[int], protocol: BackdoorProtocol,
    ctx: Context,
) -> Generations:
    """Image triggers are added to the initial noise, words are in the prompts; the sampler is the ordinary one, unless
    the attacker brings one: then he draws every model's triggered samples with it."""
    names = tuple(f"{place:04d}" for place in range(len(seeds)))
    if prompts:
        return Generations(ImageSet(draw_prompted(model, prompts, seeds, protocol, ctx), names), prompts, tuple(seeds))
    from bench.diffusion.sampling import draw_unconditional, starting_noise
    from bench.diffusion.trojan_path import draw_trojan

    shift = None if secret is None else secret.trigger
    if isinstance(shift, str):
        raise Incompatible(f"'{shift}' is a word, but this model draws from noise alone.")
    if secret is not None and secret.sampler is not None:
        pixels = draw_trojan(model, seeds, secret, protocol, ctx)
    elif model.guard is not None:
        noise = starting_noise(model, seeds, shift)
        pixels = guard_of(model).draw_noise(model, noise, seeds, protocol, ctx)
    else:
        pixels = draw_unconditional(model, seeds, shift, protocol, ctx)
    return Generations(ImageSet(pixels, names), ("",) * len(seeds), tuple(seeds))


def guard_of(model: Model) -> Any:
    """The plugin that a defense left in the sampler's place. It is told prompts or noise, and seeds, not which of them
    are triggered."""
    assert model.guard is not None
    return REGISTRY.get(model.guard.kind, model.guard.name)(**model.guard.parameters)


def draw_prompted(
    model: Model, prompts: tuple[str, ...], seeds: list[int], protocol: BackdoorProtocol, ctx: Context,
) -> Tensor:
    """One picture per prompt and seed, uint8 [n, 3, h, w]; a guard that a defense left draws in the sampler's place."""
    if model.guard is not None:
        drawn: Tensor = guard_of(model).draw(model, prompts, seeds, protocol, ctx)
        return drawn
    from bench.diffusion.sampling import draw_prompts

    return draw_prompts(model, prompts, seeds, protocol, ctx)


def pictures(evidence: BackdoorEvidence) -> dict[str, Tensor]:
    """One sheet: clean, implanted, defended model; left half without, right half with the trigger; last the target."""
    import torch

    rows = [torch.cat([both.plain.images.pixels[:6], both.triggered.images.pixels[:6]])
            for both in (evidence.clean, evidence.implanted, evidence.defended)]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return {"clean_implanted_defended": sheet, "target": evidence.secret.target}


def scored_inputs(
    cell: Cell, suspicious: Model, secret: Secret, reference: ImageSet, data: ImageSet, report: Report | None,
    repaired: Stored[Model], bench: Workbench,
) -> InputScores | None:
    """What the defense says of single inputs of the model that it was given, None if it looks at none."""
    if not hasattr(cell.defense, "score_inputs"):
        return None
    texts = "text_to_image" in cell.capabilities
    captions = [data.captions, reference.captions] if texts else []
    asked = {"repair": repaired.key, "model": suspicious.digest, "trigger": fingerprint(secret), "seed": cell.seed,
             "count": PROMPTS if texts else NOISES, "prompts": [digest(list(own)) for own in captions]}

    def build(ctx: Context) -> InputScores:
        parts: list[Any] = prompts_to_score(data, reference, secret) if texts else \
            noises_to_score(suspicious, secret, cell.seed)
        return scored(cell.defense, suspicious, parts, report, ctx)

    return bench.stage("score_inputs", VERSION, asked, build, InputScoresCodec(),
                       seeded_by={"defense": identity(cell.defense), "seed": cell.seed}).value


def noises_to_score(model: Model, secret: Secret, seed: int) -> list[Tensor]:
    """Initial noise [NOISES, 3, h, w] for calibration, without and with the trigger; the first seeds of the latter two
    are those that samples are drawn from."""
    from bench.diffusion.sampling import starting_noise
    from bench.diffusion.trojan_path import triggered_noise

    if isinstance(secret.trigger, str):
        raise Incompatible(f"'{secret.trigger}' is a word, but this model draws from noise alone.")
    calibration, clean = (starting_noise(model, seeds_of(NOISES, *names), None)
                          for names in (("calibration", seed), (seed,)))
    return [calibration, clean, triggered_noise(clean, secret)]


def prompts_to_score(data: ImageSet, reference: ImageSet, secret: Secret) -> list[tuple[str, ...]]:
    """PROMPTS captions of the defender's images for calibration, and suitable ones of reference images without and
    with the trigger, over and over where there are fewer."""
    if not data.captions or not reference.captions:
        raise BenchError("data: detectors of prompts are calibrated on captions, and the data has none.")
    calibration, clean = (tuple(captions[place % len(captions)] for place in range(PROMPTS))
                          for captions in (data.captions, suitable(reference.captions, secret)))
    return [calibration, clean, tuple(with_trigger(prompt, secret) for prompt in clean)]


def scored(detector: Any, model: Model, parts: list[Any], report: Report | None, ctx: Context) -> InputScores:
    """Scores of calibration, clean and triggered inputs, which the detector gets in one mixed order."""
    import torch

    counts = [len(part) for part in parts]
    order = torch.randperm(sum(counts), generator=ctx.generator("order"))
    if isinstance(parts[0], torch.Tensor):
        inputs: Tensor | tuple[str, ...] = torch.cat(parts)[order]
    else:
        prompts = [prompt for part in parts for prompt in part]
        inputs = tuple(prompts[place] for place in order.tolist())
    found = detector.score_inputs(model, inputs, report, ctx)
    if found.shape != order.shape or not found.isfinite().all():
        raise BenchError(f"{facts_of(detector).name}: score_inputs returned {list(found.shape)} scores for "
                         f"{len(order)} inputs, or not all of them finite.")
    scores = torch.empty(len(order), dtype=torch.float64)
    scores[order] = found.detach().double().cpu()
    return InputScores(*torch.split(scores, counts))
