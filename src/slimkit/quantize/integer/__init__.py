"""What an integer kernel computes, bit by bit, in floating point."""
