"""Finding models: aliases, folders, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from bench.diffusion import checkpoints
from bench.diffusion.checkpoints import PUBLISHED, Published, adapter_path, resolve
from bench.errors import BenchError

UNET = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "sd"))


def test_a_folder_says_what_it_can_do(tiny_sd: Path, tiny_ddpm: Path, tiny_ip2p: Path, tiny_inpaint: Path) -> None:
    assert resolve(str(tiny_sd)).capabilities == {"text_to_image", "text_encoder", "inpaint", "ip_image"}
    assert resolve(str(tiny_ddpm)).capabilities == {"unconditional"}
    assert resolve(str(tiny_ip2p)).capabilities == {"edit", "text_encoder"}
    assert resolve(str(tiny_inpaint)).capabilities == {"inpaint", "text_encoder"}


def test_the_digest_follows_the_weights_and_not_the_place(tiny_sd: Path, folder: Path) -> None:
    before = resolve(str(tiny_sd)).digest
    assert resolve(str(folder)).digest == before
    flip_byte(folder / UNET)
    assert resolve(str(folder)).digest != before


def flip_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def test_unknown_alias_names_the_valid_ones() -> None:
    with pytest.raises(BenchError, match=r"unknown checkpoint 'sd51'.*sd15.*ddpm-cifar10"):
        resolve("sd51")


def test_a_folder_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="does not exist"):
        resolve(str(tmp_path / "nowhere"))


def test_offline_error_names_repository_file_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BenchError) as error:
        resolve("sd15")
    for part in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "model_index.json", "hf download", "model=<folder>"):
        assert part in str(error.value)


@pytest.mark.parametrize("missing", [
    "model_index.json", str(UNET), "unet/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors",
])
def test_an_incomplete_folder_names_what_is_missing(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    named = "vocab.json" if missing.endswith("tokenizer.json") else Path(missing).name
    with pytest.raises(BenchError, match=named):
        resolve(str(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / UNET).unlink()
    shards = {"a": "part-1.safetensors", "b": "part-2.safetensors"}
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "unet/part-1.safetensors").write_bytes(b"")
    with pytest.raises(BenchError, match=r"part-2\.safetensors is missing"):
        resolve(str(folder))


def test_a_pickle_is_refused_unless_allowed(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    torch.save(weights, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(BenchError, match=r"diffusion_pytorch_model\.bin is a pickle.*allow_pickle=true"):
        resolve(str(folder))
    rewritten = load_file(resolve(str(folder), allow_pickle=True).base / UNET)
    assert all(torch.equal(rewritten[name], weights[name]) for name in weights)
    assert not list(resolve(str(folder), allow_pickle=True).base.rglob("*.bin"))


def test_a_pickle_with_code_never_runs(folder: Path, tmp_path: Path) -> None:
    import torch

    (folder / UNET).unlink()
    mark = tmp_path / "ran"
    torch.save({"weight": _Touch(mark)}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(BenchError, match="more than tensors"):
        resolve(str(folder), allow_pickle=True)
    assert not mark.exists()


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_sums_in_the_folder_are_checked(folder: Path) -> None:
    digest = sha256((folder / UNET).read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  {UNET}\n")
    resolve(str(folder))
    flip_byte(folder / UNET)
    with pytest.raises(BenchError, match=r"unet/diffusion_pytorch_model\.safetensors does not match its hash"):
        resolve(str(folder))


def test_sums_that_point_outside_are_refused(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(BenchError, match="outside its folder"):
        resolve(str(folder))


def test_the_registry_hash_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PUBLISHED, "mine", Published(("me/mine",), "none", sha256={str(UNET): "0" * 64}))
    monkeypatch.setattr(checkpoints, "locate_published", lambda name: folder)
    with pytest.raises(BenchError, match="does not match its hash"):
        resolve("mine")


def test_a_damaged_file_of_the_hub_cache_is_noticed(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / sha256((folder / UNET).read_bytes()).hexdigest()
    (folder / UNET).rename(blob)
    (folder / UNET).symlink_to(blob)
    resolve(str(folder))
    flip_byte(blob)
    with pytest.raises(BenchError, match="does not match its hash"):
        resolve(str(folder))


def test_foreign_code_and_unknown_pipelines_are_refused(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["my_unet", "Mine"]}))
    with pytest.raises(BenchError, match="would run code"):
        resolve(str(folder))
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyPipeline"}))
    with pytest.raises(BenchError, match="unknown pipeline class 'MyPipeline'"):
        resolve(str(folder))


def test_a_model_without_adapter_says_where_it_looked(tiny_ddpm: Path) -> None:
    with pytest.raises(BenchError, match=r"no 'ip_image' adapter.*ip-adapter_image\.safetensors"):
        adapter_path(resolve(str(tiny_ddpm)), "ip_image")


def test_known_hashes_are_sha256() -> None:
    for entry in PUBLISHED.values():
        assert entry.hubs
        assert all(len(value) == 64 and int(value, 16) for value in entry.sha256.values())


def test_planning_imports_no_torch(tiny_sd: Path) -> None:
    code = ("import sys; from bench.diffusion.checkpoints import resolve, aliases; aliases(); "
            f"resolve({str(tiny_sd)!r}); assert not {{'torch', 'diffusers', 'transformers'}} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
