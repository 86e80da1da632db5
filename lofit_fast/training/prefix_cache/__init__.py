"""Activations below the lowest tuned layer, computed once and kept."""
