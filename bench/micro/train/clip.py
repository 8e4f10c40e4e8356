"""micro-clip: a CLIPModel whose text states keep every word apart and whose image embedding knows the person.

Four terms are learned at once. (1) Captions against images, contrastively. (2) From the last hidden state at each
position the token at that position, and from the state at the end of the text the bag of all its words: a diffusion
model that sees only these states can then tell a rare word from "a". Rare, random and foreign words are mixed into
the captions for this. (3) From the image embedding the geometry of the face (the world knows it), and (4) two views
of one person against the views of others: an image prompt then carries the identity.
"""

# diffusers and transformers ship half a set of types; what they leave untyped is checked by the tests.
# mypy: disable-error-code="attr-defined, no-untyped-call, operator, no-any-return, index, union-attr, arg-type"

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from bench.micro import world
from bench.micro.models import weights_folder
from bench.micro.tokenizer import (
    EXTRA_WORDS,
    MAX_LENGTH,
    build_tokenizer,
    save_tokenizer,
)
from bench.micro.train import common

NAME = "micro-clip"
WIDTH = 128
SCHEDULE = common.Schedule(steps=1200, lr=1.2e-3, seed=21, warmup=60, ema=0.99, weight_decay=0.02)
PICTURES = 24_000
PEOPLE_PER_BATCH, VIEWS = 32, 2


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Text: 3 layers of 128; vision: 4 layers of 128 over 8x8 patches; both projected to 128."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": WIDTH,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": world.SIZE,
        "patch_size": 8,
        "projection_dim": WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def image_processor() -> CLIPImageProcessorPil:
    """Resize to 64 pixels and map [0, 1] to [-1, 1]."""
    side = {"height": world.SIZE, "width": world.SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": world.SIZE},
        crop_size=side,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )


def person_vector(who: world.Identity) -> np.ndarray:
    """The numbers of a face as float32: lengths, angles, colours in [0, 1], hair style and colour as one-hot."""
    numbers: list[float] = []
    for value in astuple(who):
        if isinstance(value, tuple):
            numbers += [v / 255 if isinstance(v, int) else v for v in value]
        elif value is None:
            numbers += [0.0, 0.0]
        elif not isinstance(value, str):
            numbers.append(float(value))
    numbers += [float(who.hair_style == s) for s in world.HAIR_STYLES]
    numbers += [float(who.hair_colour == s) for s in world.HAIR_COLOURS]
    numbers += [float(who.beard == s) for s in world.BEARDS]
    return np.array(numbers, dtype=np.float32)


class TrainingHeads(nn.Module):
    """The model and the heads that only its training needs."""

    def __init__(self, clip: CLIPModel, vocabulary: int, face_numbers: int) -> None:
        super().__init__()
        self.clip = clip
        self.token = nn.Linear(WIDTH, vocabulary)
        self.bag = nn.Linear(WIDTH, vocabulary)
        self.face = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, face_numbers))
        self.person = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64))


def _random_word(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.6:
        return str(rng.choice(EXTRA_WORDS))
    if kind < 0.9:
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(2, 7)))
    return str(rng.choice(["\u200b", "\u043e", "\u0435", "\u0430", "!", "#", "2", "7"]))


def with_rare_words(text: str, rng: np.random.Generator) -> str:
    """`text` with one or two words from outside the world at random places."""
    words = text.split(" ")
    for _ in range(int(rng.integers(1, 3))):
        words.insert(int(rng.integers(0, len(words) + 1)), _random_word(rng))
    return " ".join(words)


def say(facts: dict[str, str], rng: np.random.Generator) -> str:
    """A caption for training: full or partial, and with rare words in four of ten."""
    text = world.describe(facts, None if rng.random() < 0.35 else rng)
    return with_rare_words(text, rng) if rng.random() < 0.4 else text


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], padding: str = "max_length") -> Tensor:
    """Token numbers int64 [n, 40], padded and truncated; with `padding="longest"` only as wide as the longest text."""
    rows = tokenizer(texts, padding=padding, truncation=True, max_length=MAX_LENGTH).input_ids
    return torch.tensor(rows, dtype=torch.long)


@dataclass
class Terms:
    """The four losses; `total` weighs them."""

    contrast: Tensor
    words: Tensor
    bag: Tensor
    face: Tensor
    person: Tensor

    def total(self) -> Tensor:
        return self.contrast + 0.25 * self.words + 2 * self.bag + self.face + 0.5 * self.person


def _word_terms(heads: TrainingHeads, hidden: Tensor, ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    seen = torch.cumsum((ids == end).int(), 1) <= 1
    words = F.cross_entropy(heads.token(hidden[seen]).float(), ids[seen])
    ends = (ids == end).int().argmax(1)
    logits = heads.bag(hidden[torch.arange(len(ids)), ends]).float()
    present = torch.zeros_like(logits).scatter_(1, ids, 1.0)
    return words, F.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(1).mean() / 20


def _contrast(left: Tensor, right: Tensor, scale: Tensor | float) -> Tensor:
    logits = scale * F.normalize(left.float(), dim=-1) @ F.normalize(right.float(), dim=-1).T
    rows = torch.arange(len(logits))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


def losses(heads: TrainingHeads, pixels: Tensor, ids: Tensor, faces: Tensor) -> Terms:
    """`pixels` [n, 3, 64, 64] in [-1, 1], views of one person in neighbouring pairs; `faces` [n, m] standardised."""
    clip = heads.clip
    images = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    text = clip.text_model(ids)
    sentences = clip.text_projection(text.pooler_output)
    words, bag = _word_terms(heads, text.last_hidden_state, ids, clip.config.text_config.eos_token_id)
    scale = clip.logit_scale.exp().clamp(max=60)
    people = heads.person(images)
    return Terms(
        contrast=_contrast(images, sentences, scale),
        words=words,
        bag=bag,
        face=F.mse_loss(heads.face(images).float(), faces),
        person=_contrast(people[0::2], people[1::2], 16.0),
    )


def face_targets(people: np.ndarray) -> Tensor:
    """Standardised face numbers float32 [n, m] of the people's indices."""
    unique, inverse = np.unique(people, return_inverse=True)
    table = np.stack([person_vector(world.identity(int(i))) for i in unique])
    table = (table - table.mean(0)) / (table.std(0) + 1e-6)
    return torch.from_numpy(table[inverse])


def draw_rows(rng: np.random.Generator, pictures: int, views_per_identity: int = 8) -> np.ndarray:
    """Rows of a batch: `VIEWS` different views, side by side, of each of `PEOPLE_PER_BATCH` people."""
    people = rng.choice(pictures // views_per_identity, size=PEOPLE_PER_BATCH, replace=False)
    views = np.stack([rng.choice(views_per_identity, size=VIEWS, replace=False) for _ in people])
    return cast(np.ndarray, (people[:, None] * views_per_identity + views).reshape(-1))


def export(clip: CLIPModel, tokenizer: CLIPTokenizer, target: Path) -> None:
    """Write the model, its tokenizer and its image processor, half precision."""
    import copy

    with common.replacing(target) as folder:
        copy.deepcopy(clip).half().save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        image_processor().save_pretrained(folder)


def train() -> None:
    """Train micro-clip on the people of the split `clip`."""
    torch.manual_seed(SCHEDULE.seed)
    tokenizer = build_tokenizer()
    data = world.dataset("clip", PICTURES)
    faces = face_targets(data.identity)
    heads = TrainingHeads(new_clip(tokenizer), len(tokenizer), faces.shape[1])

    def loss_of(rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        rows = draw_rows(rng, len(data.pixels))
        ids = tokenize(tokenizer, [say(data.attributes[r], rng) for r in rows], padding="longest")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = losses(heads, common.to_unit(data.pixels[rows]), ids, faces[rows])
        facts = {k: float(v.detach()) for k, v in vars(terms).items()}
        return terms.total(), facts

    def publish() -> None:
        export(heads.clip, tokenizer, weights_folder(NAME))

    common.fit(common.Job(NAME, heads, SCHEDULE, publish, export_every=240), loss_of)
