"""The peers as rows of a table; one file per peer."""

from benchmarks.providers.provider import AS_RUN, SAME_ENGINE, Absent, Attached, Provider
from benchmarks.providers.table import PROVIDERS

__all__ = ["AS_RUN", "PROVIDERS", "SAME_ENGINE", "Absent", "Attached", "Provider"]
