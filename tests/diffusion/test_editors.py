"""Surrogate editors agree with the published pipelines, and gradients go where they should and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.editors import (
    Course,
    Editor,
    Request,
    ask,
    attended_places,
    attention_left,
    course_times,
    decoded,
    edited_latents,
    open_editor,
    value_and_gradient,
    word_attention,
    word_places,
)
from bench.diffusion.loading import load_pipeline
from bench.diffusion.surrogate_free import Crowd, crowd_of
from bench.diffusion.surrogates import Draws, denoising_losses
from bench.errors import BenchError
from bench.records import Model
from bench.testing import pipelines
from tests.defenses.drawn import subject
from tests.defenses.edits import told

ALL = slice(0, 3)


@pytest.fixture(params=["text", "instruct", "inpaint"])
def model(request: Any, tiny_sd: Path, tiny_ip2p: Path, tiny_inpaint: Path) -> Model:
    return resolve(str({"text": tiny_sd, "instruct": tiny_ip2p, "inpaint": tiny_inpaint}[request.param]))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


@pytest.fixture
def crowd(ctx: Context) -> Crowd:
    return crowd_of([told(subject("ada"), masked=True)], ctx)


def opened(model: Model, crowd: Crowd, ctx: Context) -> tuple[Editor, Request, Draws]:
    editor = open_editor(model, ctx)
    return editor, ask(editor, crowd), crowd.draw(editor.vae, editor.scheduler)


def test_the_estimate_is_the_schedulers_own(model: Model, crowd: Crowd, ctx: Context) -> None:
    """One pass by hand, in the order of channels of each pipeline, and DDIM's estimate of the sample."""
    editor, request, draws = opened(model, crowd, ctx)
    scale, x = editor.vae.config.scaling_factor, crowd.x
    with torch.no_grad():
        found = editor.look(x, request, request.states, draws, ALL)
        posterior = editor.vae.encode(x).latent_dist
        z = posterior.mean + (posterior.std * draws.posterior if editor.kind == "text" else 0)
        noisy = editor.scheduler.add_noise(z * scale, draws.noise, draws.timesteps)
        mask = torch.zeros(3, 1, 8, 8)
        mask[:, :, :4, :4] = 1
        hidden = x.clone()
        hidden[:, :, :8, :8] = 0
        beside = {"text": [], "instruct": [posterior.mode()],
                  "inpaint": [mask, editor.vae.encode(hidden).latent_dist.mode() * scale]}[editor.kind]
        output = editor.unet(torch.cat([noisy, *beside], 1), draws.timesteps, request.states).sample
    assert torch.allclose(found.output, output, atol=1e-5)
    ddim = diffusers.DDIMScheduler.from_config(editor.scheduler.config, clip_sample=False)
    for place, t in enumerate(draws.timesteps):
        part = slice(place, place + 1)
        wanted = ddim_estimate(ddim, output[part], int(t), noisy[part])
        assert torch.allclose(found.clean[part], wanted, rtol=1e-4, atol=1e-4)


def ddim_estimate(ddim: Any, output: Tensor, t: int, noisy: Tensor) -> Tensor:
    ddim.set_timesteps(1)
    estimate: Tensor = ddim.step(output, t, noisy).pred_original_sample
    return estimate


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_velocity_give_back_the_latents_that_were_noised(prediction: str, tmp_path: Path) -> None:
    model = resolve(str(pipelines.save_stable_diffusion(tmp_path / "sd", prediction_type=prediction)))
    editor = open_editor(model, Context("key", tmp_path))
    z, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([1, 400, 999])
    noisy = editor.noised(z, noise, t)
    true = noise if prediction == "epsilon" else editor.scheduler.get_velocity(z, noise, t)
    assert torch.allclose(editor.clean(true, noisy, t), z, atol=1e-3)


def test_gradients_reach_pixels_and_prompts_and_no_weight(model: Model, crowd: Crowd, ctx: Context) -> None:
    editor, request, draws = opened(model, crowd, ctx)
    for module in (editor.unet, editor.vae, editor.text_encoder):
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    before = [p.clone() for p in editor.unet.parameters()]
    for function in (lambda x, e: editor.look(x, request, e, draws, ALL).clean,
                     lambda x, e: editor.attention(x, request, e, draws, ALL)):
        x, states = crowd.x.clone().requires_grad_(True), request.states.clone().requires_grad_(True)
        function(x, states).square().sum().backward()
        for each in (x, states):
            assert each.grad is not None and (each.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, editor.unet.parameters()))


def test_what_is_shown_beside_the_noise_carries_the_perturbation(model: Model, crowd: Crowd, ctx: Context) -> None:
    """Editors that see the photo draw along the original's latents; the others along the perturbed photo's."""
    editor, request, draws = opened(model, crowd, ctx)
    with torch.no_grad():
        one, other = (editor.read(x, request, draws, ALL) for x in (crowd.x, (crowd.x + 0.1).clamp(-1, 1)))
    if editor.kind == "text":
        assert one[1] is None and not torch.equal(one[0], other[0])
    else:
        assert one[1] is not None and other[1] is not None
        assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_hidden_pixels_do_not_reach_an_inpainting_network(tiny_inpaint: Path, crowd: Crowd, ctx: Context) -> None:
    editor, request, draws = opened(resolve(str(tiny_inpaint)), crowd, ctx)
    x = crowd.x.clone().requires_grad_(True)
    editor.look(x, request, request.states, draws, ALL).clean.square().sum().backward()
    assert x.grad is not None
    assert x.grad[:, :, :8, :8].abs().max() == 0
    assert x.grad[:, :, 8:].abs().max() > 0


def test_each_kind_is_asked_in_its_own_words(model: Model, ctx: Context) -> None:
    editor, edit = open_editor(model, ctx), told(subject("ada")).edits[0]
    asked, untold = editor.question(edit), editor.question(None)
    assert (asked, untold) == (("add glasses", "") if editor.kind == "instruct" else
                               ("a photo of a man, add glasses", "a photo"))


def test_a_defender_who_is_told_nothing_asks_neutrally(model: Model, ctx: Context) -> None:
    editor = open_editor(model, ctx)
    request = ask(editor, crowd_of([subject("ada"), told(subject("bob", photos=2), masked=True)], ctx))
    neutral = editor.states([editor.question(None)])
    assert torch.allclose(request.states[:3], neutral.expand(3, -1, -1), atol=1e-6)
    assert not torch.allclose(request.states[3], neutral[0], atol=1e-3)
    assert request.painted.sum((1, 2, 3)).tolist() == [0, 0, 0, 64, 64]


def test_edits_that_do_not_match_the_photos_are_refused(model: Model, ctx: Context) -> None:
    ada = told(subject("ada"))
    with pytest.raises(BenchError, match="ada: 2 edits are told for 3 photos"):
        ask(open_editor(model, ctx), crowd_of([replace(ada, edits=ada.edits[:2])], ctx))


def test_networks_that_read_something_else_are_refused(tiny_sd: Path, tmp_path: Path, ctx: Context) -> None:
    pipelines.conditional_unet(channels=5).save_pretrained(tmp_path / "unet")
    with pytest.raises(BenchError, match="reads 5 channels"):
        open_editor(replace(resolve(str(tiny_sd)), parts={"unet": tmp_path / "unet"}), ctx)


def test_the_noise_prediction_loss_shows_an_editor_the_photo(model: Model, crowd: Crowd, ctx: Context) -> None:
    """AdvDM's and Mist's loss by hand: z_t of the photo, and beside it what each pipeline shows, no mask."""
    editor, request, draws = opened(model, crowd, ctx)
    scale, states = editor.vae.config.scaling_factor, request.states[:1]
    with torch.no_grad():
        found = denoising_losses(editor.vae, editor.unet, editor.scheduler, states, draws)(crowd.x, ALL)
        posterior = editor.vae.encode(crowd.x).latent_dist
        z = posterior.mean + posterior.std * draws.posterior
        beside = {"text": [], "instruct": [z], "inpaint": [torch.zeros(3, 1, 8, 8), z * scale]}[editor.kind]
        noisy = editor.scheduler.add_noise(z * scale, draws.noise, draws.timesteps)
        output = editor.unet(torch.cat([noisy, *beside], 1), draws.timesteps, states.expand(3, -1, -1)).sample
    assert torch.allclose(found, (output - draws.noise).square().mean((1, 2, 3)), rtol=1e-4)


# -- Whole edits -------------------------------------------------------------------------------------------------------


def trailing(pipeline: Any) -> Any:
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    return pipeline


@pytest.mark.parametrize("steps", [1, 4])
def test_an_instructed_edit_is_the_pipelines(steps: int, tiny_ip2p: Path, crowd: Crowd, ctx: Context) -> None:
    editor, request, draws = opened(resolve(str(tiny_ip2p)), crowd, ctx)
    pipeline = trailing(load_pipeline(resolve(str(tiny_ip2p))))
    for prompted, prompt in ((True, "add glasses"), (False, "")):
        wanted = pipeline([prompt] * 3, image=(crowd.x + 1) / 2, num_inference_steps=steps, guidance_scale=3.0,
                          image_guidance_scale=1.7, latents=draws.noise, output_type="latent").images
        with torch.no_grad():
            found = edited_latents(editor, crowd.x, request, draws, ALL, Course(steps, 3.0, 1.7), prompted)
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_drawn_edit_is_the_pipelines(steps: int, tiny_sd: Path, crowd: Crowd, ctx: Context) -> None:
    """From the photo noised to the last timestep on, where the sampler of text-to-image begins."""
    editor, request, draws = opened(resolve(str(tiny_sd)), crowd, ctx)
    pipeline = trailing(load_pipeline(resolve(str(tiny_sd))))
    z, _ = editor.read(crowd.x, request, draws, ALL)
    start = editor.noised(z, draws.noise, torch.tensor([999] * 3))
    wanted = pipeline(["a photo of a man, add glasses"] * 3, num_inference_steps=steps, guidance_scale=3.0,
                      latents=start, output_type="latent").images
    with torch.no_grad():
        found = edited_latents(editor, crowd.x, request, draws, ALL, Course(steps, 3.0, strength=1.0))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_an_edit_begins_where_its_strength_says(tiny_sd: Path, tiny_ip2p: Path, ctx: Context) -> None:
    drawing, ordered = (open_editor(resolve(str(folder)), ctx) for folder in (tiny_sd, tiny_ip2p))
    assert course_times(drawing, Course(4, strength=0.6)).tolist() == [599, 449, 299, 149]
    assert course_times(ordered, Course(4, strength=0.6)).tolist() == [999, 749, 499, 249]


def test_a_whole_edit_carries_gradients_to_the_pixels(model: Model, crowd: Crowd, ctx: Context) -> None:
    editor, request, draws = opened(model, crowd, ctx)
    x = crowd.x.clone().requires_grad_(True)
    decoded(editor.vae, edited_latents(editor, x, request, draws, ALL, Course(2))).square().sum().backward()
    assert x.grad is not None and (x.grad.flatten(1).abs().amax(1) > 0).all()


def test_recomputing_passes_changes_no_gradient(
    model: Model, crowd: Crowd, ctx: Context, monkeypatch: pytest.MonkeyPatch,
) -> None:
    editor, request, draws = opened(model, crowd, ctx)
    found = []
    for width in (1, 10_000):
        monkeypatch.setattr("bench.diffusion.editors.RECOMPUTED", width)
        x = crowd.x.clone().requires_grad_(True)
        edited_latents(editor, x, request, draws, ALL, Course(2)).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6 * found[0].abs().max().item())


# -- Words and attention -----------------------------------------------------------------------------------------------


def test_places_of_words() -> None:
    """The tiny tokenizer has one token per letter; the start token is number 0."""
    tokens = pipelines.tokenizer(12)
    def where(prompt: str, words: str = "") -> list[int]:
        return word_places(tokens, prompt, words).nonzero()[:, 0].tolist()

    assert where("ab cd") == [1, 2, 3, 4]
    assert where("ab cd", "cd") == [3, 4]
    assert where("") == list(range(1, 12))
    assert where("abcdefghijklmnop") == list(range(1, 11))
    assert where("abcdefghijklmnop", "p") == [10]


def test_attention_to_words_adds_layers_of_different_size() -> None:
    generator = torch.Generator().manual_seed(0)
    fine, coarse = (torch.rand(2, n, 5, generator=generator) for n in (64, 16))
    words = torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 1, 0]])
    alone = word_attention({"fine": fine}, words, 8)
    assert torch.allclose(alone[0].flatten(), fine[0, :, 1:3].sum(1))
    assert torch.allclose(alone[1].flatten(), fine[1, :, 3])
    both = word_attention({"fine": fine, "coarse": torch.ones_like(coarse) / 5}, words, 8)
    assert torch.allclose(both - alone, torch.tensor([0.4, 0.2])[:, None, None].expand(2, 8, 8), atol=1e-6)


def test_what_is_left_of_attention_counts_attended_places_only() -> None:
    known = torch.tensor([[[4.0, 0], [0, 0]]])
    places = attended_places(known)
    assert places.tolist() == [[[1, 0], [0, 0]]]
    assert attention_left(torch.tensor([[[-2.0, 5], [5, 5]]]), places).tolist() == [0.5]


def test_values_and_gradients_do_not_depend_on_the_batch() -> None:
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(1.0, 6)

    def losses(point: Tensor, part: slice) -> Tensor:
        return weights[part] * point.square().flatten(1).sum(1)

    for batch in (1, 2, 8):
        values, gradients = value_and_gradient(x, losses, batch)
        assert torch.allclose(values, weights * x.square().sum((1, 2, 3)))
        assert torch.allclose(gradients, 2 * weights[:, None, None, None] * x)
    assert not x.requires_grad
