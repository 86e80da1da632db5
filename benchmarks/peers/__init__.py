"""Peers: the methods and implementations that lofit-fast is measured against, one file each."""
