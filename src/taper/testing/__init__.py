"""Random models and tiny fixtures, shared by tests and benchmarks."""
