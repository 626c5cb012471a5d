"""Errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Rejected(Exception):
    """A request that gets an error: status, message, the parameter that is at fault, a code."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def explained(errors: Sequence[Any]) -> Rejected:
    """The error that tells most of those that pydantic found: of a union's branches, the one that fitted best."""
    chosen: dict[str, Any] = max(errors, key=_told) if errors else {}
    # a union's branches are named in the place too, by their types
    place = [str(part) for part in chosen.get("loc", ()) if part != "body" and not set("[(-") & set(str(part))]
    what = str(chosen.get("msg", "this is no valid request")).removeprefix("Value error, ")
    if chosen.get("type") == "extra_forbidden":
        what = "this parameter is not known here"
    if chosen.get("type") == "json_invalid":
        return Rejected(400, f"the body is no JSON: {chosen.get('ctx', {}).get('error', what)}")
    param = ".".join(place) or None
    return Rejected(400, f"{param}: {what}" if param else what, param)


def _told(error: Any) -> tuple[bool, int]:
    return not str(error["type"]).endswith("_type"), len(error["loc"])
