"""Everything that exists for CPUs alone."""
