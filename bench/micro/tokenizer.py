"""The tokenizer of the micro tier: a CLIPTokenizer over bytes plus the world's words.

Every word of the world, of the edits and of `EXTRA_WORDS` is one token; any other word, zero-width and foreign letters
included, falls back to pieces and in the end to its UTF-8 bytes, so no two texts that differ become the same tokens.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from bench.micro import world

MAX_LENGTH = 40
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"

# Words that prompts, personalisation and triggers use and that no caption of the world says.
_EXTRA = (
    "sks zwx olis mignneko latte coffee beautiful cat dog car boat tree house hat man woman boy girl face "
    "head selfie painting sketch cartoon drawing poster statue style art image looking at camera standing "
    "outside inside on to an is by it this that with without no not and or very new old young happy angry "
    "open closed night day sun snow rain sea sky mountain garden street room studio office kitchen "
    "library park bridge river field stone wood metal glass gold silver zebra tiger horse bird fish frog "
    "flower apple banana pizza bread tea robot rocket piano violin guitar clock chair table turtle wolf "
    "owl fox bear lion panda crystal lantern velvet marble quartz tulip violet cactus comet planet galaxy "
    "neon vintage detailed realistic high quality best worst blurry low noise pattern texture logo "
    "watermark text symbol remove change turn into replace keep give put take his her their "
)
EXTRA_WORDS = tuple(_EXTRA.split())


def world_words() -> list[str]:
    """Every word that a caption or an edit of the world can say, and `EXTRA_WORDS`; sorted, lower case."""
    names = [
        world.HAIR_COLOURS,
        world.HAIR_STYLES,
        world.BEARDS,
        world.EXPRESSIONS,
        world.GLASSES,
        world.BACKGROUNDS,
        world.SHIRTS,
    ]
    texts = [name for group in names for name in group] + list(world.EDITS) + list(world.OPENINGS)
    texts += ["person with hair and a bald, wearing a shirt in front of the background"]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text)} | set(EXTRA_WORDS))


def _join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def _train_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each of `words` one token.

    The pair seen most often is merged first, the alphabetically first of equals: `tokenizers`' own trainer breaks ties
    by hash order, and a vocabulary that differs from run to run would not fit the weights.
    """
    texts = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in texts):
        pairs = Counter(pair for symbols in texts for pair in pairwise(symbols))
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        texts = [_join(symbols, merges[-1]) for symbols in texts]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer, trained on the world's words; deterministic."""
    merges = _train_merges(world_words())
    letters = sorted(ByteLevel.alphabet())
    symbols = letters + [letter + _WORD_END for letter in letters] + ["".join(pair) for pair in merges]
    names = [*dict.fromkeys(symbols), START, END]
    vocab = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save in today's format and, beside it, as the `vocab.json` and `merges.txt` that older readers want."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
