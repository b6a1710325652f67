"""Allocations: how a target is divided among the groups."""
