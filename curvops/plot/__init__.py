"""Pictures of results: a result goes in, `ax=None` or your own axes, and the axes come out.

Needs `pip install 'curvops[plot]'`; matplotlib is imported at the first picture.
"""

from curvops.plot.convergence import convergence
from curvops.plot.evidence import evidence
from curvops.plot.scree import scree
from curvops.plot.spectrum import spectrum

__all__ = ["convergence", "evidence", "scree", "spectrum"]
