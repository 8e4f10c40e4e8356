"""Face recognisers: pictures in, unit embeddings and "was there a face" out.

`FaceEncoder` is a small convolutional recogniser that ships with the micro tier; `insightface_recogniser`
puts a published InsightFace pack behind the same `FaceRecogniser` protocol, and `bench.dlib_faces` dlib's network.
Identity is compared by the
cosine of two embeddings, which is their dot product because both have length 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from bench.errors import BenchError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MICRO_ENCODERS = ("micro-face-1", "micro-face-2", "micro-face-3")
"""The last one is the judge: it scores, and no defense or attack uses it."""
DEFAULT_PACK, DETECTION_SIZE = "buffalo_l", 640
DETECTION_THRESHOLD = 0.5
"""Of InsightFace: pack, side of the square in which faces are looked for, and the score from which one counts."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class FaceRecogniser(Protocol):
    """Anything that embeds faces."""

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings float [n, d] and whether a face was found, bool [n], of pictures [n, 3, h, w] in [0, 1].

        The embedding of a picture without a face means nothing; where it is not zero it has length 1.
        """
        ...


@dataclass(frozen=True)
class FaceEncoderConfig:
    """Shape and calibration of a `FaceEncoder`.

    `widths`: channels of the four stages, at 1/2, 1/4, 1/8 and 1/16 of `size`. `blocks`: residual blocks in
    each. A face is found where the detection logit is at least `detection_threshold`; two faces count as one
    person where their cosine is at least `similarity_threshold`, which lets 1 in 1000 pairs of different
    people pass.
    """

    widths: tuple[int, ...] = (24, 48, 96, 192)
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    dimension: int = 128
    size: int = 64
    detection_threshold: float = 0.0
    similarity_threshold: float = 0.5
    calibration: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.blocks) or not self.widths:
            raise BenchError(
                f"face encoder: widths {self.widths} and blocks {self.blocks} need the same length >= 1."
            )


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, halving the picture when `stride` is 2."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide_out)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide_out)
        same = stride == 1 and wide_in == wide_out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.relu(self.norm1(self.conv1(x)))
        return nn.functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class FaceEncoder(nn.Module):
    """A residual network with two heads: an identity embedding and a face-or-no-face logit."""

    def __init__(self, config: FaceEncoderConfig) -> None:
        super().__init__()
        self.config = config
        first = config.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.stages = nn.Sequential(*_stages(config))
        last = config.widths[-1] * (config.size // 2 ** len(config.widths)) ** 2
        self.identity = nn.Sequential(
            nn.Flatten(), nn.Linear(last, config.dimension), nn.BatchNorm1d(config.dimension)
        )
        self.detection = nn.Sequential(nn.Flatten(), nn.Linear(last, 32), nn.ReLU(), nn.Linear(32, 1))

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.config.dimension

    def prepare(self, pixels: Tensor) -> Tensor:
        """Check pictures [n, 3, h, w] in [0, 1] and bring them to the encoder's size and to [-1, 1]."""
        if pixels.dim() != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise BenchError(
                f"face encoder: pixels must be float [n, 3, h, w] in [0, 1], got {pixels.dtype} {list(pixels.shape)}."
            )
        size = (self.config.size, self.config.size)
        if tuple(pixels.shape[2:]) != size:
            pixels = nn.functional.interpolate(
                pixels, size, mode="bilinear", antialias=True, align_corners=False
            )
        return pixels * 2 - 1

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [n, d] before normalisation and detection logits [n] of pictures [n, 3, h, w] in [0,
        1].
        """
        features = self.stages(self.stem(self.prepare(pixels)))
        return self.identity(features), self.detection(features)[:, 0]

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1, float [n, d], differentiable in `pixels`, and whether a face was found,
        bool [n].

        `pixels`: float [n, 3, h, w] in [0, 1]; other sizes than the encoder's are resized (bilinear,
        antialiased). A picture without a face still gets an embedding of length 1.
        """
        raw, logit = self(pixels)
        return nn.functional.normalize(raw.float(), dim=1), logit.detach() >= self.config.detection_threshold


def _stages(config: FaceEncoderConfig) -> list[nn.Module]:
    stages: list[nn.Module] = []
    before = config.widths[0]
    for place, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
        for block in range(count):
            stages.append(_Block(before, width, 2 if block == 0 and place > 0 else 1))
            before = width
    return stages


def save_face_encoder(encoder: FaceEncoder, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (half precision) into `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = encoder.state_dict()
    halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    save_file(halves, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)
    text = json.dumps({"_class_name": "FaceEncoder", **asdict(encoder.config)}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")


def load_face_encoder(folder: Path) -> FaceEncoder:
    """The encoder stored in `folder`: float32, in eval mode, its weights frozen.

    Raises `BenchError` where the folder is incomplete, holds only a pickle, or does not fit its own
    configuration.
    """
    from safetensors.torch import load_file

    encoder = FaceEncoder(_read_config(folder))
    try:
        state = load_file(_weights(folder))
    except Exception as error:
        raise BenchError(
            f"face encoder: {folder / WEIGHTS_FILE} is not a readable safetensors file: {error}"
        ) from error
    try:
        encoder.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except RuntimeError as error:
        raise BenchError(
            f"face encoder: the weights in {folder} do not fit its {CONFIG_FILE}: {error}"
        ) from error
    return encoder.eval().requires_grad_(False)


def _weights(folder: Path) -> Path:
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
    if pickles:
        raise BenchError(
            f"face encoder: {folder} holds {', '.join(pickles)} but no {WEIGHTS_FILE}; a pickle can run code when it "
            f"is loaded and is refused. Convert it to safetensors first."
        )
    raise BenchError(
        f"face encoder: {file} is missing; a face encoder's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}."
    )


def _read_config(folder: Path) -> FaceEncoderConfig:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise BenchError(
            f"face encoder: {file} is missing; a face encoder's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BenchError(f"face encoder: {file} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("_class_name", None) != "FaceEncoder":
        raise BenchError(
            f"face encoder: {file} does not describe a FaceEncoder (its _class_name says otherwise)."
        )
    return _config_from(values, file)


def _config_from(values: dict[str, Any], file: Path) -> FaceEncoderConfig:
    known = {f.name for f in fields(FaceEncoderConfig)}
    if wrong := sorted(set(values) ^ known):
        raise BenchError(
            f"face encoder: {file} has missing or unknown entries {wrong}; it needs {sorted(known)}."
        )
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return FaceEncoderConfig(**options)


def recogniser(name: str) -> FaceRecogniser:
    """The recogniser called `name`: one of the micro tier (`micro-face-1`), `dlib`, `insightface`,
    `insightface:<pack or folder>` with `@<size>` for another detection size than 640, or the folder of a `FaceEncoder`.

    Raises `BenchError` for anything else, naming what there is.
    """
    from bench.dlib_faces import dlib_recogniser
    from bench.micro.models import weights_folder

    if name == "dlib":
        return dlib_recogniser()
    if name == "insightface" or name.startswith("insightface:"):
        return insightface_recogniser(*insightface_options(name))
    if name in MICRO_ENCODERS:
        return load_face_encoder(weights_folder(name))
    if Path(name).expanduser().is_dir():
        return load_face_encoder(Path(name).expanduser())
    raise unknown("face recogniser", name, "faces", (*MICRO_ENCODERS, "dlib", "insightface:<pack>@<size>", "<folder>"))


def insightface_options(name: str) -> tuple[str, tuple[int, int]]:
    """Pack and detection size of a name such as `insightface:buffalo_l@640`; both parts may be left out.

    Raises `BenchError` where the size is not a multiple of 32, the detector's coarsest step.
    """
    pack, at, size = name.removeprefix("insightface").removeprefix(":").rpartition("@")
    if not at or not size.isdigit():
        return name.removeprefix("insightface").removeprefix(":") or DEFAULT_PACK, (DETECTION_SIZE, DETECTION_SIZE)
    side = int(size)
    if side < 32 or side % 32:
        raise BenchError(f"face recogniser '{name}': the detection size {side} must be a multiple of 32, such as "
                         f"{DETECTION_SIZE}.")
    return pack or DEFAULT_PACK, (side, side)


def recogniser_facts(name: str, judge: FaceRecogniser) -> dict[str, Any]:
    """What a measurement's protocol says of the recogniser that made it."""
    return {"recogniser": name, "weights": weights_mark(judge), "threshold": threshold_of(judge),
            **getattr(judge, "facts", {})}


def threshold_of(judge: FaceRecogniser) -> float | None:
    """The cosine that 1 in 1000 pairs of strangers reach, where the recogniser's files state it."""
    config = getattr(judge, "config", None)
    value = getattr(config, "similarity_threshold", None)
    return None if value is None else float(value)


def weights_mark(judge: FaceRecogniser) -> str:
    """A digest of the recogniser's weights, "" where they cannot be read."""
    if not hasattr(judge, "state_dict"):
        return ""
    hashed = hashlib.sha256()
    for name, value in sorted(judge.state_dict().items()):
        hashed.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


@dataclass
class InsightFaceRecogniser:
    """An InsightFace pack: the largest face of each picture, aligned and embedded. No gradients.

    `facts`: pack, detection size and threshold, and hashes of the model files, for a measurement's protocol.
    """

    analysis: Any
    dimension: int = 512
    facts: dict[str, Any] = field(default_factory=dict)

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1, float32 [n, d], and whether a face was found, of pictures [n, 3, h, w] in
        [0, 1].

        The embedding of a picture without a face is zero.
        """
        rows = [self._largest(picture) for picture in pixels.detach().cpu()]
        found = torch.tensor([row is not None for row in rows], dtype=torch.bool)
        zero = torch.zeros(self.dimension)
        stacked = [zero if row is None else row for row in rows]
        embeddings = torch.stack(stacked) if stacked else torch.zeros(0, self.dimension)
        return embeddings.to(pixels.device), found.to(pixels.device)

    def _largest(self, picture: Tensor) -> Tensor | None:
        # InsightFace reads blue, green, red, as OpenCV does.
        bgr = (
            (picture.flip(0).permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
        )
        faces = self.analysis.get(bgr)
        if not faces:
            return None
        biggest = max(faces, key=_area)
        return nn.functional.normalize(torch.as_tensor(biggest.normed_embedding, dtype=torch.float32), dim=0)


def _area(face: Any) -> float:
    left, top, right, bottom = (float(v) for v in face.bbox[:4])
    return (right - left) * (bottom - top)


def insightface_recogniser(
    pack: str | Path = DEFAULT_PACK,
    det_size: tuple[int, int] = (DETECTION_SIZE, DETECTION_SIZE),
    root: str | Path = "~/.insightface",
    hub: Path | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> InsightFaceRecogniser:
    """A recogniser from an InsightFace pack that is already on disk; nothing is downloaded.

    `pack`: a folder of `.onnx` files, or the name of a pack that lies in `<root>/models` or in the Hugging Face cache
    `hub` (None: the usual one), where a repository's own id works too. `det_size`: the size, width
    and height, at which faces are looked for; stated because the package's default differs between versions.
    Raises `BenchError` where the package or the pack is missing, naming what to get.
    """
    folder = _pack_folder(pack, root, hub)
    on_cpu = providers[0] == "CPUExecutionProvider"
    try:
        analysis = _face_analysis()(
            str(folder), allowed_modules=["detection", "recognition"], providers=list(providers)
        )
        dimension = int(analysis.models["recognition"].output_shape[-1])
        analysis.prepare(ctx_id=-1 if on_cpu else 0, det_thresh=DETECTION_THRESHOLD, det_size=det_size)
    except BenchError:
        raise
    except Exception as error:
        # The package asserts, or raises whatever onnxruntime raises, on a pack that is broken or not whole.
        raise BenchError(
            f"insightface: the pack at {folder} cannot be used (it needs a detection and a recognition model): "
            f"{type(error).__name__}: {error}"
        ) from error
    return InsightFaceRecogniser(analysis, dimension, _pack_facts(analysis, Path(pack).name, det_size))


def _pack_facts(analysis: Any, pack: str, det_size: tuple[int, int]) -> dict[str, Any]:
    from bench.identity import file_digest

    files = [Path(analysis.models[task].model_file) for task in ("detection", "recognition")]
    return {"recogniser": f"insightface:{pack}", "det_size": list(det_size), "det_thresh": DETECTION_THRESHOLD,
            "weights": {file.name: file_digest(file)[:16] for file in files}}


def _pack_folder(pack: str | Path, root: str | Path, hub: Path | None) -> Path:
    direct, named = Path(pack).expanduser(), Path(root).expanduser() / "models" / str(pack)
    local = direct if direct.is_dir() else named
    hubs = [] if direct.is_dir() else _hub_folders(str(pack), hub)
    for folder, files in [(local, "**/*.onnx"), *((snapshot, "*.onnx") for snapshot in hubs)]:
        if any(folder.glob(files)):
            return folder
    raise BenchError(
        f"insightface: no pack '{pack}' at {local} (no .onnx file there) nor in the Hugging Face cache, and "
        f"nothing is downloaded. Get {Path(pack).name}.zip from the model-zoo release of github.com/deepinsight/"
        f"insightface and unpack it there. Its models are for non-commercial research only."
    )


def _hub_folders(pack: str, hub: Path | None) -> list[Path]:
    """Where snapshots of the hub's cache may hold a pack: in a repository of that id or name, or in a folder of it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = hub or Path(HF_HUB_CACHE)
    repository = ("" if "/" in pack else "*--") + pack.replace("/", "--")
    inside = [] if "/" in pack else sorted(cache.glob(f"models--*/snapshots/*/**/{pack}"))
    return [*sorted(cache.glob(f"models--{repository}/snapshots/*")), *inside]


def _face_analysis() -> Callable[..., Any]:
    try:
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise BenchError(
            f"insightface: the package cannot be imported ({error}); install it with `pip install 'insightface>=2.1' "
            f"onnxruntime`."
        ) from error
    return cast("Callable[..., Any]", FaceAnalysis)
