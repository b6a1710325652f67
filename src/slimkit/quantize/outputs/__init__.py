"""What rounding does to outputs: distances, noise, a check."""
