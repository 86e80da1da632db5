"""`python -m lofit_fast.cli`, the same as `lofit-fast`."""

from lofit_fast.cli.app import main

main()
