"""Base models: loading them, the device and dtype they run in, and what the op would cost on them."""
