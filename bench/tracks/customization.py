"""Customization: subject - protect(B) - [mix] - purify - customise - generate(prompts, seeds) - score against C and A.

The defender protects on the surrogate, the attacked model where the cell names none; everything after it happens on the
attacked model. ``clean_share`` of the protocol puts originals among the photos that the attacker finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from bench.codecs import CustomisedCodec, GenerationsCodec, ImageSetsCodec
from bench.errors import BenchError
from bench.identity import digest
from bench.plugin import facts_of, identity
from bench.records import Customised, CustomizationEvidence, Generations, ImageSet, Model, Subject
from bench.workbench import Outcome, Workbench

if TYPE_CHECKING:
    from torch import Tensor

    from bench.config import Cell
    from bench.context import Context
    from bench.protocols import CustomizationProtocol
    from bench.store import Stored

VERSION = 1
PICTURED = 2
"""Subjects whose strips a result keeps, and photos on a strip."""


def run(cell: Cell, model: Model, bench: Workbench) -> Outcome:
    """One cell, from photos to samples. Every stage is stored; each subject is customised on its own."""
    subjects: Sequence[Subject] = cell.data.subjects()
    origin = {"data": cell.data.digest(), "model": model.digest, "seed": cell.seed}

    defense, surrogate = identity(cell.defense), surrogate_of(cell, model)
    seed = protect_seed(cell)
    protected = bench.stage(
        "protect", VERSION, {**origin, "model": surrogate.digest, "defense": defense, "seed": seed},
        lambda ctx: protect(cell, subjects, surrogate, ctx), ImageSetsCodec(),
        seeded_by={"defense": defense["name"], "seed": seed},
    )
    purifier, found = identity(cell.purifier), mixed(cell, subjects, protected.value)
    share = protocol_of(cell).clean_share
    purified = bench.stage(
        "purify", VERSION, {"photos": protected.key, "model": model.digest, "purifier": purifier, "seed": cell.seed,
                            **({"clean_share": share} if share else {})},
        lambda ctx: purify(cell, found, model, ctx), ImageSetsCodec(),
        seeded_by={"purifier": purifier, "seed": cell.seed},
    )
    generated, tokens, keys = {}, {}, {}
    for subject in subjects:
        customised, drawn = attack(cell, subject, purified.value[subject.name], model, bench)
        tokens[subject.name], generated[subject.name] = customised.value.token, drawn.value
        keys[subject.name] = drawn.key
    evidence = CustomizationEvidence(
        tuple(subjects), protected.value, purified.value, generated, budget_of(cell.defense), tokens,
    )
    inputs = {**origin, "protected": protected.key, "purified": purified.key, "generated": keys}
    return Outcome(evidence, inputs, pictures(evidence) if pictured(cell) else {})


def surrogate_of(cell: Cell, model: Model) -> Model:
    """The model that photos are protected on."""
    from bench.diffusion.checkpoints import resolve

    return resolve(cell.surrogate, cell.allow_pickle) if cell.surrogate else model


def protect_seed(cell: Cell) -> int:
    """The seed of the protection: the protocol's own, or the cell's."""
    own = protocol_of(cell).protect_seed
    return cell.seed if own is None else own


def protocol_of(cell: Cell) -> CustomizationProtocol:
    return cast("CustomizationProtocol", cell.protocol)


def protect(cell: Cell, subjects: Sequence[Subject], model: Model, ctx: Context) -> dict[str, ImageSet]:
    """Set B of every subject after the defense; refuses photos that left the budget."""
    protected = cell.defense.protect(subjects, model, ctx)
    for subject, photos in zip(subjects, protected, strict=True):
        check_budget(cell, subject, photos)
    return {subject.name: photos for subject, photos in zip(subjects, protected, strict=True)}


def check_budget(cell: Cell, subject: Subject, photos: ImageSet) -> None:
    """The largest change of the uint8 photo, which the store saves without loss, must not exceed eps."""
    change = (photos.pixels.int() - subject.published.pixels.int()).abs().max().item()
    eps = cell.defense.budget().eps
    if change > eps:
        raise BenchError(f"defense '{identity(cell.defense)['name']}': photos of {subject.name} change by {change} "
                         f"levels, over their budget of {eps}; the result would be invalid.")


def mixed(cell: Cell, subjects: Sequence[Subject], protected: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
    """What the attacker finds: the protected photos, a share of them replaced by their originals."""
    share = protocol_of(cell).clean_share
    return {s.name: partly(s, protected[s.name], unprotected(s, share, cell.seed)) for s in subjects}


def unprotected(subject: Subject, share: float, seed: int) -> list[int]:
    """Which of a subject's published photos stay as they were: the same under every defense, and with a larger share
    those of a smaller one and more."""
    names = subject.published.names
    order = sorted(range(len(names)), key=lambda place: digest([subject.name, seed, names[place]]))
    return sorted(order[:round(share * len(names))])


def partly(subject: Subject, photos: ImageSet, places: Sequence[int]) -> ImageSet:
    """``photos`` with the originals at ``places``."""
    if not places:
        return photos
    pixels = photos.pixels.clone()
    pixels[list(places)] = subject.published.pixels[list(places)]
    return replace(photos, pixels=pixels)


def purify(cell: Cell, photos: Mapping[str, ImageSet], model: Model, ctx: Context) -> dict[str, ImageSet]:
    return {name: cell.purifier.purify(images, model, ctx) for name, images in photos.items()}


def attack(
    cell: Cell, subject: Subject, photos: ImageSet, model: Model, bench: Workbench,
) -> tuple[Stored[Customised], Stored[Generations]]:
    """Customise on one subject's photos, then draw the protocol's prompts.

    The key depends on the pixels' own digest, so subjects share nothing and a defense that changes nothing is
    the same attack as no defense at all.
    """
    method = identity(cell.attack)
    seen = {"photos": digest_images(photos), "model": model.digest, "attack": method, "seed": cell.seed}
    customised = bench.stage(
        "customise", VERSION, seen,
        lambda ctx: cell.attack.customise(photos, subject.class_noun, model, ctx), CustomisedCodec(model),
        seeded_by={"attack": method, "subject": subject.name, "seed": cell.seed},
    )
    # Which photos the attacker had is in the customised model's key: the samples ask no more of it.
    protocol = replace(protocol_of(cell), clean_share=0.0, protect_seed=None)
    drawn = bench.stage(
        "generate", VERSION,
        {"customised": customised.key, "protocol": protocol, "subject": subject.name, "seed": cell.seed},
        lambda ctx: draw(customised.value, protocol, sample_seeds(subject, cell.seed, protocol), ctx),
        GenerationsCodec(), seeded_by={"subject": subject.name, "seed": cell.seed},
    )
    return customised, drawn


def sample_seeds(subject: Subject, seed: int, protocol: CustomizationProtocol) -> list[int]:
    """One seed per image, from subject, seed and place alone: the same noise under every defense and attack."""
    total = len(protocol.prompts) * protocol.per_prompt
    return [int(digest([subject.name, seed, place], length=15), 16) for place in range(total)]


def draw(customised: Customised, protocol: CustomizationProtocol, seeds: list[int], ctx: Context) -> Generations:
    from bench.diffusion.sampling import draw_customised

    prompts = [p.format(token=customised.token).replace("  ", " ")
               for p in protocol.prompts for _ in range(protocol.per_prompt)]
    pixels = draw_customised(customised, prompts, seeds, protocol, ctx)
    names = tuple(f"{place:03d}" for place in range(len(prompts)))
    return Generations(ImageSet(pixels, names, tuple(prompts)), tuple(prompts), tuple(seeds))


def digest_images(photos: ImageSet) -> str:
    import hashlib

    pixels = photos.pixels.contiguous()
    return digest({"shape": list(pixels.shape), "bytes": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
                   "captions": photos.captions})


def budget_of(defense: Any) -> Any:
    return defense.budget() if hasattr(defense, "budget") else None


def pictured(cell: Cell) -> bool:
    """Pictures for the reader of one seed's unpurified photos; more would make a large suite's folder heavy."""
    return cell.seed == 0 and facts_of(cell.purifier).control


def pictures(evidence: CustomizationEvidence) -> dict[str, Tensor]:
    """Per subject a strip: originals, protected, perturbation x10 around grey, generated."""
    return {f"strip_{subject.name}": strip(subject, evidence) for subject in evidence.subjects[:PICTURED]}


def strip(subject: Subject, evidence: CustomizationEvidence) -> Tensor:
    import torch

    original, protected = subject.published.pixels[:PICTURED], evidence.protected[subject.name].pixels[:PICTURED]
    change = ((protected.int() - original.int()) * 10 + 128).clamp(0, 255).to(torch.uint8)
    drawn = fitted(evidence.generated[subject.name].images.pixels[: len(original)], original.shape[-1])
    rows = [original, protected, change, drawn]
    width = min(len(row) for row in rows)
    return torch.cat([torch.cat(list(row[:width]), dim=2) for row in rows], dim=1)


def fitted(pixels: Tensor, side: int) -> Tensor:
    """Pictures at the photos' size: a model may draw at another than it was given."""
    from torch.nn.functional import interpolate

    if pixels.shape[-1] == side:
        return pixels
    return interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True).round().byte()
