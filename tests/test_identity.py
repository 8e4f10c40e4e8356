"""Names made of content."""

import math
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.identity import added, canonical_json, digest, file_digest, folder_digest


class Colour(Enum):
    RED = "red"


@dataclass
class Options:
    eps: float = 16.0
    where: Path = Path("a/b")
    colours: tuple[Colour, ...] = (Colour.RED,)


def test_one_text_per_value() -> None:
    assert canonical_json({"b": 1, "a": [1.0, 0.1, True, None, "é"]}) == '{"a":[1.0,0.1,true,null,"\\u00e9"],"b":1}'
    assert canonical_json(Options()) == '{"colours":["red"],"eps":16.0,"where":"a/b"}'
    assert canonical_json({"x", "a"}) == '["a","x"]'
    assert canonical_json((1, 2)) == canonical_json([1, 2])


def test_order_of_keys_changes_nothing_and_values_do() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2}) != digest({"a": "2"})
    assert digest({"a": 1.0}) != digest({"a": 1})


def test_digest_is_the_standard_one() -> None:
    empty_mapping = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256sum of '{}'
    assert digest({}) == empty_mapping[:16]
    assert digest({}, length=64) == empty_mapping


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_with_their_place(bad: float) -> None:
    with pytest.raises(BenchError, match=r"value\.a\[1\]=.*not a finite"):
        canonical_json({"a": [1.0, bad]})


@pytest.mark.parametrize("bad", [{1: "a"}, {"a": object()}, {"a": b"bytes"}, {Colour.RED: 1}])
def test_other_types_are_refused(bad: object) -> None:
    with pytest.raises(BenchError, match="identity"):
        canonical_json(bad)


def test_same_in_another_process_with_another_hash_seed() -> None:
    code = "from bench.identity import digest; print(digest({'b': {'x', 'y', 'z'}, 'a': 0.1}))"
    texts = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("0", "1")
    }
    assert texts == {digest({"a": 0.1, "b": {"z", "y", "x"}}) + "\n"}


def test_file_and_folder_digests(tmp_path: Path) -> None:
    (tmp_path / "one" / "in").mkdir(parents=True)
    (tmp_path / "one" / "in" / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "one" / "in" / "f").startswith("ba7816bf8f01cfea")  # FIPS 180-2 test vector
    before = folder_digest(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert folder_digest(tmp_path / "two") == before
    (tmp_path / "two" / "in" / "f").rename(tmp_path / "two" / "g")
    assert folder_digest(tmp_path / "two") != before


@dataclass
class Grown:
    eps: float = 16.0
    later: float = added(0.0)


def test_a_field_that_was_added_later_is_left_out_while_it_means_as_before() -> None:
    assert canonical_json(Grown()) == '{"eps":16.0}'
    assert canonical_json(Grown(later=0.5)) == '{"eps":16.0,"later":0.5}'
