"""The GPU script: correctness first, then the clock, on any CUDA machine as found. Run as `python -m benchmarks.gpu`."""
