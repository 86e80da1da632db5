"""Tests of the peer methods."""
