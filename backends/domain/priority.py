"""The class of a request: how urgent its answer is beside others for the same model. Pure."""

from enum import IntEnum


class Priority(IntEnum):
    """The most urgent class has the least value."""

    INTERACTIVE = 0  # a person waits for the first token
    AGENT = 1  # a program works through a task
    BACKGROUND = 2  # nobody waits: titles, tags, summaries, evaluations

    @classmethod
    def of(cls, name: str) -> "Priority":
        """Raises KeyError."""
        return cls[name.upper()]

    @property
    def label(self) -> str:
        """As it is written in the config and in ``x-priority``."""
        return self.name.lower()
