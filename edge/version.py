"""The version of the package, and of the native library beside it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
