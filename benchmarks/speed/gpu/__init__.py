"""The GPU script: correctness first, then the clock, on any CUDA machine as found. `python -m benchmarks.speed.gpu`."""
