"""Which layers stay in float, and how many bits each layer has."""
