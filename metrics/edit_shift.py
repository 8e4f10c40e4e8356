"""How far the edit of a protected photo lies from the edit of its original, picture by picture.

Papers on protection from edits report PSNR, SSIM, LPIPS, VIFp and FSIM between both edits (TDAE, arXiv:2512.14341, and
its siblings; PhotoGuard before them). Two traps are mended. Pictures are paired by photo and seed, so nothing but
the photo differs; and another seed alone moves an edit, often as far as a defense does, so the same five measures
between benign edits of one photo with different seeds stand beside them. What a shift cannot say is whether the
attacker got what was asked: a ruined picture has the largest shift of all. Read it beside ``edit_success``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.plugin import plugin
from bench.records import EditingEvidence, Evidence, Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.picture_distance import Distance

Values = dict[str, list[float | None]]
UNITS = {"edit_psnr": "dB", "edit_feature_distance": "distance", "edit_lpips": "distance"}
FARTHER_IS_MORE = ("edit_feature_distance", "edit_lpips")
"""Distances; the others are likenesses."""
REASONS = {"edit_psnr": "identical: PSNR is infinite", "edit_ssim": "the picture is smaller than SSIM's window",
           "edit_vifp": "the picture is too small for VIF, or flat", "edit_fsim": "the pictures are flat"}


@plugin("metric", "edit_shift", track=("editing",),
        paper="Zhang et al., FSIM, IEEE TIP 2011; Sheikh and Bovik, VIF, IEEE TIP 2006")
class EditShift:
    """Between edited and benign pictures of the same seed: ``edit_psnr`` (dB), ``edit_ssim``, ``edit_vifp``,
    ``edit_fsim`` and ``edit_feature_distance`` (or ``edit_lpips``). The same with ``@seeds``: between the benign
    picture of one seed and that of the next, what a change of seed alone does.

    ``network``: micro-clip or the folder of a CLIPModel for ``edit_feature_distance``; alex or vgg for ``edit_lpips``,
    which needs the packages lpips and torchvision. A picture that did not change at all has no PSNR.
    """

    network: str = "micro-clip"

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Means over pictures with intervals over photos."""
        from bench.measuring import require_edits
        from bench.picture_distance import deep_distance

        shown, (name, distance, facts) = require_edits(evidence, "edit_shift"), deep_distance(self.network, ctx.device)
        told = {f"edit_{name}": facts, **settings()}
        benign, edited = shown.benign.images.pixels, shown.edited.images.pixels
        shift = compare(benign, edited, f"edit_{name}", distance)
        usual = compare(benign, next_seed(benign, shown.seeds), f"edit_{name}", distance)
        return [*summarise(shown, shift, told), *summarise(shown, usual, told, "@seeds")]


def settings() -> dict[str, dict[str, Any]]:
    """What a comparison must share, of the measures that look at pixels."""
    from bench.fsim import FACTS as FSIM_FACTS
    from bench.picture_distance import SSIM_FACTS, VIF_FACTS

    return {"edit_psnr": {"peak": 255}, "edit_ssim": SSIM_FACTS, "edit_vifp": VIF_FACTS, "edit_fsim": FSIM_FACTS}


def compare(before: Tensor, after: Tensor, name: str, distance: Distance) -> Values:
    """All five of each pair of pictures, uint8 [n, 3, h, w]; ``name``: what the distance is called."""
    from bench.fsim import fsim
    from bench.picture_distance import distances, information, peak_ratio, similarity

    deep: list[float | None] = list(distances(before, after, distance))
    return {"edit_psnr": peak_ratio(before, after), "edit_ssim": similarity(before, after),
            "edit_vifp": information(before, after), "edit_fsim": fsim(before, after), name: deep}


def next_seed(pictures: Tensor, seeds: int) -> Tensor:
    """In place of each picture its photo's next one, [n, 3, h, w]; the last goes with the first."""
    tasks = pictures.reshape(-1, seeds, *pictures.shape[1:])
    return tasks.roll(-1, dims=1).reshape(pictures.shape)


def summarise(
    evidence: EditingEvidence, values: Values, facts: dict[str, dict[str, Any]], suffix: str = "",
) -> list[Measurement]:
    """Means over pictures. Far from the benign edit is where the defender wants to be; what a seed does is neither."""
    from bench.measuring import edit_rows, mean_of

    return [mean_of(name + suffix, edit_rows(evidence, found, REASONS.get(name, "")), UNITS.get(name, ""),
                    None if suffix else name in FARTHER_IS_MORE, facts[name]) for name, found in values.items()]
