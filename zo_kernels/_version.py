"""The version, in a module of its own: journals and the build read it, and neither may import the package for it."""

__version__ = "0.1.0"
