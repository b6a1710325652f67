"""Quantizers: modules that hold scales and round one tensor."""
