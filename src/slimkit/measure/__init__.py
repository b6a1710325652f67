"""Measuring: parameters, MACs, BOPs and bytes counted; latency timed."""

from slimkit.measure.profiling import LayerCost, Profile, profile

__all__ = ["LayerCost", "Profile", "profile"]
