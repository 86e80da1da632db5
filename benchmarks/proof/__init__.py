"""What is exact without a GPU: machine code, counts, the dead zone."""
