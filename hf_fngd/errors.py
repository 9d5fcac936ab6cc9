"""The one error type that users of the package see."""


class FNGDError(ValueError):
    """A setting, model or batch that FNGD cannot work with; the message says what to do instead."""
