"""Tests of lofit_fast.training."""
