"""Fuzzing from outside: damaged files, bad arguments and odd recipes, each from a seed."""
