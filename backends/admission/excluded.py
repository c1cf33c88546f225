"""Which replicas may not answer a request again. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from backends.domain.snapshot import Seat


@dataclass(frozen=True, slots=True)
class Excluded:
    """``seats``: instances that the request was tried on; the next instance of the same replica is a new candidate.
    ``backends``: ids of replicas that are excluded with all their instances."""

    seats: frozenset[Seat] = frozenset()
    backends: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.seats or self.backends)

    def excludes(self, backend: str, generation: int) -> bool:
        """That instance."""
        return backend in self.backends or (bool(self.seats) and (backend, generation) in self.seats)

    def with_seats(self, seats: Iterable[Seat]) -> "Excluded":
        seats = self.seats.union(seats)
        return self if seats == self.seats else replace(self, seats=seats)

    def with_backends(self, backends: Iterable[str]) -> "Excluded":
        return replace(self, backends=self.backends.union(backends))

    def without_seats_of(self, backend: str) -> "Excluded":
        """Its instances may be tried again."""
        return replace(self, seats=frozenset(seat for seat in self.seats if seat.backend != backend))


NOTHING = Excluded()
