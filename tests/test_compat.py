"""Why a cell cannot run, in words."""

from __future__ import annotations

import pytest

from bench.compat import check
from tests.conftest import Compose
from tests.test_config import cell_of

BACKDOOR = ("attack=fake_implant", "model=plain", "data=fake_pictures")
EDITING = ("attack=sdedit", "model=text", "data=micro_edits")


@pytest.mark.parametrize("words", [
    (), ("defense=fake_shield",), ("defense=fake_optimiser", "surrogate=other"),
    ("purifier=fake_wash",), BACKDOOR, (*BACKDOOR, "defense=fake_cleaner"), EDITING, (*EDITING, "defense=noise"),
    (*EDITING, "attack=instruct_pix2pix", "model=editor", "purifier=jpeg"),
])
def test_pairs_that_can_run(compose: Compose, words: tuple[str, ...]) -> None:
    assert check(cell_of(compose, *words)) is None


@pytest.mark.parametrize(("words", "reason"), [
    (("defense=fake_optimiser", "surrogate=plain"), "fake_optimiser needs a model with one text encoder "
                                                    "(text_encoder); plain offers unconditional"),
    ((*BACKDOOR, "surrogate=other"), "surrogate=other is a model to protect photos on; the backdoor track protects "
                                     "none"),
    (("defense=fake_cleaner",), "fake_cleaner repairs models; the customization track defends images"),
    ((*BACKDOOR, "defense=fake_shield"), "fake_shield protects images; the backdoor track defends models"),
    ((*BACKDOOR, "purifier=fake_wash"), "fake_wash works on the customization track, not on backdoor"),
    (("model=plain",), "the customization track needs a text-to-image model (text_to_image); "
                       "plain offers unconditional"),
    ((*BACKDOOR, "model=text"), "fake_implant needs an unconditional model (unconditional); "
                                "text offers text_encoder, text_to_image"),
    (("data=fake_pictures",), "the customization track needs data with photos of subjects; fake_pictures has none"),
    ((*BACKDOOR, "data=fake_people"), "the backdoor track needs data with plain images; fake_people has none"),
    ((*EDITING, "data=fake_people"), "the editing track needs data with photos and edits; fake_people has none"),
    ((*EDITING, "attack=instruct_pix2pix"), "instruct_pix2pix needs an editing model (edit); text offers text_encoder, "
                                            "text_to_image"),
    ((*EDITING, "attack=inpaint", "model=editor"), "inpaint needs a model that paints into a region (inpaint); editor "
                                                   "offers edit, text_encoder"),
    ((*EDITING, "model=editor"), "sdedit needs a text-to-image model (text_to_image); editor offers edit, "
                                 "text_encoder"),
    ((*EDITING, "defense=fake_shield"), "fake_shield works on the customization track, not on editing"),
    ((*EDITING, "defense=fake_cleaner"), "fake_cleaner repairs models; the editing track defends images"),
    (("data=micro_edits",), "micro_edits works on the editing track, not on customization"),
])
def test_pairs_that_cannot_run_say_why(compose: Compose, words: tuple[str, ...], reason: str) -> None:
    assert check(cell_of(compose, *words)) == reason
