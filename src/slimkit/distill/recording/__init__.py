"""Which tensors of a forward are compared, and how they are recorded."""
