"""Why a request gets no answer: its status of HTTP, and what was found and what would do.

It ends a request, never the process, so it is none of the tree in `errors.py`.
"""


class RefusedError(Exception):
    """A request that is not answered. `image`: which of a list is to blame, from 0; `later`: seconds to wait with another try."""

    def __init__(self, status: int, message: str, *, image: int | None = None, later: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.image = image
        self.later = later

    def as_json(self) -> dict[str, str | int]:
        """What the body of the answer says."""
        return {"error": str(self)} | ({} if self.image is None else {"image": self.image})
