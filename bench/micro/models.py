"""Where the embedded weights lie, and the list of their hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
SUMS = "SHA256SUMS"


def weights_folder(name: str) -> Path:
    """The folder of an embedded model, e.g. `micro-sd-a`; it need not exist yet (training writes it)."""
    return WEIGHTS / name


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _weight_files(root: Path) -> list[Path]:
    return sorted(
        f
        for f in root.rglob("*")
        if f.is_file() and f.name != SUMS and ".new" not in str(f) and ".old" not in str(f)
    )


def sha256_sums(root: Path = WEIGHTS) -> dict[str, str]:
    """Path below `root` to sha256 of every weight and config file there."""
    return {f.relative_to(root).as_posix(): _hash(f) for f in _weight_files(root)}


def write_sums(root: Path = WEIGHTS) -> Path:
    """Write `SHA256SUMS` in the format of the `sha256sum` tool."""
    lines = [f"{digest}  {name}" for name, digest in sha256_sums(root).items()]
    (root / SUMS).write_text("\n".join(lines) + "\n")
    return root / SUMS


def verify_sums(root: Path = WEIGHTS) -> list[str]:
    """What differs from `SHA256SUMS`: one line for each changed, missing or unlisted file; empty when all is well."""
    lines = [line.split("  ", 1) for line in (root / SUMS).read_text().splitlines()]
    listed = {name: digest for digest, name in lines}
    found = sha256_sums(root)
    problems = [f"missing: {name}" for name in listed.keys() - found.keys()]
    problems += [f"not listed: {name}" for name in found.keys() - listed.keys()]
    problems += [f"changed: {name}" for name in listed.keys() & found.keys() if listed[name] != found[name]]
    return sorted(problems)
