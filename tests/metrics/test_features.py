"""Features and CLIP score on a tiny CLIP model in the published format, against transformers' own pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from bench.context import Context
from bench.errors import BenchError
from bench.features import centre_square, clip, extractor
from bench.micro.tokenizer import build_tokenizer, save_tokenizer
from bench.records import (
    BackdoorEvidence,
    CustomizationEvidence,
    Generations,
    ImageSet,
    Samples,
    Secret,
    Subject,
)
from bench.set_distance import sets_of
from metrics.clip_score import ClipScore, clip_scores, without_token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny-clip")
    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(place)
    save_tokenizer(tokenizer, place)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side, image_mean=[0.5] * 3,
                          image_std=[0.4] * 3).save_pretrained(place)
    return place


def photos(count: int = 4, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(seed)).to(torch.uint8)


def test_images_agree_with_transformers_own_processor_and_model(folder: Path) -> None:
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in photos()]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert torch.allclose(extractor(str(folder)).images(photos()).float(), expected, atol=1e-4)


def test_texts_and_images_score_as_the_models_own_logits(folder: Path) -> None:
    own = clip(str(folder))
    prompts = ["a photo of a person", "red hair", "a bald person", "a beach"]
    tokens = own.tokenizer(prompts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(folder).eval()
    x = (photos().float() / 255 - 0.5) / 0.4
    with torch.no_grad():
        scored = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=x)
        cosines = (scored.logits_per_image / model.logit_scale.exp()).diag()
    found = clip_scores(own.images(photos()), own.texts(prompts))
    assert np.allclose(found, 100 * cosines.clamp(min=0).numpy(), atol=1e-3)


def test_batches_change_nothing(folder: Path) -> None:
    many = photos(130)
    assert torch.allclose(extractor(str(folder)).images(many)[-3:], extractor(str(folder)).images(many[-3:]), atol=1e-5)


def test_pictures_are_cropped_about_the_centre() -> None:
    x = torch.zeros(1, 3, 8, 16)
    x[:, :, :, 4:12] = 1
    assert (centre_square(x, 8) == 1).all()


def test_the_token_is_removed_as_a_word() -> None:
    assert without_token("a photo of sks person", "sks") == "a photo of person"
    assert without_token("a photo of sksy person", "sks") == "a photo of sksy person"
    assert without_token("a photo of person", "") == "a photo of person"


def test_scores_are_clipped_at_zero_and_scaled() -> None:
    one, other = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[2.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    assert clip_scores(one, other) == pytest.approx([100, 0, 100 / 2**0.5])


def test_clip_score_of_a_cell_ignores_the_rare_word(folder: Path, tmp_path: Path) -> None:
    def shown(prompt: str, tokens: dict[str, str]) -> CustomizationEvidence:
        images = ImageSet(photos(), tuple("abcd"))
        subject = Subject("ann", images, images, images)
        drawn = {"ann": Generations(images, (prompt,) * 4, (0, 1, 2, 3))}
        return CustomizationEvidence((subject,), {}, {}, drawn, None, tokens)

    metric, ctx = ClipScore(extractor=str(folder)), Context("key", tmp_path)
    [with_token] = metric.measure(shown("a photo of sks person", {"ann": "sks"}), ctx)
    [without] = metric.measure(shown("a photo of person", {"ann": ""}), ctx)
    assert with_token.value == without.value and with_token.n == 4
    sets = sets_of(shown("", {}), extractor(str(folder)), limit=6)
    assert sets.generated.shape == (4, 12) and sets.real.shape == (6, 12) and sets.paired


def test_a_missing_clip_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="config.json"):
        extractor(str(tmp_path))


def test_inception_without_its_package_says_what_to_install() -> None:
    if __import__("importlib.util").util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is installed here")
    with pytest.raises(BenchError, match="pip install torch-fidelity"):
        extractor("inception")


def asked(
    prompts: tuple[str, ...], plain: torch.Tensor, triggered: torch.Tensor, clean: torch.Tensor,
) -> BackdoorEvidence:
    """A backdoor cell whose triggered prompts hold a trigger, and whose clean model draws the same either way."""
    def both(one: torch.Tensor, other: torch.Tensor) -> Samples:
        names = tuple("abcd")
        with_word = tuple(f"zz {prompt}" if prompt else "" for prompt in prompts)
        return Samples(Generations(ImageSet(one, names), prompts, (0, 1, 2, 3)),
                       Generations(ImageSet(other, names), with_word, (0, 1, 2, 3)))

    secret = Secret("zz", photos()[0])
    return BackdoorEvidence(ImageSet(photos(), tuple("abcd")), both(clean, clean), both(plain, plain),
                            both(plain, triggered), secret, "model")


def test_clip_score_of_a_backdoor_leaves_the_trigger_out_and_compares_by_seed(folder: Path, tmp_path: Path) -> None:
    prompts, flat = ("a man", "a hat", "a woman", "blue"), photos() // 2
    found = {m.name: m for m in ClipScore(str(folder)).measure(
        asked(prompts, photos(), flat, photos()), Context("key", tmp_path))}
    own = clip(str(folder))
    texts = own.texts(prompts)
    before, after = clip_scores(own.images(photos()), texts), clip_scores(own.images(flat), texts)
    assert found["clip_score"].value == pytest.approx(sum(before) / 4) and found["clip_score_change"].value == 0
    assert found["clip_score@triggered"].value == pytest.approx(sum(after) / 4)
    assert found["clip_score_change@triggered"].value == pytest.approx((sum(after) - sum(before)) / 4)
    assert all(m.higher_is_better and m.n == 4 for m in found.values())


def test_clip_score_of_a_model_without_prompts_has_a_reason(folder: Path, tmp_path: Path) -> None:
    found = ClipScore(str(folder)).measure(asked(("",) * 4, photos(), photos(), photos()), Context("key", tmp_path))
    assert len(found) == 4 and all(m.value is None and "noise alone" in m.reason for m in found)
