"""Trust, proved: kills, damaged files, threads, processes, determinism and long runs, counted. `make reliability`."""
