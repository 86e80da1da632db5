"""Putting LoFiT into a model and taking it out again, saving it, merging it."""
