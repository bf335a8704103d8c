"""Shipped with the library: laws for your own operators, a zoo to copy from, and small networks to try things on."""

from curvops.testing.laws import LAWS, LawBroken, check_operator
from curvops.testing.problems import Problem, problem
from curvops.testing.zoo import Case, zoo

__all__ = ["LAWS", "Case", "LawBroken", "Problem", "check_operator", "problem", "zoo"]
