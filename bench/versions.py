"""Versions of packages, which every line that is kept tells."""

from importlib import metadata

__all__ = ["installed"]


def installed(packages):
    """Return name -> version of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
