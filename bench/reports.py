"""Reports of defenses of models on disk: a verdict, the trigger that was found, what was removed.

A report lies in the artefact of the stage that made it, so it exists even when the model is returned as it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from bench.identity import plain
from bench.records import Report, Verdict

REPORT, TRIGGER = "report.json", "inverted_trigger.safetensors"


def write_report(report: Report, folder: Path) -> None:
    """Put a report into a stage's folder."""
    if report.trigger is not None:
        from safetensors.torch import save_file

        save_file({"trigger": report.trigger.detach().cpu().contiguous()}, folder / TRIGGER)
    verdict = None if report.verdict is None else asdict(report.verdict)
    told = plain({"verdict": verdict, "facts": dict(report.facts)}, "report")
    (folder / REPORT).write_text(json.dumps(told, indent=1, sort_keys=True, allow_nan=False))


def read_report(folder: Path) -> Report | None:
    """The report in a stage's folder, None if its defense wrote none."""
    if not (folder / REPORT).is_file():
        return None
    told, trigger = json.loads((folder / REPORT).read_text()), None
    if (folder / TRIGGER).is_file():
        from safetensors.torch import load_file

        trigger = load_file(folder / TRIGGER)["trigger"]
    return Report(Verdict(**told["verdict"]) if told["verdict"] else None, trigger, told["facts"])
