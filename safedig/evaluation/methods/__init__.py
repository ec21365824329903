"""Ours and its peers behind one protocol, one method a file: equations with their source, no one else's code."""

from .lesson import Lesson
from .mean_difference import GATED, PLAIN
from .method import Applied, Learnt, Method
from .unsteered import Unsteered

METHODS: dict[str, Method] = {one.name: one for one in (Unsteered(), PLAIN, GATED)}
"""By name, in the order of the table."""

__all__ = ["METHODS", "Applied", "Learnt", "Lesson", "Method"]
