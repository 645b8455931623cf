"""Why a replica does not take a request."""

from jaxstack.runtime.errors import UserError


class QueueFull(UserError):
    """So many requests wait already that another one is refused; come back later."""


class PromptTooLong(UserError):
    """Prompt and answer together exceed the window."""


class UnknownAdapter(UserError):
    """No adapter of that name is loaded."""


class EngineDead(RuntimeError):
    """The step thread has ended; nothing more will be answered."""


class TransferFailed(RuntimeError):
    """A copy of pages between host and device failed or got stuck; what they held has to be computed anew."""
