"""What to say where the library of a trainer is not installed."""

from fxdistill.errors import OptionError


def missing(name: str, library: str, extra: str) -> OptionError:
    """The error for a name whose library is absent; raise it from the ImportError."""
    return OptionError(
        f"fxdistill.trainers.{name} needs {library}, which is not installed: "
        f"pip install 'fxdistill[{extra}]', or pip install {library}"
    )
