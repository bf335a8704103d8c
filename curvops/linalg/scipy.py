"""The door to SciPy: a product on tensors seen as a `scipy.sparse.linalg.LinearOperator`, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg as spla
import torch
from torch import Tensor

from curvops.errors import ShapeError, UnsupportedError
from curvops.typing import Array, Matmat

_NUMPY_DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


class TorchLinearOperator(spla.LinearOperator):
    """A SciPy operator whose products run in torch.

    Its `dtype` is the numpy dtype of the torch operator; arrays of another real dtype are converted on the way in,
    complex ones go through as two real products.
    """

    def __init__(
        self,
        matmat: Matmat,
        rmatmat: Matmat | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if dtype not in _NUMPY_DTYPES:
            raise ShapeError(f"SciPy operators of dtype {dtype} do not exist here; expected torch.float32 or float64.")
        self._product = matmat
        self._transposed = rmatmat
        self._torch_dtype = dtype
        self._device = torch.device(device)
        super().__init__(_NUMPY_DTYPES[dtype], (int(shape[0]), int(shape[1])))

    def _columns(self, product: Matmat, V: Any) -> Array:
        V = np.asarray(V)
        if np.iscomplexobj(V):
            return self._columns(product, V.real) + 1j * self._columns(product, V.imag)
        # A copy: SciPy hands in views of its workspaces, read-only ones and ones with negative strides among them.
        columns = torch.tensor(np.array(V, dtype=self.dtype, order="C"), device=self._device)
        with torch.no_grad():
            out = product(columns if columns.ndim == 2 else columns[:, None])
        return out.detach().cpu().numpy().reshape(-1, *V.shape[1:])

    def _need_transpose(self) -> Matmat:
        if self._transposed is None:
            raise UnsupportedError("this operator has no transposed product; give rmatmat to use rmatvec or svds.")
        return self._transposed

    def _matvec(self, x: Any) -> Array:
        return self._columns(self._product, x)

    def _matmat(self, X: Any) -> Array:
        return self._columns(self._product, X)

    def _rmatvec(self, x: Any) -> Array:
        return self._columns(self._need_transpose(), x)

    def _rmatmat(self, X: Any) -> Array:
        return self._columns(self._need_transpose(), X)


def to_scipy(
    matmat: Matmat,
    rmatmat: Matmat | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> spla.LinearOperator:
    """A SciPy operator that announces the numpy dtype of `dtype` and multiplies in torch on `device`.

    Args:
        matmat: `(n, K) → (m, K)` product.
        rmatmat: `(m, K) → (n, K)` transposed product; `matmat` itself where symmetric; None: `rmatvec` is refused.
        shape: `(m, n)`.
        dtype: torch.float32 or torch.float64.
        device: Where the products run.

    Raises:
        ShapeError: Another dtype.
    """
    return TorchLinearOperator(matmat, rmatmat, shape, dtype, device)


def from_scipy(operator: Any) -> tuple[Matmat, Matmat]:
    """Products `(n, K) → (m, K)` and `(m, K) → (n, K)` on tensors, from anything `aslinearoperator` takes.

    The results have the dtype and device of the tensor given; the arithmetic is SciPy's, in the operator's own dtype
    or the tensor's, whichever is wider. Not differentiable.

    Raises:
        UnsupportedError: A complex operator; or, at a transposed product, an operator without `rmatvec`.
    """
    linear = spla.aslinearoperator(operator)
    if linear.dtype is not None and np.issubdtype(linear.dtype, np.complexfloating):
        raise UnsupportedError(f"a SciPy operator of dtype {linear.dtype}; expected a real one.")

    def closure(product: Callable[[Array], Array], rows: int, transposed: bool) -> Matmat:
        def matmat(V: Tensor) -> Tensor:
            if V.ndim != 2 or V.shape[0] != rows:
                raise ShapeError(f"columns of shape {tuple(V.shape)}; expected ({rows}, K) for {linear!r}.")
            try:
                out = product(V.detach().cpu().numpy())
            except (NotImplementedError, TypeError) as error:
                # SciPy's answer to a missing rmatvec depends on its version: one of these two.
                if not transposed:
                    raise
                raise UnsupportedError(
                    f"{linear!r} gave no transposed product ({error}); build it with rmatvec= or rmatmat=."
                ) from error
            return torch.tensor(np.asarray(out), dtype=V.dtype, device=V.device)

        return matmat

    return closure(linear.matmat, linear.shape[1], False), closure(linear.rmatmat, linear.shape[0], True)
