"""Peers: the methods and implementations that lofit-fast is measured against. `table.PEERS` lists them."""
