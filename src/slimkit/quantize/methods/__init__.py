"""Methods that win back what rounding costs, without training."""
