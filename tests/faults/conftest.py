"""The command line as a process, as in ``tests/search``."""

from tests.search.conftest import lacer, start

__all__ = ["lacer", "start"]
