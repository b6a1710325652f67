"""Teachers that answer over the network, and the student's end of it."""
