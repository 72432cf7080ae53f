"""The solver libraries, imported in the one order that is safe.

PuLP 4 loads HiGHS's compiled library with symbols shared between both; importing `highspy` first can crash.
"""

# ruff: noqa: I001
import pulp
import highspy

__all__ = ["highspy", "pulp"]
