"""Planted faults: mutants of the kernels, a memory checker over the interpreter, and the cases that must catch them."""
