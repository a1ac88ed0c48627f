"""`Gate`: counts the answers under way, and refuses more than there is room for."""

from m3runtime.serve.errors import ApiError


class Gate:
    """Counts places of answers: those in rows and those that wait. Only for the thread of the event loop."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0
        self.is_closing = False
        """Is the server being stopped? Then nothing more is admitted."""

    def take(self, count: int) -> None:
        """Take places, all or none. Raises `ApiError`: 429 if they are not free, 503 once the server is stopping."""
        if self.is_closing:
            raise ApiError(503, "the server is being stopped", code="shutting_down", retry_after=5)
        if count > self.places:
            raise ApiError(400, f"a request may have at most {self.places} answers here", param="n")
        if self.taken + count > self.places:
            raise ApiError(
                429,
                "too many answers are waiting; try again later",
                kind="rate_limit_error",
                code="busy",
                retry_after=1,
            )
        self.taken += count

    def give_back(self, count: int = 1) -> None:
        """Give places back."""
        self.taken -= count
