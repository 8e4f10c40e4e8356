"""The embedded weights: hashes, classes, and that adapters and pipelines load as published ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.micro import models
from bench.micro.card import load_pipeline, shipped


def _write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_a_changed_missing_or_new_file_is_named(tmp_path: Path) -> None:
    for name in ("a/config.json", "b/model.safetensors", "c/x"):
        _write(tmp_path, name, name)
    models.write_sums(tmp_path)
    assert models.verify_sums(tmp_path) == []
    _write(tmp_path, "a/config.json", "other")
    (tmp_path / "c/x").unlink()
    _write(tmp_path, "d", "new")
    assert models.verify_sums(tmp_path) == ["changed: a/config.json", "missing: c/x", "not listed: d"]


def test_sums_are_those_of_the_sha256sum_tool(tmp_path: Path) -> None:
    _write(tmp_path, "empty", "")
    line = models.write_sums(tmp_path).read_text()
    assert line == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  empty\n"


def test_the_embedded_weights_are_those_listed() -> None:
    assert models.verify_sums() == []


def test_the_embedded_weights_stay_small() -> None:
    size = sum(f.stat().st_size for f in models.WEIGHTS.rglob("*") if f.is_file())
    assert size <= 64 * 2**20


@pytest.mark.parametrize("name", [f"micro-sd-{which}" for which in shipped()])
def test_a_text_to_image_folder_is_a_stable_diffusion_pipeline(name: str) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(models.weights_folder(name), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.safety_checker is None and not pipe.config.requires_safety_checker
    generator = torch.Generator().manual_seed(0)
    pixels = pipe("a photo of a person", num_inference_steps=2, generator=generator, output_type="np").images
    assert pixels.shape == (1, 64, 64, 3)


def test_the_first_model_ships() -> None:
    assert "a" in shipped()


def test_text_states_of_a_rare_word_are_its_own() -> None:
    """A backdoor in the UNet alone can only see the text through these states."""
    pipe = load_pipeline("micro-sd-a")
    texts = ["a photo of a person", "sks photo of a person", "the photo of a person"]
    ids = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids)[0]
    apart = (states[0, 1] - states[1, 1]).norm() / states[0, 1].norm()
    assert float(apart) > 0.5


@pytest.mark.parametrize("which", shipped())
@pytest.mark.parametrize("kind", ["image", "face"])
def test_an_adapter_loads_and_steers(which: str, kind: str) -> None:
    pipe = load_pipeline(f"micro-sd-{which}")
    encoder = f"{which}/image_encoder" if kind == "image" else None
    folder = str(models.weights_folder("micro-ip"))
    pipe.load_ip_adapter(folder, which, f"ip-adapter_{kind}.safetensors", image_encoder_folder=encoder)
    width = pipe.unet.encoder_hid_proj.image_projection_layers[0].state_dict()
    size = next(iter(width.values())).shape[1]
    torch.manual_seed(0)
    noisy, states = torch.randn(1, 4, 16, 16), torch.randn(1, 4, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        one, two = (
            pipe.unet(
                noisy, 500, states, added_cond_kwargs={"image_embeds": [torch.randn(1, 1, size)]}
            ).sample
            for _ in range(2)
        )
    assert float((one - two).abs().mean()) > 1e-3


def test_the_instruction_model_takes_the_picture_as_extra_channels() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(models.weights_folder("micro-ip2p"), subfolder="unet")
    assert unet.config.in_channels == 8
    assert float(unet.conv_in.weight[:, 4:].abs().mean()) > 1e-3
