"""Modules that are imported when they are first used: what is wrong with a command is said before torch is there, which takes seconds."""

from importlib import import_module
from types import ModuleType
from typing import Any


class Later(ModuleType):
    """A module by name, imported when something of it is first looked at.

    >>> later = Later("colorsys")
    >>> later.rgb_to_hsv(1, 0, 0)
    (0.0, 1.0, 1)
    """

    def __getattr__(self, name: str) -> Any:
        found = getattr(import_module(self.__name__), name)
        setattr(self, name, found)
        return found
