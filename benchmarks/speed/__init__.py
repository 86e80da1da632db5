"""How fast and how large, next to the peers."""
