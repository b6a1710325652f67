"""The typed recipe: every key that a YAML file may have."""
