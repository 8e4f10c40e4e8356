"""``bench`` with the fakes in it, for tests that kill it: ``python -m tests.fake_bench <words>``."""

from __future__ import annotations

import sys

from bench import cli, config, discovery
from bench.plugin import REGISTRY
from tests import fakes


def main() -> int:
    """Run one command line."""
    discovery.load()
    for cls in (v for v in vars(fakes).values() if hasattr(v, "__plugin__")):
        REGISTRY.add(cls.__plugin__, cls)
    config._resolve = fakes.resolve
    return cli.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
