"""What authors of plugins test with.

``conformance``: the checks that every plugin of a benchmark must pass, as one pytest test.
``bench.testing.pipelines``: tiny pipelines in the published format, for tests of one's own.
"""

from bench.testing.kit import conformance

__all__ = ["conformance"]
