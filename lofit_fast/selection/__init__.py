"""Ways to choose heads."""
