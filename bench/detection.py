"""Detection boards: who tells poisoned models from models that were trained as long without poison?

Every defense that gives models a score takes part, whatever else it does. Positive = poisoned, always. A threshold is
set on clean models that are not scored: of the clean models, those with an even seed calibrate and those with an odd
one are scored. The unit of statistics is the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.identity import digest
from bench.results import PluginRecord, Result, data_identity
from bench.runs import Run, defense_key, is_control
from bench.stats import Estimate, auroc_of_groups, wilson

SCORE, FLAG, SUCCESS = "model_score", "model_flagged", "asr@implanted"
"""Measurements: what a defense's verdict on a model rests on, the verdict, and whether the backdoor works."""
RATE = 0.05
"""The rate of false positives that thresholds aim at."""
STAGE = "repair"


@dataclass(frozen=True)
class Suspect:
    """One model as one defense saw it. ``flagged``: by the defense's own rule; ``success``: of the backdoor, without
    the defense; ``group``: the attack's name, ``setting``: with the options that tell its models apart."""

    group: str
    setting: str
    seed: int
    poisoned: bool
    score: float
    flagged: bool | None
    success: float | None
    seconds: float

    @property
    def calibrates(self) -> bool:
        return not self.poisoned and self.seed % 2 == 0


@dataclass(frozen=True)
class Mistakes:
    """Models of one setting that a defense judged wrongly: poisoned ones that it ``missed``, or clean ones. ``of``: how
    many of that setting it saw; ``success``: of their backdoors, the mean."""

    missed: bool
    setting: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    of: int
    success: float | None


@dataclass(frozen=True)
class Detector:
    """One defense on a detection board. ``tpr``, ``fpr``, ``accuracy``: at ``threshold``, which comes from
    ``calibration`` other clean models; ``own_tpr``, ``own_fpr``: by the defense's own rule. ``by_attack``: tpr by the
    attack's name. ``lacks``: models that others scored and it did not, and why. ``seconds``: of its own stage.
    ``cells``: the ids of those that it scored."""

    label: str
    name: str
    control: bool
    knows: tuple[str, ...]
    poisoned: int
    clean: int
    calibration: int
    threshold: float | None
    auroc: Estimate
    tpr: Estimate
    fpr: Estimate
    accuracy: Estimate
    own_tpr: Estimate
    own_fpr: Estimate
    by_attack: Mapping[str, Estimate]
    mistakes: tuple[Mistakes, ...]
    seconds: float | None
    lacks: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class DetectionBoard:
    """Defenses on one population of models, by area under the ROC curve. ``rate``: of false positives, aimed at."""

    id: str
    track: str
    model: str
    data: str
    rate: float
    attacks: tuple[str, ...]
    detectors: tuple[Detector, ...]
    notes: tuple[str, ...] = ()


def population_key(result: Result) -> str:
    """The same for all cells whose models stand in one population: those made of one model with one data."""
    cell = result.cell
    return digest([cell.track, cell.model.digest or cell.model.name, data_identity(cell)])


def scores_models(run: Run) -> bool:
    measured = run.result.measurement(SCORE)
    return measured is not None and measured.value is not None


def make_detection(runs: Sequence[Run], labels: Mapping[str, str]) -> DetectionBoard | None:
    """The board of one population, None unless it has poisoned and clean models with a score.

    ``labels``: defense key -> what a board calls it.
    """
    settings = named_settings(run.result.cell.attack for run in runs)
    seen: dict[str, dict[str, Run]] = {}
    for run in runs:
        seen.setdefault(defense_key(run.result.cell), {}).setdefault(model_key(run.result), run)
    scored = {key: models for key, models in seen.items() if any(map(scores_models, models.values()))}
    everyone = {model for models in scored.values() for model, run in models.items() if scores_models(run)}
    detectors = [make_detector(labels[key], models, everyone, settings) for key, models in scored.items()]
    if not any(d.poisoned and d.clean for d in detectors):
        return None
    cell = runs[0].result.cell
    ordered = sorted(detectors, key=lambda d: (-(d.auroc.value if d.auroc.value is not None else -1.0), d.label))
    attacks = sorted({name for d in detectors for name in d.by_attack})
    return DetectionBoard(population_key(runs[0].result), cell.track, cell.model.name, cell.data.label, RATE,
                          tuple(attacks), tuple(ordered), tuple(remarks(ordered)))


def model_key(result: Result) -> str:
    """The same for all cells on one model under suspicion."""
    return digest([result.cell.attack.identity(), result.cell.seed])


def named_settings(attacks: Iterable[PluginRecord]) -> dict[str, str]:
    """Attack key -> its name with the options in which the population's attacks of that name differ."""
    records = {digest(attack.identity()): attack for attack in attacks}
    found = {}
    for key, attack in records.items():
        twins = [other for other in records.values() if other.name == attack.name]
        differing = [name for name, value in attack.parameters.items()
                     if any(twin.parameters.get(name) != value for twin in twins)]
        found[key] = " ".join([attack.name, *(f"{name}={attack.parameters[name]}" for name in differing)])
    return found


def make_detector(
    label: str, models: Mapping[str, Run], everyone: set[str], settings: Mapping[str, str],
) -> Detector:
    suspects = [suspect(run, settings) for run in models.values() if scores_models(run)]
    calibration = [s.score for s in suspects if s.calibrates]
    judged = [s for s in suspects if not s.calibrates]
    poisoned, clean = ([s for s in judged if s.poisoned is side] for side in (True, False))
    limit = threshold(calibration) if calibration else None
    defense = next(iter(models.values())).result.cell.defense
    lacks = reasons({key: models.get(key) for key in sorted(everyone)
                     if key not in models or not scores_models(models[key])})
    return Detector(
        label=label, name=defense.name, control=is_control(defense),
        knows=tuple(map(str, defense.facts.get("knows") or ())),
        poisoned=len(poisoned), clean=len(clean), calibration=len(calibration), threshold=limit,
        auroc=auroc_of_groups([s.score for s in clean], [s.score for s in poisoned]),
        tpr=share([over(s, limit) for s in poisoned]), fpr=share([over(s, limit) for s in clean]),
        accuracy=share([None if limit is None else over(s, limit) == s.poisoned for s in judged]),
        own_tpr=share([s.flagged for s in poisoned]), own_fpr=share([s.flagged for s in clean]),
        by_attack={name: share([over(s, limit) for s in poisoned if s.group == name])
                   for name in sorted({s.group for s in poisoned})},
        mistakes=tuple(mistakes(judged, limit)), seconds=math.fsum(s.seconds for s in suspects) / len(suspects),
        lacks=lacks, cells=tuple(run.result.cell.id for run in models.values() if scores_models(run)),
    )


def suspect(run: Run, settings: Mapping[str, str]) -> Suspect:
    """What one cell says of its model; the cell has a score."""
    values = {name: measured.value if (measured := run.result.measurement(name)) else None
              for name in (SCORE, FLAG, SUCCESS)}
    cell, flag = run.result.cell, values[FLAG]
    spent = sum(stage.seconds for stage in run.result.cost if stage.stage == STAGE)
    score = values[SCORE]
    assert score is not None
    return Suspect(cell.attack.name, settings[digest(cell.attack.identity())], cell.seed, not is_control(cell.attack),
                   score, None if flag is None else bool(flag), values[SUCCESS], spent)


def threshold(calibration: Sequence[float], rate: float = RATE) -> float:
    """The order statistic that another clean model exceeds with a probability of at most ``rate``: number
    ceil((m + 1)(1 - rate)) of m from below (split conformal prediction), or the largest where m is too small for it."""
    rank = min(math.ceil((len(calibration) + 1) * (1 - rate)), len(calibration))
    return sorted(calibration)[rank - 1]


def fewest(rate: float = RATE) -> int:
    """Clean models that a threshold for ``rate`` needs."""
    return math.ceil(1 / rate) - 1


def over(one: Suspect, limit: float | None) -> bool | None:
    return None if limit is None else one.score > limit


def share(hits: Sequence[bool | None]) -> Estimate:
    """The share that is true among models, with Wilson's interval."""
    if not hits:
        return Estimate(None, None, None, 0, 0, "no such model")
    known = [hit for hit in hits if hit is not None]
    if not known:
        return Estimate(None, None, None, 0, 0, "there is no threshold or rule to judge by")
    low, high = wilson(sum(known), len(known))
    return Estimate(sum(known) / len(known), low, high, len(known), len(known))


def mistakes(judged: Sequence[Suspect], limit: float | None) -> list[Mistakes]:
    """Wrong answers by setting, misses first, those of which most were wrong before others."""
    by_setting: dict[tuple[bool, str], list[Suspect]] = {}
    for one in judged:
        by_setting.setdefault((one.poisoned, one.setting), []).append(one)
    found = []
    for (poisoned, setting), models in by_setting.items():
        wrong = sorted((s for s in models if limit is not None and over(s, limit) != poisoned), key=lambda s: s.seed)
        known = [s.success for s in wrong if s.success is not None and poisoned]
        if wrong:
            found.append(Mistakes(poisoned, setting, tuple(s.seed for s in wrong), tuple(s.score for s in wrong),
                                  len(models), math.fsum(known) / len(known) if known else None))
    return sorted(found, key=lambda m: (not m.missed, -len(m.seeds) / m.of, m.setting))


def reasons(absent: Mapping[str, Run | None]) -> tuple[str, ...]:
    """Why models have no score, each reason once with its number of models."""
    said: dict[str, int] = {}
    for run in absent.values():
        why = why_silent(run)
        said[why] = said.get(why, 0) + 1
    return tuple(f"{n} model{'s' if n != 1 else ''} without a score: {why}" for why, n in sorted(said.items()))


def why_silent(run: Run | None) -> str:
    if run is None:
        return "no cell"
    if run.result.error:
        return f"failed: {run.result.error.type}"
    measured = run.result.measurement(SCORE)
    return (measured.reason if measured else run.result.reason) or f"{SCORE} not measured"


def remarks(detectors: Sequence[Detector]) -> list[str]:
    """What a reader must know of single lines."""
    said = [f"{d.label}: {lack}" for d in detectors for lack in d.lacks]
    few = [d for d in detectors if d.calibration < fewest()]
    if few:
        counts = sorted({d.calibration for d in few})
        said.append(f"{', '.join(d.label for d in few)}: clean models that set the threshold: "
                    f"{' or '.join(map(str, counts))}, and {fewest()} are needed to aim at {RATE:.0%}; "
                    "their largest score was taken.")
    return said
