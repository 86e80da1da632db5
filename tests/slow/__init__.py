"""Proofs that take minutes: `make real`."""
