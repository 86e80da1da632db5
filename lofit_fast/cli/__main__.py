"""`python -m lofit_fast.cli`, the same as `lofit-fast`: what torchrun starts."""

from lofit_fast.cli import main

main()
