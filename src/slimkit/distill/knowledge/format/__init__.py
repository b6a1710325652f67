"""What knowledge looks like in memory, in files and on the wire."""
