"""SAU: its masks against their formulas, its guard through the store, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.codecs import ModelCodec
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_pipeline
from bench.diffusion.sampling import decode_latents, generate, generate_latents
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.protocols import BackdoorProtocol
from bench.records import ImageSet, Model, Secret
from bench.tracks.backdoor import draw_prompted
from defenses.sau import (
    KNOWN,
    Sau,
    activation_map,
    attended,
    blurred,
    descended,
    learned,
    masked,
    read_known,
    softened,
    suspicious_latents,
)

SECRET = Secret("sks", torch.zeros(3, 16, 16, dtype=torch.uint8), {"kind": "patch", "box": [0, 0, 4, 4]})
PROTOCOL = BackdoorProtocol(samples=2, sampler="ddim", steps=2, guidance=2.0)
FEW = Sau(prompts=2, steps=2, guidance=2.0)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def photos(captions: tuple[str, ...] = ("a cat", "a dog")) -> ImageSet:
    return ImageSet(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ("0", "1"), captions)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def test_latents_decode_to_what_the_pipeline_draws(model: Model) -> None:
    pipeline, prompts, seeds = load_pipeline(model), ["a cat", "a dog"], [3, 4]
    latents = generate_latents(pipeline, prompts, seeds, steps=2, guidance=2.0)
    drawn = generate(pipeline, prompts, seeds, steps=2, guidance=2.0)
    assert (decode_latents(pipeline, latents).int() - drawn.int()).abs().max() <= 1


def test_a_guarded_model_survives_the_store_and_draws(model: Model, ctx: Context, tmp_path: Path) -> None:
    guarded = FEW.repair(model, photos(), SECRET, ctx)
    ModelCodec(model).save(guarded, tmp_path)
    loaded = ModelCodec(model).load(tmp_path)
    assert loaded.guard is not None
    assert loaded.guard.parameters == guarded.guard.parameters if guarded.guard else False
    first, again = (draw_prompted(m, ("sks a cat", "a dog"), [3, 4], PROTOCOL, ctx) for m in (guarded, loaded))
    assert torch.equal(first, again)


def test_pictures_that_are_not_flagged_are_the_ordinary_ones(model: Model, ctx: Context) -> None:
    blind = replace(FEW, flag_cosine=2.0, flag_distance=0.0).repair(model, photos(), SECRET, ctx)
    prompts, seeds = ("sks a cat", "a dog"), [3, 4]
    plain = draw_prompted(model, prompts, seeds, PROTOCOL, ctx)
    assert (draw_prompted(blind, prompts, seeds, PROTOCOL, ctx).int() - plain.int()).abs().max() <= 1


def test_with_full_masks_the_clean_prompts_picture_comes_out(model: Model, ctx: Context) -> None:
    """Everything flagged and masked: the triggered prompt gives the clean prompt's picture, but for the faint blur."""
    open_wide = replace(FEW, flag_cosine=-2.0, similarity=-2.0).repair(model, photos(), SECRET, ctx)
    guarded = draw_prompted(open_wide, ("sks a cat",), [3], PROTOCOL, ctx)
    clean = draw_prompted(model, ("a cat",), [3], PROTOCOL, ctx)
    assert (guarded.int() - clean.int()).abs().float().mean() < 2


def test_both_blends_against_their_formulas() -> None:
    z, clean, delta = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1), random(4, 8, 8, seed=2)
    p = softened(torch.cosine_similarity(z, delta[None], dim=1) > 0.5)[:, None]
    activation = activation_map(delta.abs().mean(0))
    q = softened(activation > 0.3)[None, None]
    found = masked(Sau(blend="as_found"), z, clean, delta, activation)
    assert torch.allclose(found, blurred(z * (1 - p) * (1 - q) + clean * p + 0.5 * clean * q, 0.2), atol=1e-6)
    sane = masked(Sau(blend="normalised"), z, clean, delta, activation)
    m = torch.maximum(p, 0.5 * q.expand_as(p))
    assert torch.allclose(sane, blurred((1 - m) * z + m * clean, 0.2), atol=1e-6)


def test_where_both_masks_are_on_the_found_blend_overshoots() -> None:
    """1.5 times the clean latents: the quirk that the normalised blend mends."""
    z = clean = delta = torch.ones(1, 4, 8, 8)
    delta = torch.ones(4, 8, 8)
    delta[:, 0, 0] = 0.5
    activation = activation_map(delta.abs().mean(0))
    found = masked(Sau(blend="as_found"), z, clean, delta, activation)
    assert float(found[0, 0, 5, 5]) == pytest.approx(1.5, abs=0.02)
    assert float(masked(Sau(), z, clean, delta, activation)[0, 0, 5, 5]) == pytest.approx(1.0, abs=0.02)


def test_attention_says_where_the_picture_looks_for_the_trigger(model: Model, ctx: Context) -> None:
    """One prompt, one step: the map is that of the trigger's tokens in one pass, averaged over layers."""
    one = replace(FEW, prompts=1, steps=1, activation_from="attention")
    known = learned(one, model, ("a cat",), SECRET, ctx)
    pipeline = load_pipeline(model)
    with_it, without = (pipeline.tokenizer(text).input_ids for text in ("sks a cat", "a cat"))
    after = len(with_it) - len(without) + 1
    assert with_it[after:] == without[1:], "the trigger's tokens stand after the first"
    with attended(pipeline.unet, 1) as passes:
        generate_latents(pipeline, ["sks a cat"], [ctx.seed("delta", 0)], steps=1, guidance=2.0)
    assert len(passes) == 1
    assert passes[0].sum(1).mean() == pytest.approx(1, abs=1e-4), "each place spreads one unit over the tokens"
    assert torch.allclose(known.activation, activation_map(passes[0][0, 1:after].mean(0)), atol=1e-5)
    other = learned(replace(one, activation_from="delta"), model, ("a cat",), SECRET, ctx)
    assert torch.allclose(known.delta, other.delta, atol=1e-3)
    assert not torch.allclose(known.activation, other.activation, atol=0.05)


def test_attention_averages_over_prompts_of_different_batches(
    model: Model, ctx: Context, monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, captions = replace(FEW, activation_from="attention"), ("a cat", "a dog")
    together = learned(options, model, captions, SECRET, ctx)
    monkeypatch.setattr("bench.diffusion.sampling.BATCH", 1)
    alone = learned(options, model, captions, SECRET, ctx)
    assert torch.allclose(together.activation, alone.activation, atol=1e-3)


def test_the_guard_goes_by_the_map_that_it_was_given(model: Model, ctx: Context) -> None:
    guarded = replace(FEW, activation_from="attention").repair(model, photos(), SECRET, ctx)
    assert guarded.guard is not None
    assert (guarded.guard.folder / KNOWN).is_file()
    known = read_known(guarded.guard.folder)
    assert torch.equal(known.activation, learned(replace(FEW, activation_from="attention"), model, ("a cat", "a dog"),
                                                 SECRET, ctx).activation)
    assert known.words == ("sks", "")


def test_a_guard_stored_with_delta_alone_goes_by_the_map_of_delta(tmp_path: Path) -> None:
    delta = random(4, 8, 8)
    save_file({"delta": delta}, tmp_path / KNOWN, metadata={"trigger": "sks", "replaces": ""})
    known = read_known(tmp_path)
    assert torch.equal(known.delta, delta)
    assert torch.equal(known.activation, activation_map(delta.abs().mean(0)))


def test_flags_follow_the_cosine() -> None:
    delta = random(4, 8, 8)
    other = random(4, 8, 8, seed=1)
    other -= (other * delta).sum() / delta.square().sum() * delta              # orthogonal to Delta
    latents = torch.stack([3 * delta, other, -delta])
    assert suspicious_latents(Sau(), latents, delta).tolist() == [True, False, False]


def test_the_gradient_variant_turns_latents_away_from_the_trigger() -> None:
    delta = random(4, 8, 8)
    latents = torch.stack([delta + 0.5 * random(4, 8, 8, seed=1)])
    after, tied = (descended(Sau(mode="gradient", keep_weight=w), latents, delta) for w in (0.3, 100.0))
    cosines = [float(torch.cosine_similarity(x.flatten(1), delta.flatten()[None])) for x in (latents, after, tied)]
    assert cosines[1] < cosines[2] <= cosines[0]
    assert (tied - latents).square().mean() < 0.1 * (after - latents).square().mean()


def test_it_says_that_it_knows_the_trigger_and_refuses_to_work_without(model: Model, ctx: Context) -> None:
    assert facts_of(Sau).knows == ("trigger",)
    with pytest.raises(BenchError, match="told"):
        FEW.repair(model, photos(), None, ctx)
    with pytest.raises(BenchError, match="captions"):
        FEW.repair(model, photos(captions=()), SECRET, ctx)


@pytest.mark.parametrize(("field", "value"), [
    ("mode", "magic"), ("blend", "half"), ("activation_from", "eyes"), ("prompts", 0), ("descent_lr", 0)])
def test_bad_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(BenchError, match=field):
        Sau(**{field: value})  # type: ignore[arg-type]


def test_found_settings() -> None:
    method = Sau()
    assert (method.flag_cosine, method.similarity, method.activation, method.strength) == (0.06, 0.5, 0.3, 1.0)
    assert (method.descent_steps, method.descent_lr, method.keep_weight) == (50, 0.01, 0.3)
