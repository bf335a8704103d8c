"""The letters of the library, and the types that its signatures share.

P: selected parameters, N: data, C: outputs per datum, T: positions, B: batch, K: columns, m: probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, "P"]
"""One flat vector in the order of the selected parameters."""

Columns = Float[Tensor, "P K"]
"""K flat vectors side by side."""

VectorOrColumns = Float[Tensor, "P"] | Float[Tensor, "P K"]

Matmat = Callable[[Tensor], Tensor]
"""`(P, K) → (P, K)`: all that an algorithm in `linalg` sees of a matrix."""

Batch = tuple[Tensor | Mapping[str, Any], Tensor]
"""Inputs and targets of one batch."""

Data = Batch | Mapping[str, Any] | Iterable[Any]
"""One batch, or a re-iterable of batches."""

Array = np.ndarray[Any, Any]
