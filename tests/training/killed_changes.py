"""A kill in the midst of a run's files, in this process."""

import os


class Killed(BaseException):
    """As a kill: nothing that is done to a file after it has an effect."""


CHANGES = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir")


def killed_at(patched, number):
    """Let the process die before its change of a file of this number. Returns how many there have been."""
    seen = []

    def dying(change):
        def at(*args, **options):
            seen.append(change.__name__)
            if len(seen) >= number:
                raise Killed
            return change(*args, **options)

        return at

    for name in CHANGES:
        patched.setattr(os, name, dying(getattr(os, name)))
    return seen
