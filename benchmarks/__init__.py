"""Benchmarks of lofit-fast: what the kernels compile to, what they move, how long things take next to their peers."""
