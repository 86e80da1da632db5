"""The Triton path: one file per kernel family, the launcher beside its kernel. Importing it loads no Triton."""
