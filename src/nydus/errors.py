"""The errors that a user may see. Commands print ``str(error)`` as one line and exit non-zero."""

from __future__ import annotations


class NydusError(Exception):
    """Base of every error that is about the user's input or environment, not about a defect of ours."""


class FormatError(NydusError):
    """Bytes that do not follow their format.

    Args:
        what: what is wrong, in one sentence.
        where: file, blob or table it was read from.
        offset: byte offset in it, if known.
        found, expected: the values, if they say something.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        offset: int | None = None,
        found: object = None,
        expected: object = None,
    ) -> None:
        self.what, self.where, self.offset = what, where, offset
        self.found, self.expected = found, expected
        text = f"{where}: {what}" if where else what
        if offset is not None:
            text += f" at offset {offset:#x}"
        if expected is not None:
            text += f" (expected {expected}, found {found})"
        elif found is not None:
            text += f" (found {found})"
        super().__init__(text)


class ConfigError(NydusError):
    """A configuration document or an option that cannot be used; the text names the key."""


class BackendError(NydusError):
    """Bytes could not be fetched from, or stored in, a registry or another backend.

    ``permanent`` errors (401, 403, 404, wrong digest) are not worth a retry; the others are, but not before
    ``retry_after`` seconds have passed.
    """

    def __init__(
        self, message: str, *, permanent: bool = False, status: int | None = None, retry_after: float = 0.0
    ) -> None:
        super().__init__(message)
        self.permanent, self.status, self.retry_after = permanent, status, retry_after


class MountError(NydusError):
    """The kernel refused a mount or an unmount."""
