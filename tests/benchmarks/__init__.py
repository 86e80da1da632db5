"""Tests of the benchmarks' own machinery: statistics, counts, machine code."""
