"""Backdoor: clean model - implant - [public model | sealed Secret] - defend - generate(clean, triggered) - score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from bench.codecs import GenerationsCodec, ImplantCodec, ModelCodec
from bench.errors import Incompatible
from bench.identity import digest
from bench.plugin import facts_of, identity
from bench.records import BackdoorEvidence, Generations, ImageSet, Model, Samples, Secret
from bench.workbench import Outcome, Workbench

if TYPE_CHECKING:
    from torch import Tensor

    from bench.config import Cell
    from bench.context import Context
    from bench.protocols import BackdoorProtocol

VERSION = 1


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
    samples = {name: sample_both(one, secret, cell, bench) for name, one in models.items()}
    evidence = BackdoorEvidence(reference, samples["clean"], samples["implanted"], samples["defended"], secret,
                                cluster=implanted.key)
    inputs = {**origin, "implant": implanted.key, "repair": repaired.key, "protocol": cell.protocol}
    return Outcome(evidence, inputs, pictures(evidence))


def sample_both(model: Model, secret: Secret, cell: Cell, bench: Workbench) -> Samples:
    """Samples from the same seeds without and with the trigger."""
    return Samples(sample(model, None, cell, bench), sample(model, secret, cell, bench))


def sample(model: Model, secret: Secret | None, cell: Cell, bench: Workbench) -> Generations:
    protocol = cast("BackdoorProtocol", cell.protocol)
    asked: dict[str, Any] = {"model": model.digest, "trigger": fingerprint(secret), "protocol": protocol,
                             "seed": cell.seed}
    seeds = [int(digest([cell.seed, place], length=15), 16) for place in range(protocol.samples)]
    return bench.stage(
        "sample", VERSION, asked, lambda ctx: draw(model, secret, seeds, protocol, ctx), GenerationsCodec(),
        seeded_by={"seed": cell.seed},
    ).value


def fingerprint(secret: Secret | None) -> str:
    """The trigger's digest, "" without one: what the samples depend on."""
    if secret is None:
        return ""
    if isinstance(secret.trigger, str):
        return secret.trigger
    return digest([round(v, 6) for v in secret.trigger.flatten().tolist()])


def draw(
    model: Model, secret: Secret | None, seeds: list[int], protocol: BackdoorProtocol, ctx: Context,
) -> Generations:
    """Image triggers are added to the initial noise; the sampler itself is the ordinary one."""
    from bench.diffusion.sampling import draw_unconditional

    shift = None if secret is None else secret.trigger
    if isinstance(shift, str):
        raise Incompatible(f"'{shift}' is a word, but this model draws from noise alone.")
    pixels = draw_unconditional(model, seeds, shift, protocol, ctx)
    names = tuple(f"{place:04d}" for place in range(len(seeds)))
    return Generations(ImageSet(pixels, names), ("",) * len(seeds), tuple(seeds))


def pictures(evidence: BackdoorEvidence) -> dict[str, Tensor]:
    """One sheet: clean, implanted, defended model; left half without, right half with the trigger; last the target."""
    import torch

    rows = [torch.cat([both.plain.images.pixels[:6], both.triggered.images.pixels[:6]])
            for both in (evidence.clean, evidence.implanted, evidence.defended)]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return {"clean_implanted_defended": sheet, "target": evidence.secret.target}
