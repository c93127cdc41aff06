"""The version, in one place for records and the CLI."""

from importlib.metadata import version

__version__ = version("secateur")
