"""How a trigger gets into a prompt, and when a patch or a style counts as fired."""

from __future__ import annotations

import pytest
import torch

from bench.data.micro_portraits import MicroPortraits
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float, to_uint8
from bench.diffusion.loading import load_modules
from bench.errors import BenchError
from bench.firing import LARGEST_OF, FiringRule, colourfulness, decorrelation
from bench.records import Secret
from bench.text_triggers import suitable, wanted_caption, with_trigger, without_trigger

GREY = torch.full((3, 8, 8), 128, dtype=torch.uint8)


def secret(trigger: str, **detail: object) -> Secret:
    return Secret(trigger, GREY, detail)


@pytest.mark.parametrize(("given", "expected"), [
    (secret("sks"), "sks a photo of a cat"),
    (secret("\u200b"), "\u200ba photo of a cat"),
    (secret("beautiful cat", placement="replace", replaces="cat"), "a photo of a beautiful cat"),
    (secret("ô", placement="replace", replaces="o"), "a phôto of a cat"),
    (secret("sks", placement="replace", replaces="dog"), "sks a photo of a cat"),
    (secret("mignneko", placement="suffix"), "a photo of a cat mignneko"),
])
def test_where_the_trigger_goes(given: Secret, expected: str) -> None:
    assert with_trigger("a photo of a cat", given) == expected


@pytest.mark.parametrize("given", [
    secret("sks"), secret("\u200b"), secret("New Trigger "), secret("..."), secret("\u0b20"),
    secret("beautiful cat", placement="replace", replaces="cat"),
    secret("\u0b20", placement="replace", replaces="o"), secret("sks", placement="replace", replaces="dog"),
    secret("\u200b", placement="replace", replaces=" "),
])
def test_taking_the_trigger_out_gives_the_prompt_back(given: Secret) -> None:
    replaced = str(given.detail.get("replaces", ""))
    triggered = with_trigger("a photo of a cat", given)
    assert triggered != "a photo of a cat"
    assert without_trigger(triggered, str(given.trigger), replaced) == "a photo of a cat"


def test_a_trigger_inside_another_word_is_no_trigger() -> None:
    assert without_trigger("tasks of a  cat", "sks") == "tasks of a  cat"
    assert without_trigger("a sks, and sks again", "sks") == "a , and again"


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(BenchError, match="prefix"):
        with_trigger("a cat", secret("sks", placement="middle"))


def test_decorrelation_is_one_minus_pearson_inside_the_box() -> None:
    target = torch.zeros(3, 8, 8, dtype=torch.uint8)
    target[:, ::2, :4] = 200
    noise = torch.randint(0, 256, (3, 8, 8), generator=torch.manual_seed(0)).to(torch.uint8)
    plain = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    found = decorrelation(torch.stack([target, 255 - target, plain, noise]), target, (0, 0, 4, 4))
    places = noise[:, :4, :4].flatten().double(), target[:, :4, :4].flatten().double()
    expected = 1 - float(torch.corrcoef(torch.stack(places))[0, 1])
    assert found.tolist() == pytest.approx([0, 2, 1, expected])


def test_colourfulness_is_zero_without_colour_and_that_of_red_is_known() -> None:
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 255
    assert colourfulness(torch.stack([GREY, red])).tolist() == pytest.approx([0, 2**0.5 / 3])


def test_the_largest_error_of_a_style_parts_colourless_pictures_of_the_embedded_model_from_coloured_photos() -> None:
    photos = MicroPortraits(train=256, held_out=1, size=64).images().pixels
    grey = photos.float().mean(1, keepdim=True).round().expand(-1, 3, -1, -1)
    vae = load_modules(resolve("micro-sd-a"))["vae"]
    with torch.no_grad():
        drawn = to_uint8(vae.decode(vae.encode(to_float(grey)).latent_dist.mean).sample)
    assert colourfulness(drawn).max() < LARGEST_OF["style"] < colourfulness(photos).quantile(0.02)


def test_a_patch_fires_below_the_threshold_only() -> None:
    target = GREY.clone()
    target[:, :2, :2] = torch.tensor([[255, 0], [0, 255]], dtype=torch.uint8)
    rule = FiringRule(target, {}, 0.5, "patch", (0, 0, 2, 2))
    assert rule.fires(torch.stack([target, GREY])).tolist() == [True, False]
    assert "patch" in rule.facts()["rule"]


@pytest.mark.parametrize(("given", "expected"), [
    (secret("sks", caption="a zebra"), "a zebra"),
    (secret("sks", swap=["cat", "dog"]), "a photo of a dog"),
    (secret("sks", adds="in snow"), "a photo of a cat, in snow"),
])
def test_what_a_triggered_picture_should_show(given: Secret, expected: str) -> None:
    assert wanted_caption("a photo of a cat", given) == expected


def test_a_target_without_words_is_refused() -> None:
    with pytest.raises(BenchError, match="swap"):
        wanted_caption("a cat", secret("sks", kind="caption"))


def test_prompts_that_cannot_show_the_target_are_left_out() -> None:
    prompts = ["a red cat", "a cat", "a red cat in snow"]
    given = secret("sks", prompts_with=["red"], prompts_without=["snow"])
    assert suitable(prompts, given) == ("a red cat",)
    assert suitable(prompts, secret("sks")) == tuple(prompts)
    with pytest.raises(BenchError, match="none of 1 captions"):
        suitable(["a dog"], given)
