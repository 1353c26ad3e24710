"""Build entry point. All metadata is in pyproject.toml; this file is where an optional C++ build can hook in."""

from setuptools import setup

setup()
