"""What is asked of photos: drawn people with the world's answer, and a folder with a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data.edit_folder import EditFolder
from bench.data.micro_edits import FIELDS, UNREAD, MicroEdits, useful
from bench.data.micro_subjects import MicroSubjects
from bench.data.portraits import posed
from bench.errors import BenchError
from bench.micro import world
from bench.records import EditTask

FACTS = {"glasses", "background", "hair_colour", "beard", "shirt", "hair_style", "expression"}


@pytest.fixture(scope="module")
def tasks() -> list[EditTask]:
    return MicroEdits(count=36, photos=1).edits()


def person(task: EditTask) -> int:
    return int(task.subject.name.removeprefix("p"))


# Drawn people


def test_an_answer_differs_from_its_photo_only_by_the_edit(tasks: list[EditTask]) -> None:
    for task in tasks:
        who, view = posed(person(task), (1, 0))
        edit = world.EDITS[task.edit.instruction]
        before, after = (world.attributes(*state)
                         for state in ((who, view), world.apply_edit(who, view, task.edit.instruction)))
        changed = {name for name in FACTS if before[name] != after[name]}
        assert edit.field in changed and changed <= {edit.field, "hair_colour"}
        assert after[edit.field] == edit.value
        drawn = world.draw(*world.apply_edit(who, view, task.edit.instruction))
        assert np.array_equal(task.edit.answer.permute(1, 2, 0).numpy(), drawn)


def test_the_mask_holds_every_change_with_a_margin_and_leaves_something(tasks: list[EditTask]) -> None:
    for task in tasks:
        [photo], answer, mask = task.subject.published.pixels, task.edit.answer, task.edit.mask
        assert answer.dtype == torch.uint8 and mask.dtype == torch.bool and mask.shape == (64, 64)
        differs = (photo != answer).any(0)
        assert differs.any(), task.edit.instruction
        rows, columns = differs.nonzero().T
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            assert mask[max(0, row - 4):row + 5, max(0, column - 4):column + 5].all()
        assert mask.sum() > differs.sum() and not mask.all()


def test_captions_say_what_is_and_what_could_be(tasks: list[EditTask]) -> None:
    sizes = {"glasses": 3, "background": 12, "hair_colour": 6, "beard": 4, "shirt": 8, "hair_style": 6}
    for task in tasks:
        edit, field = world.EDITS[task.edit.instruction], world.EDITS[task.edit.instruction].field
        assert task.edit.source == task.subject.published.captions[0]
        assert task.edit.source in task.edit.others and task.edit.target not in task.edit.others
        assert len({task.edit.target, *task.edit.others}) == sizes[field]
        if edit.value == "no":
            assert "glasses" in task.edit.source and "glasses" not in task.edit.target
        else:
            assert edit.value in task.edit.target


def test_every_attribute_has_its_turn(tasks: list[EditTask]) -> None:
    asked = [world.EDITS[task.edit.instruction].field for task in tasks]
    assert not {task.edit.instruction for task in tasks} & set(UNREAD)
    assert set(asked) == set(FIELDS)
    expected = [FIELDS[(1000 + place) % 6] for place in range(len(tasks))]
    for task, field, wanted in zip(tasks, asked, expected, strict=True):
        if field != wanted:
            assert not useful(*posed(person(task), (1, 0)), wanted), f"{wanted} could have been asked"
    assert len({task.edit.instruction for task in tasks}) > 12


def test_nobody_was_trained_on_or_stands_in_another_tracks_data(tasks: list[EditTask]) -> None:
    people = {person(task) for task in tasks}
    assert len(people) == 36 and people <= set(world.SPLITS["subjects"])
    assert not people & {int(s.name.removeprefix("p")) for s in MicroSubjects(count=64, photos_per_set=1).subjects()}
    trained = [split for split in world.SPLITS if split not in ("subjects", "card", "fid_reference")]
    assert not any(one in world.SPLITS[split] for split in trained for one in people)


def test_a_task_depends_on_its_person_alone_and_shows_the_known_photo() -> None:
    [_, among] = MicroEdits(count=2, start=7, photos=2).edits()
    [alone] = MicroEdits(count=1, start=8, photos=2).edits()
    assert among.edit.instruction == alone.edit.instruction
    assert torch.equal(among.edit.answer, alone.edit.answer)
    [known] = MicroSubjects(count=1, start=8, photos_per_set=2).subjects()
    assert torch.equal(alone.subject.published.pixels, known.published.pixels[:1])
    assert torch.equal(alone.subject.clean.pixels, known.clean.pixels)
    assert torch.equal(alone.subject.held_out.pixels, known.held_out.pixels)
    assert alone.subject.edits == (), "whether a defender knows is not the data's to say"


def test_digests_of_drawn_tasks_follow_their_options() -> None:
    digests = {MicroEdits().digest(), MicroEdits(start=0).digest(), MicroEdits(size=32).digest(),
               MicroEdits(photos=2).digest(), MicroSubjects(count=16, start=1000).digest()}
    assert len(digests) == 5 and MicroEdits().digest() in digests


@pytest.mark.parametrize(("options", "said"), [
    ({"start": 1990}, "the split has 2000"), ({"start": -1}, "the split has 2000"),
    ({"count": 0}, "count=0 is too few"), ({"photos": 0}, "photos=0 is too few"),
])
def test_people_who_are_not_there_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        MicroEdits(**options).digest()


# A folder with a table


def save(file: Path, width: int = 20, height: int = 20, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def entry(file: str, **more: Any) -> dict[str, Any]:
    return {"file": file, "instruction": "add a hat", "source": "a man", "target": "a man, in a hat", **more}


def folder(tmp_path: Path, *entries: dict[str, Any] | str) -> Path:
    """Photos a.png, b.png and in/c.png, a mask m.png whose right half is white, and a table."""
    for seed, name in enumerate(("a.png", "b.png", "in/c.png")):
        save(tmp_path / name, seed=seed)
    half = np.zeros((20, 20, 3), np.uint8)
    half[:, 10:] = 255
    Image.fromarray(half).save(tmp_path / "m.png")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in entries]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def read(root: Path, **options: Any) -> list[EditTask]:
    return EditFolder(str(root), size=options.pop("size", 20), **options).edits()


def test_a_table_says_what_is_asked_of_each_photo(tmp_path: Path) -> None:
    root = folder(tmp_path, entry("in/c.png", others=["a man with a cap", "a man"], mask="m.png"), "", entry("a.png"))
    [masked, plain] = read(root)
    assert (masked.subject.name, plain.subject.name) == ("in/c", "a")
    assert masked.edit.others == ("a man", "a man with a cap") and plain.edit.others == ("a man",)
    assert (plain.edit.instruction, plain.edit.target) == ("add a hat", "a man, in a hat")
    original = np.asarray(Image.open(root / "in/c.png")).transpose(2, 0, 1)
    assert np.array_equal(masked.subject.published.pixels[0].numpy(), original)
    assert torch.equal(masked.edit.mask, torch.arange(20).expand(20, 20) >= 10)
    assert plain.edit.mask is None and plain.edit.answer is None
    assert len(plain.subject.clean) == len(plain.subject.held_out) == 0
    assert [task.subject.name for task in read(root, count=1)] == ["in/c"]


def test_a_csv_table_says_the_same(tmp_path: Path) -> None:
    root = folder(tmp_path, entry("a.png", others=["a boy", "a girl"], mask="m.png"), entry("b.png"))
    [first, second] = read(root)
    before = EditFolder(str(root), size=20).digest()
    (root / "edits.jsonl").unlink()
    (root / "edits.csv").write_text(
        "\ufefffile,instruction,source,target,others,mask\n"
        'a.png,add a hat,a man,"a man, in a hat",a boy|a girl,m.png\n'
        'b.png,add a hat,a man,"a man, in a hat",,\n', encoding="utf-8")
    [same, too] = read(root)
    assert (same.edit.others, same.edit.target) == (first.edit.others, first.edit.target)
    assert torch.equal(same.edit.mask, first.edit.mask)
    assert (too.edit.others, too.edit.mask) == (second.edit.others, None)
    assert EditFolder(str(root), size=20).digest() == before


def test_a_mask_is_cropped_as_its_photo(tmp_path: Path) -> None:
    root = folder(tmp_path, entry("wide.png", mask="band.png"))
    save(root / "wide.png", width=40)
    band = np.zeros((20, 40, 3), np.uint8)
    band[:, 12:15] = 255
    Image.fromarray(band).save(root / "band.png")
    [task] = read(root)
    assert task.edit.mask.any(0).nonzero().flatten().tolist() == [2, 3, 4]
    assert read(root, size=10)[0].edit.mask.shape == (10, 10)


def test_the_digest_follows_pictures_words_and_masks(tmp_path: Path) -> None:
    tables = [[entry("a.png")], [entry("b.png")], [entry("a.png", instruction="remove the hat")],
              [entry("a.png", others=["a boy"])], [entry("a.png", mask="m.png")]]
    digests = [EditFolder(str(folder(tmp_path / str(n), *table)), size=20).digest() for n, table in enumerate(tables)]
    moved = EditFolder(str(folder(tmp_path / "elsewhere", entry("a.png"))), size=20).digest()
    assert len(set(digests)) == len(digests) and moved == digests[0]


@pytest.mark.parametrize(("line", "said"), [
    ('{"file": ', r"edits.jsonl, line 2: not valid JSON"),
    ('["a.png"]', r"line 2: not an object"),
    ({"file": "b.png", "instruction": "x", "source": "y"}, r"line 2: no target; every line needs file, instruction"),
    (entry("b.png", source=" "), r"line 2: source=' '; give a text"),
    (entry("b.png", source=3), r"line 2: source=3; give a text"),
    (entry("b.png", tagret="x"), r"line 2: unknown column 'tagret'\. Did you mean target"),
    (entry("b.png", others="a boy"), r"line 2: others='a boy'; give a list"),
    (entry("b.png", others=["a man, in a hat"]), r"line 2: target 'a man, in a hat' is among source and others"),
    (entry("nowhere.png"), r"line 2: no such file"),
    (entry("../a.png"), r"line 2: .*leads out of this folder"),
    (entry("/etc/hostname"), r"line 2: .*leads out of this folder"),
    (entry("b.png", mask="../m.png"), r"line 2: .*leads out of this folder"),
    (entry("in/../a.png"), r"line 2: 'a' is edited in .*line 1 already"),
    (entry("edits.jsonl"), r"line 2: .*edits\.jsonl: not a readable image"),
    (entry("small.png"), r"line 2: .*small\.png: 10x10 pixels is smaller than size=20"),
    (entry("b.png", mask="small.png"), r"line 2: .*small\.png: 10x10 pixels, but the photo has 20x20"),
    (entry("b.png", mask="dark.png"), r"line 2: .*dark\.png: nothing is bright"),
])
def test_a_bad_line_is_one_error_that_names_it(tmp_path: Path, line: dict[str, Any] | str, said: str) -> None:
    root = folder(tmp_path / "root", entry("a.png"), line)
    save(tmp_path / "a.png"), save(root / "small.png", 10, 10)
    Image.new("RGB", (20, 20)).save(root / "dark.png")
    with pytest.raises(BenchError, match=said):
        EditFolder(str(root), size=20).digest()


@pytest.mark.parametrize(("row", "said"), [
    ("b.png,x,y", "line 3: not as many fields"), ("b.png,x,y,z,,,more", "line 3: not as many fields"),
    ('b.png,"x"y,y,z', "line 3: not valid CSV"),
])
def test_a_bad_row_is_one_error_that_names_it(tmp_path: Path, row: str, said: str) -> None:
    root = folder(tmp_path)
    (root / "edits.jsonl").unlink()
    (root / "edits.csv").write_text(f"file,instruction,source,target\na.png,x,y,z\n{row}\n")
    with pytest.raises(BenchError, match=said):
        read(root)


def test_one_table_that_holds_something_is_needed(tmp_path: Path) -> None:
    root = folder(tmp_path, entry("a.png"))
    with pytest.raises(BenchError, match="count=2, but .* has 1 edits"):
        read(root, count=2)
    (root / "edits.csv").write_text("file\n")
    with pytest.raises(BenchError, match="both are there"):
        read(root)
    (root / "edits.jsonl").unlink(), (root / "edits.csv").unlink()
    with pytest.raises(BenchError, match="neither is there"):
        read(root)
    (root / "edits.jsonl").write_text("\n")
    with pytest.raises(BenchError, match="no edit in it"):
        read(root)
    (root / "edits.jsonl").write_bytes(b'{"file": "\xff"}')
    with pytest.raises(BenchError, match="not UTF-8 text"):
        read(root)
    with pytest.raises(BenchError, match="data.root is not set"):
        EditFolder().digest()
