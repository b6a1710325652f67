"""Benchmarks: each module measures one claim and writes its table to ``docs/benchmarks/``."""
