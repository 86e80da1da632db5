"""Training steps and whole runs, by everyone."""
