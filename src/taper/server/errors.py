"""Errors as OpenAI's clients expect them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from taper.errors import DoesNotFitError, TaperError, UsageError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """What a request is answered with instead of a result.

    Args:
        status: of HTTP.
        message: what was wrong, the value, the rule and the way out.
        param: the field, as a path such as `messages[0].content`; None where no field is to blame.
        code: for programs, such as `queue_full`.
        kind: OpenAI's `type`.
        retry_after_s: for the Retry-After header, rounded up to whole seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the reply, which is also the event that ends a stream."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, at least 1, where the request may be sent again."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, -int(-self.retry_after_s // 1)))}


def unsupported(param: str, why: str) -> ApiError:
    """A field or value that this server does not honour, refused by name."""
    return ApiError(400, f"{param}: {why}", param=param, code="unsupported_parameter")


def invalid(param: str | None, why: str) -> ApiError:
    """A field whose value is never right."""
    return ApiError(
        400, f"{param}: {why}" if param else why, param=param, code="invalid_value" if param else None
    )


def from_taper(error: TaperError) -> ApiError:
    """An engine's refusal: 400 where the request is to blame, 500 where the model is."""
    message = f"{error}; {error.hint}" if error.hint else str(error)
    if isinstance(error, DoesNotFitError):
        return ApiError(400, message, code="context_length_exceeded")
    if isinstance(error, UsageError):
        # The engine's messages begin with the field: "temperature is -1; it must be ...".
        name = str(error).split(" ", 1)[0]
        return ApiError(400, message, param=name if name.isidentifier() and "_" in name else None)
    return ApiError(500, message, kind="server_error", code="model_error")
