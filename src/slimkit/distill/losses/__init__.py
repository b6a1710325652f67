"""Distillation losses as settings in a recipe, and the connectors between features.

Read ``interface`` first; the formulas are in :mod:`slimkit.losses`.
"""
