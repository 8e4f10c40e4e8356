"""InsightFace packs: where they are found, the options in their name, and a tiny pack through the real package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bench.errors import BenchError
from bench.faces import insightface_options, insightface_recogniser

STRIDES = (8, 16, 32)


def save(folder: Path, name: str, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray],
         shape: list[object], outputs: list[tuple[str, int]]) -> None:
    graph = helper.make_graph(
        nodes, name, [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, [None, width]) for o, width in outputs],
        [numpy_helper.from_array(value, key) for key, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / name)


def tiny_pack(folder: Path) -> Path:
    """A detector that sees a face in every bright red cell, and a recogniser that answers the mean colour."""
    red = np.zeros((2, 3, 1, 1), np.float32)
    red[:, 0] = 1
    offsets = np.array([[-1, -1, 1, -1, 0, 0, -1, 1, 1, 1]], np.float32)
    constants = {"red": red, "flat": np.array([-1, 1]), "box": np.ones((1, 4), np.float32), "points": offsets}
    nodes, outputs = [], {"score": [], "box": [], "points": []}
    for s in STRIDES:
        nodes += [
            helper.make_node("AveragePool", ["input.1"], [f"pool{s}"], kernel_shape=[s, s], strides=[s, s]),
            helper.make_node("Conv", [f"pool{s}", "red"], [f"map{s}"]),
            helper.make_node("Transpose", [f"map{s}"], [f"last{s}"], perm=[2, 3, 0, 1]),
            helper.make_node("Reshape", [f"last{s}", "flat"], [f"score{s}"]),
            helper.make_node("Mul", [f"score{s}", "box"], [f"box{s}"]),
            helper.make_node("Mul", [f"score{s}", "points"], [f"points{s}"])]
        for kind, names in outputs.items():
            names.append((f"{kind}{s}", {"score": 1, "box": 4, "points": 10}[kind]))
    save(folder, "det_tiny.onnx", nodes, constants, [1, 3, "h", "w"], [o for names in outputs.values() for o in names])
    mean = [helper.make_node("GlobalAveragePool", ["input.1"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["colour"])]
    save(folder, "rec_tiny.onnx", mean, {}, [None, 3, 112, 112], [("colour", 3)])
    return folder


def red_picture(side: int) -> torch.Tensor:
    picture = torch.zeros(3, side, side)
    picture[0] = 1
    return picture


def test_a_pack_finds_and_embeds_through_the_real_package(tmp_path: Path) -> None:
    judge = insightface_recogniser(tiny_pack(tmp_path / "tiny"), (64, 64))
    embeddings, found = judge.embed(torch.stack([red_picture(64), torch.zeros(3, 64, 64)]))
    assert found.tolist() == [True, False] and judge.dimension == 3
    red, green, blue = embeddings[0].tolist()
    assert red > green + 0.1 and green == pytest.approx(blue, abs=1e-5)
    assert embeddings[0].norm() == pytest.approx(1, abs=1e-5)
    assert not embeddings[1].any()


def test_pack_size_and_hashes_stand_in_the_facts(tmp_path: Path) -> None:
    folder = tiny_pack(tmp_path / "tiny")
    judge = insightface_recogniser(folder, (96, 96))
    assert judge.facts["recogniser"] == "insightface:tiny" and judge.facts["det_size"] == [96, 96]
    marks = {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in sorted(folder.glob("*.onnx"))}
    assert judge.facts["weights"] == marks and len(marks) == 2
    assert judge.analysis.det_size == (96, 96) and judge.analysis.det_thresh == 0.5


@pytest.mark.parametrize("place", ["root/models/tiny", "hub/models--ann--tiny/snapshots/abc",
                                   "hub/models--ann--faces/snapshots/abc/models/tiny"])
def test_a_pack_is_found_where_the_package_or_the_hub_left_it(tmp_path: Path, place: str) -> None:
    tiny_pack(tmp_path / place)
    judge = insightface_recogniser("tiny", (64, 64), tmp_path / "root", tmp_path / "hub")
    assert judge.facts["recogniser"] == "insightface:tiny" and judge.embed(red_picture(64)[None])[1].all()


def test_a_repository_is_found_by_its_id(tmp_path: Path) -> None:
    tiny_pack(tmp_path / "hub/models--ann--faces/snapshots/abc")
    assert insightface_recogniser("ann/faces", (64, 64), tmp_path / "root", tmp_path / "hub").dimension == 3
    with pytest.raises(BenchError, match="no pack 'eve/faces'"):
        insightface_recogniser("eve/faces", (64, 64), tmp_path / "root", tmp_path / "hub")


@pytest.mark.parametrize(("name", "pack", "side"), [
    ("insightface", "buffalo_l", 640), ("insightface:", "buffalo_l", 640), ("insightface@128", "buffalo_l", 128),
    ("insightface:antelopev2", "antelopev2", 640), ("insightface:buffalo_l@320", "buffalo_l", 320),
    ("insightface:some/folder@home/pack", "some/folder@home/pack", 640),
])
def test_pack_and_detection_size_are_read_from_the_name(name: str, pack: str, side: int) -> None:
    assert insightface_options(name) == (pack, (side, side))


@pytest.mark.parametrize("size", ["0", "16", "100"])
def test_a_size_that_the_detector_cannot_divide_is_refused(size: str) -> None:
    with pytest.raises(BenchError, match="multiple of 32"):
        insightface_options(f"insightface:buffalo_l@{size}")
