"""`python -m bench.micro.train all` retrains the tier from nothing; naming a model trains that one. Resumable."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable

# Each model needs those above it.
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "micro-face-1": ("faces", ("1",)),
    "micro-face-2": ("faces", ("2",)),
    "micro-face-3": ("faces", ("3",)),
    "micro-ddpm": ("ddpm", ()),
    "micro-clip": ("clip", ()),
    "autoencoder-a": ("autoencoder", ("a",)),
    "autoencoder-b": ("autoencoder", ("b",)),
    "decoder-a": ("autoencoder.sharpen", ("a",)),
    "decoder-b": ("autoencoder.sharpen", ("b",)),
    "micro-sd-a": ("text_to_image", ("a",)),
    "micro-sd-b": ("text_to_image", ("b",)),
    "micro-ip2p": ("instruct", ()),
}


def _train(name: str) -> None:
    where, arguments = JOBS[name]
    module, _, function = where.partition(".")
    train: Callable[..., None] = getattr(
        importlib.import_module(f"bench.micro.train.{module}"), function or "train"
    )
    train(*arguments)


def main() -> None:
    """Train the named models, or all of them in an order in which each finds what it needs."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro.train", description=__doc__)
    parser.add_argument("model", nargs="+", choices=["all", *JOBS])
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; two processes at once need one each"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import torch

    torch.set_num_threads(options.threads)
    for name in JOBS if "all" in options.model else options.model:
        _train(name)


if __name__ == "__main__":
    main()
