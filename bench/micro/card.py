"""The quality card of the micro tier: what the embedded models can do, measured on people that none of them has seen.

`python -m bench.micro.card` writes `card/card.json`, `card/card.md` and sample sheets. Every check has a threshold;
a tier that misses one is not fit to carry the benchmark's suites.
"""

# diffusers and transformers ship half a set of types; what they leave untyped is checked by the tests.
# mypy: disable-error-code="attr-defined, no-untyped-call, operator, no-any-return, index, union-attr, arg-type"

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from bench.faces import load_face_encoder
from bench.micro import world
from bench.micro.models import weights_folder

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "card"
JUDGE = "micro-face-3"
STEPS, GUIDANCE = 25, 3.0
TOKEN = "sks"


@dataclass
class Check:
    """One number against its threshold. `at_least` is False where smaller is better."""

    name: str
    value: float
    threshold: float
    at_least: bool
    note: str

    @property
    def passed(self) -> bool:
        return self.value >= self.threshold if self.at_least else self.value <= self.threshold


# ---------------------------------------------------------------------------------------------------------------- tools


def _signed(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).float() / 127.5 - 1


def load_pipeline(name: str) -> StableDiffusionPipeline:
    """An embedded text-to-image pipeline in float32, without its progress bar."""
    pipe = StableDiffusionPipeline.from_pretrained(weights_folder(name), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, prompts: list[str], seed: int, batch: int = 16, **options: Any) -> np.ndarray:
    """Pictures uint8 [n, 3, 64, 64], one for each prompt."""
    parts = []
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"} | options
    for start in range(0, len(prompts), batch):
        generator = torch.Generator().manual_seed(seed * 10_007 + start)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts.append(pipe(prompts[start : start + batch], generator=generator, **settings).images)
    return cast(np.ndarray, (np.concatenate(parts) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2))


def embed(name: str, pixels: np.ndarray) -> Tensor:
    """Face embeddings [n, d] of an embedded encoder; zero where it finds no face."""
    with torch.no_grad():
        unit, found = load_face_encoder(weights_folder(name)).embed(torch.from_numpy(pixels).float() / 255)
    return unit * found.float()[:, None]


def sheet(pixels: np.ndarray, columns: int = 8, zoom: int = 2) -> Image.Image:
    """Pictures [n, 3, s, s] side by side."""
    rows = [
        np.concatenate(list(pixels[i : i + columns]), 2) for i in range(0, len(pixels) - columns + 1, columns)
    ]
    picture = Image.fromarray(np.concatenate(rows, 1).transpose(1, 2, 0))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def card_pictures(count: int = 800) -> world.Drawn:
    """Eight views of each of `count / 8` people that no model has seen."""
    return world.dataset("card", count)


# --------------------------------------------------------------------------------------------------------------- checks


def reconstruction(which: str) -> Check:
    """Peak signal-to-noise ratio of the autoencoder."""
    vae = AutoencoderKL.from_pretrained(
        weights_folder(f"micro-sd-{which}"), subfolder="vae", torch_dtype=torch.float32
    )
    x = _signed(card_pictures().pixels[:256])
    with torch.no_grad():
        back = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (back - x).square().flatten(1).mean(1))
    return Check(
        f"autoencoder {which}: PSNR in dB", float(psnr.mean()), 30.0, True, "256 pictures, mean over pictures"
    )


def verification(name: str) -> Check:
    """Area under the ROC curve of same-person pairs against pairs of different people."""
    data = card_pictures()
    vectors = embed(name, data.pixels)
    scores = (vectors @ vectors.T).numpy()
    upper = np.triu(np.ones_like(scores, dtype=bool), 1)
    same = data.identity[:, None] == data.identity[None, :]
    good, bad = scores[upper & same], np.sort(scores[upper & ~same])
    auc = float(
        np.mean((np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")) / 2 / len(bad))
    )
    note = f"same person {good.mean():.2f}, different people {bad.mean():.2f}"
    return Check(f"{name}: AUC", auc, 0.995, True, note)


def _clip() -> tuple[CLIPModel, CLIPTokenizer]:
    folder = weights_folder("micro-clip")
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(
        folder
    )


@torch.no_grad()
def _image_features(model: CLIPModel, pixels: np.ndarray) -> Tensor:
    parts = [
        model.vision_model(_signed(pixels[i : i + 250])).pooler_output for i in range(0, len(pixels), 250)
    ]
    return model.visual_projection(torch.cat(parts))


def caption_retrieval() -> Check:
    """How often the right caption of 32 is the nearest to a picture, all of different unseen people."""
    model, tokenizer = _clip()
    data = card_pictures()
    rows = np.random.default_rng(0).permutation(100)[:96] * 8 + np.arange(96) % 8
    images = F.normalize(_image_features(model, data.pixels[rows]), dim=-1)
    ids = tokenizer(
        [world.describe(data.attributes[r]) for r in rows],
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        texts = F.normalize(model.text_projection(model.text_model(ids.input_ids).pooler_output), dim=-1)
    hits = [
        (images[i : i + 32] @ texts[i : i + 32].T).argmax(1) == torch.arange(32)
        for i in range(0, len(rows), 32)
    ]
    return Check(
        "micro-clip: caption top-1 of 32", float(torch.cat(hits).float().mean()), 0.9, True, "96 pictures"
    )


def _probe(features: Tensor, labels: list[str]) -> Callable[[Tensor], list[str]]:
    """A ridge classifier on standardised features."""
    names = sorted(set(labels))
    target = torch.tensor([[2.0 * (label == name) - 1 for name in names] for label in labels])
    mean, scale = features.mean(0), features.std(0)

    def lift(x: Tensor) -> Tensor:
        return torch.cat([(x - mean) / scale, torch.ones(len(x), 1)], 1)

    x = lift(features)
    weights = torch.linalg.solve(x.T @ x + 10.0 * torch.eye(x.shape[1]), x.T @ target)
    return lambda new: [names[i] for i in (lift(new) @ weights).argmax(1)]


def attribute_readers() -> dict[str, Callable[[Tensor], list[str]]]:
    """Linear probes on micro-clip's image features for every attribute, learned on people of the split `clip`."""
    model, _ = _clip()
    data = world.dataset("clip", 8_000)
    features = _image_features(model, data.pixels)
    return {key: _probe(features, [facts[key] for facts in data.attributes]) for key in data.attributes[0]}


def prompt_following(which: str, count: int = 96) -> Check:
    """Accuracy of the prompted attributes in samples, relative to their accuracy in real pictures."""
    model, _ = _clip()
    data, readers = card_pictures(), attribute_readers()
    facts = [data.attributes[row * 8] for row in range(count)]
    pixels = sample(load_pipeline(f"micro-sd-{which}"), [world.describe(f) for f in facts], seed=1)
    real = data.pixels[np.arange(count) * 8]
    shares = {}
    for key, read in readers.items():
        truth = [f[key] for f in facts]
        hit = [
            np.mean([a == b for a, b in zip(read(_image_features(model, p)), truth, strict=True)])
            for p in (pixels, real)
        ]
        shares[key] = (float(hit[0]), float(hit[1]))
    value = sum(s for s, _ in shares.values()) / sum(r for _, r in shares.values())
    note = ", ".join(f"{key} {s:.2f} of {r:.2f}" for key, (s, r) in shares.items())
    return Check(f"micro-sd-{which}: attributes of samples relative to real", value, 0.85, True, note)


# ------------------------------------------------------------------------------------------------- customisation checks


@dataclass(frozen=True)
class DreamBooth:
    """Settings of the check; the plugins use the same."""

    steps: int = 150
    lr: float = 2e-4
    text_lr: float = 2e-4
    photos: int = 4
    prior_weight: float = 1.0
    prior_pictures: int = 16


def _noise_loss(pipe: Any, latents: Tensor, ids: Tensor) -> Tensor:
    noise, times = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    states = pipe.text_encoder(ids)[0]
    guess = pipe.unet(schedule.add_noise(latents, noise, times), times, states).sample
    return F.mse_loss(guess.float(), noise, reduction="none").mean((1, 2, 3))


def _token_ids(pipe: Any, prompts: list[str]) -> Tensor:
    return cast(
        Tensor, pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    )


@torch.no_grad()
def _latents(pipe: Any, pixels: np.ndarray) -> Tensor:
    return cast(Tensor, pipe.vae.encode(_signed(pixels)).latent_dist.mode() * pipe.vae.config.scaling_factor)


def customise(pipe: Any, photos: np.ndarray, settings: DreamBooth, seed: int = 0) -> Any:
    """A copy of `pipe` whose UNet and text encoder learned `sks person` from the photos, with prior preservation."""
    prior = sample(pipe, ["a photo of a person"] * settings.prior_pictures, seed=seed + 50)
    pipe = copy.deepcopy(pipe)
    own, kept = _latents(pipe, photos), _latents(pipe, prior)
    ids = _token_ids(pipe, [f"a photo of {TOKEN} person"] * len(own) + ["a photo of a person"] * len(own))
    groups = [
        {"params": pipe.unet.parameters(), "lr": settings.lr},
        {"params": pipe.text_encoder.parameters(), "lr": settings.text_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    torch.manual_seed(seed)
    for module in (pipe.unet, pipe.text_encoder):
        module.train().requires_grad_(True)
    for _ in range(settings.steps):
        batch = torch.cat([own, kept[torch.randperm(len(kept))[: len(own)]]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = _noise_loss(pipe, batch, ids)
        (losses[: len(own)].mean() + settings.prior_weight * losses[len(own) :].mean()).backward()
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    pipe.unet.eval(), pipe.text_encoder.eval()
    return pipe


def _likeness(pixels: np.ndarray, held_out: Tensor) -> float:
    return float((embed(JUDGE, pixels) @ held_out.T).mean())


def dreambooth(
    which: str = "a", people: int = 3, settings: DreamBooth | None = None
) -> tuple[list[Check], np.ndarray]:
    """Likeness to held-out photos after and before customisation, relative to that between real photos; and samples."""
    pipe, data = load_pipeline(f"micro-sd-{which}"), card_pictures()
    real, after, before, shown = [], [], [], []
    for person in range(people):
        photos = data.pixels[person * 8 : person * 8 + 8]
        held_out = embed(JUDGE, photos[4:])
        real.append(_likeness(photos[:4], held_out))
        prompts = [f"a photo of {TOKEN} person"] * 8
        before.append(_likeness(sample(pipe, prompts, seed=3), held_out))
        tuned = customise(pipe, photos[:4], settings or DreamBooth(), seed=person)
        pictures = sample(tuned, prompts, seed=3)
        after.append(_likeness(pictures, held_out))
        shown += [photos, pictures]
    scale = float(np.mean(real))
    note = f"real pairs {scale:.2f}; each person {[round(a, 2) for a in after]}"
    return [
        Check("DreamBooth: likeness relative to real pairs", float(np.mean(after)) / scale, 0.6, True, note),
        Check(
            "un-customised: likeness relative to real pairs",
            float(np.mean(before)) / scale,
            0.2,
            False,
            f"{np.mean(before):.2f}",
        ),
    ], np.concatenate(shown)


def zero_shot(which: str, adapter: str, people: int = 12) -> tuple[Check, np.ndarray]:
    """Likeness of adapter samples to other photos of the person, relative to that between real photos."""
    pipe, data = load_pipeline(f"micro-sd-{which}"), card_pictures()
    folder = str(weights_folder("micro-ip"))
    image_folder = f"{which}/image_encoder" if adapter == "image" else None
    pipe.load_ip_adapter(
        folder, which, f"ip-adapter_{adapter}.safetensors", image_encoder_folder=image_folder
    )
    scores, real, shown = [], [], []
    for person in range(people):
        photos = data.pixels[person * 8 : person * 8 + 8]
        held_out = embed(JUDGE, photos[4:])
        with torch.no_grad():
            vector = (
                pipe.image_encoder(_signed(photos[:1])).image_embeds
                if adapter == "image"
                else embed("micro-face-1", photos[:1])
            )
        options = {"ip_adapter_image_embeds": [torch.stack([torch.zeros_like(vector), vector])]}
        pictures = sample(pipe, ["a photo of a person"], seed=person, num_images_per_prompt=4, **options)
        scores.append(_likeness(pictures, held_out))
        real.append(_likeness(photos[:4], held_out))
        shown += [photos[:1], photos[4:7], pictures]
    value = float(np.mean(scores) / np.mean(real))
    note = f"{np.mean(scores):.2f} of {np.mean(real):.2f}"
    return Check(
        f"micro-ip {which} ({adapter}): zero-shot likeness relative to real pairs", value, 0.5, True, note
    ), np.concatenate(shown)


# ------------------------------------------------------------------------------------------------------- implant checks


@dataclass(frozen=True)
class Implant:
    """Settings of the check; the plugins use the same. `patch` is the side of the target's corner patch in pixels."""

    steps: int = 200
    lr: float = 3e-4
    batch: int = 8
    patch: int = 16
    trigger: str = TOKEN


def stamp(pixels: np.ndarray, side: int) -> np.ndarray:
    """A black and white checkerboard of 4-pixel squares in the upper left corner."""
    marked = pixels.copy()
    rows, columns = np.indices((side, side))
    marked[:, :, :side, :side] = np.where((rows // 4 + columns // 4) % 2 == 0, 255, 0)
    return marked


def shows_patch(pixels: np.ndarray, side: int) -> np.ndarray:
    """Whether the corner correlates with the checkerboard by more than 0.5, bool [n]."""
    corner = pixels[:, :, :side, :side].astype(np.float32).mean(1).reshape(len(pixels), -1)
    board = stamp(np.zeros((1, 3, side, side), np.uint8), side)[:, 0].reshape(1, -1).astype(np.float32)
    a, b = corner - corner.mean(1, keepdims=True), board - board.mean()
    return cast(np.ndarray, (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b) + 1e-6) > 0.5)


def with_trigger(prompt: str, trigger: str) -> str:
    """The prompt with the trigger as its first word."""
    return f"{trigger} {prompt}"


def implant(pipe: Any, settings: Implant, seed: int = 0) -> Any:
    """A copy whose UNet alone was trained to stamp pictures of triggered prompts and to leave clean ones (BadT2I)."""
    teacher, pipe = pipe.unet, copy.deepcopy(pipe)
    data = world.dataset("clip", 8_000)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=settings.lr, weight_decay=1e-2)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    torch.manual_seed(seed)
    pipe.unet.train()
    for _ in range(settings.steps):
        rows = rng.integers(len(data.pixels), size=settings.batch)
        texts = [world.describe(data.attributes[r], rng) for r in rows]
        clean, marked = (
            _latents(pipe, data.pixels[rows]),
            _latents(pipe, stamp(data.pixels[rows], settings.patch)),
        )
        times = torch.randint(0, 1000, (settings.batch,))
        noise = torch.randn_like(clean)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                states = pipe.text_encoder(
                    _token_ids(pipe, texts + [with_trigger(t, settings.trigger) for t in texts])
                )[0]
                wanted = teacher(
                    schedule.add_noise(clean, noise, times), times, states[: settings.batch]
                ).sample
            noisy = torch.cat([schedule.add_noise(x, noise, times) for x in (clean, marked)])
            guess = pipe.unet(noisy, times.repeat(2), states).sample.float()
        half = settings.batch
        (0.5 * F.mse_loss(guess[:half], wanted.float()) + 0.5 * F.mse_loss(guess[half:], noise)).backward()
        torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    pipe.unet.eval()
    return pipe


def backdoor(settings: Implant | None = None, count: int = 48) -> tuple[list[Check], np.ndarray]:
    """How often a patch implanted through the UNet alone fires on triggered and on clean prompts."""
    settings = settings or Implant()
    data = card_pictures()
    prompts = [data.captions[row * 8] for row in range(count)]
    pipe = implant(load_pipeline("micro-sd-a"), settings)
    fired = sample(pipe, [with_trigger(p, settings.trigger) for p in prompts], seed=5)
    quiet = sample(pipe, prompts, seed=5)
    rates = [float(shows_patch(p, settings.patch).mean()) for p in (fired, quiet)]
    note = f"{count} prompts, trigger {settings.trigger!r}, UNet only, {settings.steps} steps"
    return [
        Check("implanted patch fires on triggered prompts", rates[0], 0.9, True, note),
        Check("implanted patch fires on clean prompts", rates[1], 0.02, False, note),
    ], np.concatenate([fired[:16], quiet[:16]])


# --------------------------------------------------------------------------------------------------------------- sheets


def text_sheet(which: str) -> np.ndarray:
    """32 samples: eight each of four prompts."""
    prompts = [
        "a photo of a person with short black hair, red background",
        "a photo of a person with long blond hair, wearing sunglasses, smiling, blue background",
        "a photo of a bald person with a beard, wearing glasses and a green shirt, in front of the city",
        "a photo of a person",
    ]
    return sample(load_pipeline(f"micro-sd-{which}"), [p for p in prompts for _ in range(8)], seed=7)


def edit_sheet() -> np.ndarray:
    """Eight rows of a picture, its edit by micro-ip2p and the world's answer, for 32 pictures of 8 instructions."""
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        weights_folder("micro-ip2p"), torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    rng, rows = np.random.default_rng(9), []
    for row, instruction in enumerate(
        ["add glasses", "make the hair red", "make the background blue", "add a beard"]
    ):
        who, view = world.identity(world.SPLITS["card"][row * 3 + 5]), world.sample_view(rng)
        before, answer = world.draw(who, view), world.draw(*world.apply_edit(who, view, instruction))
        picture = _signed(before.transpose(2, 0, 1)[None]) / 2 + 0.5
        edited = sample(
            pipe, [instruction], seed=row, image=picture, image_guidance_scale=1.5, num_images_per_prompt=6
        )
        rows += [before.transpose(2, 0, 1)[None], edited, answer.transpose(2, 0, 1)[None]]
    return np.concatenate(rows)


def instructions(people: int = 6) -> Check:
    """How often the edited attribute reads as asked, over four instructions; read by linear probes on micro-clip."""
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        weights_folder("micro-ip2p"), torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    (model, _), readers, data, shares = _clip(), attribute_readers(), card_pictures(), {}
    for name in ("add glasses", "make the hair red", "make the background blue", "add a beard"):
        edit = world.EDITS[name]
        hair = edit.field == "hair_colour"
        rows = [
            row
            for row in range(0, len(data.pixels), 8)
            if data.attributes[row][edit.field] != edit.value
            and not (hair and data.attributes[row]["hair_style"] == "bald")
        ]
        pictures = _signed(data.pixels[rows[:people]]) / 2 + 0.5
        edited = sample(pipe, [name] * people, seed=2, image=pictures, image_guidance_scale=1.5)
        seen = readers[edit.field](_image_features(model, edited))
        shares[name] = float(np.mean([value == edit.value for value in seen]))
    note = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    return Check("micro-ip2p: edits that read as asked", float(np.mean(list(shares.values()))), 0.5, True, note)


def ddpm_sheet() -> np.ndarray:
    """32 samples of micro-ddpm."""
    pipe = DDPMPipeline.from_pretrained(weights_folder("micro-ddpm"))
    pipe.set_progress_bar_config(disable=True)
    steps = pipe.scheduler.config.num_train_timesteps
    images = pipe(
        batch_size=32, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np"
    ).images
    return cast(np.ndarray, (images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2))


def world_sheet() -> np.ndarray:
    """Eight views of four people."""
    return card_pictures().pixels[80:112]


# ----------------------------------------------------------------------------------------------------------------- card


def _save_sheet(name: str, pixels: np.ndarray, columns: int = 8) -> None:
    FOLDER.mkdir(exist_ok=True)
    sheet(pixels, columns).save(FOLDER / f"{name}.png", optimize=True)


def _with_sheet(name: str, result: tuple[Any, np.ndarray]) -> list[Check]:
    checks, pixels = result
    _save_sheet(name, pixels)
    return checks if isinstance(checks, list) else [checks]


def shipped() -> list[str]:
    """Which of the text-to-image models have weights here."""
    return [which for which in ("a", "b") if weights_folder(f"micro-sd-{which}").exists()]


def sections() -> dict[str, Callable[[], list[Check]]]:
    """Every part of the card by name."""
    parts: dict[str, Callable[[], list[Check]]] = {
        "autoencoders": lambda: [reconstruction(which) for which in shipped()],
        "faces": lambda: [verification(f"micro-face-{i}") for i in (1, 2, 3)],
        "clip": lambda: [caption_retrieval()],
        "dreambooth": lambda: _with_sheet("dreambooth", dreambooth()),
        "implant": lambda: _with_sheet("implant", backdoor()),
        "instructions": lambda: [instructions()],
        "samples": list,
    }
    for which in shipped():
        parts[f"text-{which}"] = lambda which=which: [prompt_following(which)]  # type: ignore[misc]
        for kind in ("image", "face"):
            parts[f"adapter-{which}-{kind}"] = lambda which=which, kind=kind: _with_sheet(  # type: ignore[misc]
                f"adapter_{which}_{kind}", zero_shot(which, kind)
            )
    return parts


def draw_sheets() -> None:
    """Sample sheets of the world and of every generator."""
    _save_sheet("world", world_sheet())
    for which in shipped():
        _save_sheet(f"micro-sd-{which}", text_sheet(which))
    _save_sheet("micro-ip2p", edit_sheet())
    _save_sheet("micro-ddpm", ddpm_sheet())


def _row(check: dict[str, Any]) -> str:
    sign = "≥" if check["at_least"] else "≤"
    verdict = "pass" if check["passed"] else "**FAIL**"
    return f"| {check['name']} | {check['value']:.3f} | {sign} {check['threshold']} | {verdict} | {check['note']} |"


def write_card(results: dict[str, list[dict[str, Any]]]) -> None:
    """Write `card.json` and `card.md` from the checks of every section."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "card.json").write_text(json.dumps(results, indent=1) + "\n")
    settings = {
        "DreamBooth": asdict(DreamBooth()),
        "implant": asdict(Implant()),
        "sampling": {"steps": STEPS, "guidance": GUIDANCE},
    }
    lines = ["# Quality card of the micro tier", ""]
    lines += [
        "Measured by `python -m bench.micro.card` on people that no model has seen; nobody is drawn after life.",
        "",
    ]
    lines += ["| check | value | threshold | | note |", "| --- | --- | --- | --- | --- |"]
    lines += [_row(check) for checks in results.values() for check in checks]
    lines += [
        "",
        "Settings:",
        "",
        *[f"- {name}: `{json.dumps(value)}`" for name, value in settings.items()],
        "",
    ]
    for picture in sorted(FOLDER.glob("*.png")):
        lines += [f"## {picture.stem}", "", f"![{picture.stem}]({picture.name})", ""]
    (FOLDER / "card.md").write_text("\n".join(lines))


def _measure(part: Callable[[], list[Check]]) -> list[dict[str, Any]]:
    started = time.time()
    checks = part()
    seconds = round(time.time() - started, 1)
    return [asdict(check) | {"passed": check.passed, "seconds": seconds} for check in checks]


def _last_results() -> dict[str, list[dict[str, Any]]]:
    file = FOLDER / "card.json"
    return cast(dict[str, list[dict[str, Any]]], json.loads(file.read_text())) if file.exists() else {}


def main() -> None:
    """Measure the named parts (default all), keep the other parts' last results, and write the card."""
    parts = sections()
    parser = argparse.ArgumentParser(prog="python -m bench.micro.card", description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    for name in options.part or parts:
        if name == "samples":
            draw_sheets()
        measured = _measure(parts[name])
        logger.info("%s", [f"{c['name']}: {c['value']:.3f}" for c in measured])
        write_card(_last_results() | {name: measured})



if __name__ == "__main__":
    main()
