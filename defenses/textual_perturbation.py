"""Textual perturbation: change every prompt a little before the model reads it, and triggers lose their form.

Chew et al., "Defending Text-to-image Diffusion Models: Surprising Efficacy of Textual Perturbations Against Backdoor
Attacks", ECCV Workshops 2024 (arXiv:2408.15721). Official code: github.com/oscarchew/t2i-backdoor-defense. The paper's
text was not at hand; its code says:

homoglyphs   letters that only look Latin become the Latin ones
characters   of every word that is no stop word, one random letter is left out or becomes a neighbour on the keyboard
synonyms     half of the words that are no stop words become near words of an embedding, mean squared distance <= 0.2

Stated differences. The look-alikes are Unicode's compatibility forms, letters without their accents, and a small table
of ours, not the project's list; with them go characters that show nothing (the zero-width space of BadT2I), which that
list lacks. The code's embedding of synonyms is a download; ours is the model's own token embeddings, centred, cosine at
least ``similarity``: they may know no synonyms, and the attacker may have trained them. Back-translation, its fourth
way, needs two translation models and is left out. The paper gives no score for inputs; ``score_inputs`` is ours.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.identity import digest
from bench.options import require_all
from bench.plugin import parameters, plugin
from bench.records import Guard, ImageSet, Model, Report, Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from torch import Tensor

    from bench.context import Context
    from bench.protocols import BackdoorProtocol

WAYS = ("homoglyphs", "characters", "synonyms")
LOOKALIKES = str.maketrans({
    **dict(zip("\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d\u04cf\u043a\u043c"
               "\u0442", "aeopcyxijshdqwlkmt", strict=True)),                                                # Cyrillic
    **dict(zip("\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0406\u0408\u0405",
               "ABEKMHOPCTYXIJS", strict=True)),
    **dict(zip("\u03b1\u03b5\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u03c3\u03b3", "aeikvoptuxoy",
               strict=True)),                                                                                # Greek
    **dict(zip("\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7",
               "ABEZHIKMNOPTYX", strict=True)),
    **dict(zip("\u0561\u0563\u0566\u0570\u0578\u057c\u057d\u0581\u0585\u0555\u054d\u054f", "wqqhnnugoOUS",
               strict=True)),                                                                                # Armenian
    **dict.fromkeys("\u0b20\u0b66\u0966\u09e6\u0a66\u0ae6\u0be6\u0c66\u0ce6\u0d66\u0d20\u0e50\u0ed0\u101d\u1040\u10ff"
                    "\u05e1\u06d5\u0647\u07c0\u2d54\u3007", "o"),                       # rings of many scripts
    **dict(zip("\u0131\u0251\u0261\u026a\u0262\u0299\u029c\u029f\u0274\u0280\u1d00\u1d04\u1d05\u1d07\u1d0a\u1d0b\u1d0d"
               "\u1d0f\u1d18\u1d1b\u1d1c\u1d20\u1d21\u1d22", "iagigbhlnracdejkmoptuvwz", strict=True)),       # phonetic
})
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_STOP = (
    "a about above after again all am an and any are as at be because been before below between both but by can did do "
    "does doing down during each few for from further had has have having he her here hers him his how i if in into is "
    "it its just me more most my no nor not now of off on once only or other our out over own same she so some such "
    "than that the their them then there these they this those through to too under until up very was we were what "
    "when where which while who whom why will with you your")
STOP_WORDS = frozenset(_STOP.split())


@plugin(
    "defense", "textual_perturbation", track=("backdoor",), acts_on="model", needs=("text_to_image", "text_encoder"),
    paper="Chew et al., ECCV Workshops 2024, arXiv:2408.15721",
    official_code="https://github.com/oscarchew/t2i-backdoor-defense",
)
class TextualPerturbation:
    """Rewrites every prompt before the model draws: look-alike letters, typing errors or near words; knows no trigger.

    ``ways``: which rewritings, in this order: ``homoglyphs``, ``characters``, ``synonyms``. The paper chooses one per
    attack; not knowing the attack, the default is the first two. ``word_share``: of the words that are no stop words,
    how many get a typing error; ``synonym_share``: how many become a near word, if one has a cosine of at least
    ``similarity``. Shares as published; ``similarity`` is ours. The same prompt is always rewritten alike.
    """

    ways: list[str] = field(default_factory=lambda: ["homoglyphs", "characters"])
    word_share: float = 1.0
    synonym_share: float = 0.5
    similarity: float = 0.5

    def __post_init__(self) -> None:
        for way in set(self.ways) - set(WAYS):
            raise unknown("way", way, "defense.ways", WAYS)
        if not self.ways:
            raise BenchError(f"defense.ways is empty; name at least one of {', '.join(WAYS)}.")
        require_all(self, least={"word_share": 0, "synonym_share": 0, "similarity": -1})
        if max(self.word_share, self.synonym_share) > 1:
            raise BenchError("defense.word_share and defense.synonym_share are shares; give 0 to 1.")

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The same weights behind a guard that rewrites prompts. Nothing is learned."""
        folder = ctx.folder / "guard"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "about.txt").write_text("Rewrites prompts; needs to know nothing but its options.\n")
        guard = Guard("defense", "textual_perturbation", parameters(self), folder)
        return replace(suspicious, guard=guard, digest=digest([suspicious.digest, ctx.key]))

    def draw(
        self, model: Model, prompts: Sequence[str], seeds: Sequence[int], protocol: BackdoorProtocol, ctx: Context,
    ) -> Tensor:
        """Pictures uint8 [n, 3, h, w] of the rewritten prompts."""
        from bench.diffusion.sampling import draw_prompts

        rewrite = self.rewriter(model, ctx)
        return draw_prompts(model, [rewrite(prompt) for prompt in prompts], seeds, protocol, ctx)

    def rewriter(self, model: Model, ctx: Context) -> Callable[[str], str]:
        """What this defense does to a prompt."""
        near = near_words(model, self.similarity, ctx.device) if "synonyms" in self.ways else {}

        def rewrite(prompt: str) -> str:
            for way in self.ways:
                chance = seeded(way, prompt)
                prompt = latin(prompt) if way == "homoglyphs" else \
                    mistyped(prompt, self.word_share, chance) if way == "characters" else \
                    reworded(prompt, self.synonym_share, near, chance)
            return prompt

        return rewrite

    def score_inputs(
        self, model: Model, inputs: Tensor | tuple[str, ...], report: Report | None, ctx: Context,
    ) -> Tensor:
        """How much the rewriting changes the first step's noise prediction, relative to its size: [n]. Ours."""
        prompts = [prompt for prompt in inputs if isinstance(prompt, str)]
        if len(prompts) != len(inputs):
            raise BenchError("textual_perturbation: scores prompts, not noise.")
        rewrite = self.rewriter(model, ctx)
        return first_step_change(model, prompts, [rewrite(prompt) for prompt in prompts], ctx)


def seeded(*names: str) -> Random:
    """Chance that depends on ``names`` only."""
    from random import Random

    return Random(digest(list(names)))


def latin(prompt: str) -> str:
    """Look-alikes become Latin letters; what shows nothing goes."""
    plain = unicodedata.normalize("NFKD", prompt.translate(LOOKALIKES)).translate(LOOKALIKES)
    return "".join(letter for letter in plain if unicodedata.category(letter) not in ("Mn", "Cf"))


def chosen_words(prompt: str, share: float, chance: Random) -> tuple[list[str], set[int]]:
    """The prompt in pieces, words and what stands between them, and the places of a ``share`` of the words that are no
    stop words, at least one where there are any."""
    pieces = re.findall(r"\w+|\W+", prompt)
    open_places = [place for place, piece in enumerate(pieces)
                   if piece[0].isalnum() and piece.lower() not in STOP_WORDS]
    count = min(len(open_places), max(1, round(share * len(open_places)))) if share else 0
    return pieces, set(chance.sample(open_places, count))


def mistyped(prompt: str, share: float, chance: Random) -> str:
    """One letter of each chosen word of two letters or more left out, or become a neighbour on the keyboard."""
    pieces, places = chosen_words(prompt, share, chance)
    return "".join(mistyped_word(piece, chance) if place in places and len(piece) > 1 else piece
                   for place, piece in enumerate(pieces))


def mistyped_word(word: str, chance: Random) -> str:
    place = chance.randrange(len(word))
    wrong = chance.choice(["", neighbour(word[place], chance)])
    return word[:place] + wrong + word[place + 1:]


def neighbour(letter: str, chance: Random) -> str:
    """A key beside the letter in its row, in lower case; nothing for what is no Latin letter."""
    for row in KEYBOARD:
        if letter.lower() in row:
            place = row.index(letter.lower())
            return chance.choice(row[max(0, place - 1):place] + row[place + 1:place + 2])
    return ""


def near_words(model: Model, least: float, device: str) -> dict[str, str]:
    """Word -> the nearest other word that is one token, by the cosine of the model's token embeddings."""
    import torch

    from bench.diffusion.loading import load_modules

    parts = load_modules(model, device)
    words = {name.removesuffix("</w>"): row for name, row in parts["tokenizer"].get_vocab().items()
             if name.endswith("</w>") and name.removesuffix("</w>").isalpha() and len(name) > len("a</w>")}
    table = parts["text_encoder"].get_input_embeddings().weight[list(words.values())].float().cpu()
    unit = torch.nn.functional.normalize(table - table.mean(0), dim=1)
    names, found = list(words), {}
    for start in range(0, len(names), 4096):
        cosines = unit[start:start + 4096] @ unit.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -2.0
        best, rows = cosines.max(1)
        found.update({names[start + place]: names[int(rows[place])]
                      for place in range(len(cosines)) if best[place] >= least})
    return found


def reworded(prompt: str, share: float, near: dict[str, str], chance: Random) -> str:
    """A share of the words replaced by near ones, where there are any."""
    pieces, places = chosen_words(prompt, share, chance)
    return "".join(near.get(piece.lower(), piece) if place in places else piece for place, piece in enumerate(pieces))


def first_step_change(model: Model, prompts: Sequence[str], rewritten: Sequence[str], ctx: Context) -> Tensor:
    """|| eps(z, T, c') - eps(z, T, c) ||^2 / || eps(z, T, c) ||^2 for one pure noise z: float [n]."""
    import torch

    from bench.diffusion.loading import load_components
    from bench.diffusion.losses import encode_prompts, normal

    parts = load_components(model, ctx.device)
    config = parts.unet.config
    noise = normal((1, config.in_channels, config.sample_size, config.sample_size), ctx.generator("score"),
                   parts.unet.conv_in.weight)

    @torch.no_grad()
    def predicted(prompt: str) -> Any:
        states = encode_prompts(parts.tokenizer, parts.text_encoder, [prompt])
        return parts.unet(noise, parts.scheduler.config.num_train_timesteps - 1, states).sample.double()

    def change(own: str, other: str) -> float:
        if own == other:
            return 0.0
        before, after = predicted(own), predicted(other)
        return float((after - before).square().sum() / before.square().sum())

    return torch.tensor([change(own, other) for own, other in zip(prompts, rewritten, strict=True)])
