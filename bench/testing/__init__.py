"""What authors of plugins test with: tiny pipelines in the published format, and conformance checks."""
