"""A few eigenpairs of a symmetric matrix through ARPACK, complete and with recomputed residuals."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import scipy.sparse.linalg as spla
import torch
from torch import Tensor
from tqdm import tqdm

from curvops.errors import DataError, ShapeError, UnsupportedError
from curvops.linalg.columns import Counted, check_precision, column_norms, unit_roundoff
from curvops.linalg.probes import gaussian, resolve_seed
from curvops.linalg.results import Eigenpairs, Report
from curvops.typing import Array, Matmat, Vector

Which = Literal["LA", "SA", "LM", "SM", "BE"]
# Deflated follow-up runs that look for missed copies of multiple eigenvalues.
_MAX_FOLLOW_UPS = 20
# Krylov vectors per restart: clustered ends (the negative part of a trained network's Hessian) need many, and past
# this many entries they would take more memory than they save products.
_KRYLOV_VECTORS, _KRYLOV_ENTRIES = 80, 2**27
# Block Lanczos steps that sharpen what ARPACK returned.
_WIDENINGS = 20
# Products spent on a first idea of the norm.
_POWER_STEPS = 5


def krylov_vectors(size: int, k: int) -> int:
    """Vectors of the Krylov space from which ARPACK takes k pairs."""
    usual = max(2 * k + 1, 20)
    return min(size, max(usual, min(_KRYLOV_VECTORS, size // 8, _KRYLOV_ENTRIES // size)))


@torch.no_grad()
def eigsh(
    matmat: Matmat,
    size: int,
    k: int,
    *,
    which: Which | None = None,
    sigma: float | None = None,
    solve: Callable[[Tensor], Tensor] | None = None,
    tol: float = 0.0,
    max_iters: int | None = None,
    v0: Vector | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Eigenpairs, Report]:
    """k eigenpairs of a symmetric A at one end (or both ends) of its spectrum.

    ARPACK keeps a float64 Krylov space fed by A's products. A Krylov space holds one direction per distinct eigenvalue,
    so copies of a multiple eigenvalue can be missed; follow-up runs on A with the found vectors projected out look for
    them until none beats the worst pair kept. A final Rayleigh–Ritz step on all found vectors gives orthonormal
    vectors, and residuals from that step's own products.

    Args:
        matmat: `(P, K) → (P, K)` symmetric product.
        size: P.
        k: Number of pairs, 1 ≤ k ≤ P.
        which: "LA" largest (default without sigma), "SA" smallest, "LM" largest in size, "SM" smallest in size, "BE"
            half from each end, the odd one from the high end. With `sigma` it speaks, as in SciPy, of 1/(λ − σ), and
            "LM" (the default then) means the eigenvalues nearest to sigma.
        sigma: Shift of the shift-invert mode; needs `solve`.
        solve: `(P, K) → (P, K)`, product with (A − σI)⁻¹.
        tol: ARPACK's relative accuracy of the eigenvalues; 0: roundoff of `dtype`.
        max_iters: ARPACK's restarts at most; None: 500.
        v0: `(P,)` start; None: Gaussian from `generator`.
        generator: Draws the starts; None: seed 0.
        dtype: float32 or float64, what `matmat` takes.
        device: Where `matmat` runs.
        progress: Show the products done.

    Returns:
        Eigenpairs (values ascending, vectors orthonormal) and a report. If ARPACK gives up, `report.converged` is False
        and the pairs that did converge are returned, possibly fewer than k. It is also False where a recomputed
        residual ‖Av − λv‖ exceeds max(tol, 10⁴ u)·‖A‖, u the unit roundoff of `dtype`.

    Raises:
        ShapeError, DataError, ValueError: k, which or sizes out of range; NaN from the product.
        UnsupportedError: `sigma` without `solve`.

    Cost: tens to hundreds of products one column at a time, O(P k) memory; P products and O(P³) where k is so close
    to P that the Krylov space would be the whole space.

    Source: Lehoucq, Sorensen and Yang (1998), through SciPy.
    """
    began = time.perf_counter()
    check_precision(dtype, "the operator")
    if size < 1 or not 1 <= k <= size:
        raise ShapeError(f"k={k} eigenpairs of a ({size}, {size}) operator; expected 1 <= k <= {size}.")
    if which is None:
        which = "LA" if sigma is None else "LM"
    if which not in ("LA", "SA", "LM", "SM", "BE"):
        raise ValueError(f"which={which!r}; expected 'LA', 'SA', 'LM', 'SM' or 'BE'.")
    if tol < 0:
        raise ValueError(f"tol={tol}; expected >= 0.")
    if max_iters is not None and max_iters < 1:
        raise ValueError(f"max_iters={max_iters}; expected at least 1.")
    if v0 is not None and v0.shape != (size,):
        raise ShapeError(f"v0 has shape {tuple(v0.shape)}; expected ({size},).")
    A = Counted(matmat)
    # ARPACK wants more Krylov directions than pairs; where that is the whole space, the dense answer is cheaper.
    if max(2 * k + 1, 20) >= size:
        return _dense(A, size, k, which, sigma, dtype, device, began)
    if sigma is not None and solve is None:
        raise UnsupportedError("sigma needs `solve`, the product with (A - sigma I)^-1; expected a closure.")

    # Shift-invert iterates on 1/(λ − σ), its residuals are taken of A.
    driver = A if sigma is None else Counted(solve, "solve")  # pyright: ignore[reportArgumentType]
    seed = resolve_seed(generator)
    bar = tqdm(desc="eigsh", unit="products", disable=not progress, leave=False)
    with bar:
        search = _Search(driver, size, tol, max_iters, seed, dtype, device, bar)
        if which == "BE":
            Q, complete = search.run("LA", k - k // 2, v0)
            if k > 1:
                low, also = search.run("SA", k // 2, v0)
                Q, complete = torch.cat((Q, low), 1), complete and also
        elif which == "SM" and sigma is None:
            # Interior eigenvalues are out of ARPACK's reach; those of A² nearest 0 are at an end.
            folded = _Search(Counted(lambda V: A(A(V))), size, tol, max_iters, seed, dtype, device, bar)
            Q, complete = folded.run("SA", k, v0)
            search.runs, search.trouble = folded.runs, folded.trouble
        else:
            Q, complete = search.run(which, k, v0)

    largest = max(search.norm if sigma is None else 0.0, abs(sigma or 0.0))
    tolerance = max(tol, 1e4 * unit_roundoff(dtype))
    pairs = _refined_pairs(A, Q, k, which, sigma, lambda values: tolerance * max(largest, values), dtype, device)
    worst = max([0.0, *pairs.residuals.tolist()])
    allowed = tolerance * max([largest, *pairs.values.abs().tolist()])
    converged = complete and pairs.values.numel() == k and worst <= allowed
    reason = f"{search.runs} ARPACK run(s) incl. follow-ups for multiple eigenvalues; largest residual {worst:.1e}."
    if not converged:
        reason += (
            f" {search.trouble or 'Residuals are above ' + format(allowed, '.1e') + '.'} "
            f"{pairs.values.numel()} of {k} pairs returned; raise max_iters or tol, or ask for more pairs."
        )
    if sigma is not None:
        reason += f" {driver.columns} solves with A - {sigma:g} I, whose products are not counted."
    name = "ARPACK" if sigma is None else "ARPACK shift-invert"
    return pairs, Report(
        algorithm=name, matvecs=A.columns, seconds=time.perf_counter() - began, reason=reason, converged=converged
    )


class _Search:
    """ARPACK runs on one product, each with the vectors found before moved out of the way."""

    def __init__(
        self,
        product: Counted,
        size: int,
        tol: float,
        max_iters: int | None,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        bar: tqdm,
    ) -> None:
        self.product, self.size, self.seed, self.bar = product, size, seed, bar
        self.draws = 0
        self.dtype, self.device = dtype, device
        self.restarts = 500 if max_iters is None else max_iters
        self.tol = max(tol, 0.0 if dtype == torch.float64 else 2 * unit_roundoff(dtype))
        # Eigenvalues closer than this, relative to ‖A‖, are one to rounding.
        self.margin = max(2 * tol, 1e3 * unit_roundoff(dtype), 1e-10)
        self.runs = 0
        self.trouble = ""
        self.norm = 0.0
        x = self._draw()
        for _ in range(_POWER_STEPS):
            y = self._multiply(x)
            length = float(np.linalg.norm(y))
            if length == 0.0:
                break
            x = y / length

    def run(self, which: str, k: int, v0: Tensor | None) -> tuple[Tensor, bool]:
        """Float64 orthonormal vectors `(P, ≥ k)` whose span holds the k wanted pairs, and whether all were found."""
        if self.norm == 0.0:
            # A killed a random vector: it is zero.
            return torch.as_tensor(np.linalg.qr(np.stack([self._draw() for _ in range(k)], 1))[0], device="cpu"), True
        start = None if v0 is None else v0.detach().to("cpu", torch.float64).numpy().copy()
        values, Q, complete = self._arpack(which, k, None, start, self.tol)
        if not complete:
            return torch.as_tensor(Q, device="cpu"), False
        for _ in range(_MAX_FOLLOW_UPS):
            # A first look needs few digits: the Ritz value is good to the square of the tolerance.
            found, _, done = self._arpack(which, 1, Q, None, max(self.tol, 1e-6))
            if not done:
                break
            edge = np.sort(_rank(values, which))[k - 1]
            if _rank(found, which)[0] >= edge - self.margin * self.norm:
                return torch.as_tensor(Q, device="cpu"), True
            # From a new start: ARPACK loses digits when it begins at what is nearly an eigenvector.
            found, V, done = self._arpack(which, 1, Q, None, self.tol)
            if not done:
                break
            Q = np.linalg.qr(np.concatenate((Q, V), 1))[0]
            values = np.concatenate((values, found))
        self.trouble = "The follow-up runs did not establish that no copy of a multiple eigenvalue is missing."
        return torch.as_tensor(Q, device="cpu"), False

    def _draw(self) -> Array:
        self.draws += 1
        start = gaussian(self.size, self.draws, 1, seed=self.seed, dtype=torch.float64, device="cpu")
        return start[:, 0].numpy()

    def _multiply(self, x: Array) -> Array:
        V = torch.tensor(x, dtype=self.dtype, device=self.device)
        y = self.product(V[:, None])[:, 0].to("cpu", torch.float64).numpy()
        if not np.isfinite(y).all():
            raise DataError("eigsh: the operator's product holds NaN or infinity; check the parameters and the data.")
        self.bar.update()
        length = float(np.linalg.norm(x))
        if length > 0:
            self.norm = max(self.norm, float(np.linalg.norm(y)) / length)
        return y

    def _arpack(
        self, which: str, k: int, found: Array | None, start: Array | None, tol: float
    ) -> tuple[Array, Array, bool]:
        # ARPACK's test is relative to the Ritz value, hopeless for an eigenvalue 0: shift the wanted end away from 0.
        shift = {"LA": 2 * self.norm, "SA": -2 * self.norm}.get(which, 0.0)
        # Vectors found before get an eigenvalue that nobody asks for.
        parked = {"LA": 0.0, "SA": 0.0, "LM": 0.0, "SM": 2 * self.norm}[which]

        def multiply(x: Array) -> Array:
            x = np.ravel(x)
            if found is None:
                return self._multiply(x) + shift * x
            inside = found @ (found.T @ x)
            outside = x - inside
            y = self._multiply(outside)
            return y - found @ (found.T @ y) + shift * outside + parked * inside

        self.runs += 1
        v = self._draw() if start is None else start
        if found is not None:
            v = v - found @ (found.T @ v)
        operator = spla.LinearOperator((self.size, self.size), matvec=multiply, dtype=np.float64)  # pyright: ignore
        try:
            # SciPy's stub types tol by its default, the integer 0.
            options: dict[str, Any] = {
                "tol": tol,
                "maxiter": self.restarts,
                "v0": v,
                "ncv": krylov_vectors(self.size, k),
            }
            values, vectors = spla.eigsh(operator, k=k, which=which, **options)
        except spla.ArpackNoConvergence as error:
            values = np.asarray(error.eigenvalues)
            self.trouble = f"ARPACK stopped with {values.size} of {k} pairs converged."
            return values - shift, np.asarray(error.eigenvectors).reshape(self.size, -1), False
        except spla.ArpackError as error:
            if found is None or k > 1 or "error -9" not in str(error):
                raise
            # "Starting vector is zero": A vanishes on what is left, so any vector there has the eigenvalue 0.
            return np.zeros(1), (v / np.linalg.norm(v))[:, None], True
        return values - shift, vectors, True


def _rank(values: Array, which: str) -> Array:
    """A number per eigenvalue that is the smaller, the more the eigenvalue is wanted."""
    return {"LA": -values, "SA": values, "LM": -np.abs(values), "SM": np.abs(values)}[which]


def _chosen(values: Tensor, k: int, which: str, sigma: float | None) -> Tensor:
    """Ascending indices of the k wanted among ascending eigenvalues."""
    if which == "BE" and sigma is None:
        low = k // 2
        size = values.numel()
        return torch.cat((torch.arange(low, device="cpu"), torch.arange(size - (k - low), size, device="cpu")))
    keys = values.to("cpu", torch.float64).numpy()
    if sigma is not None:
        with np.errstate(divide="ignore"):
            keys = 1.0 / (keys - sigma)
    if which == "BE":
        order = np.argsort(keys, kind="stable")
        order = np.concatenate((order[: k // 2], order[len(order) - (k - k // 2) :]))
    else:
        order = np.argsort(_rank(keys, which), kind="stable")[:k]
    return torch.as_tensor(np.sort(order), device="cpu")


def _take(pairs: Eigenpairs, which: Tensor) -> Eigenpairs:
    which = which.to(pairs.values.device)
    return Eigenpairs(pairs.values[which], pairs.vectors[:, which], pairs.residuals[which])


def _refined_pairs(
    A: Counted,
    Q: Tensor,
    k: int,
    which: str,
    sigma: float | None,
    allowed: Callable[[float], float],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Eigenpairs:
    """The k wanted Ritz pairs on the span of Q, the span widened by the residuals that are not `allowed`.

    ARPACK's own estimate of a residual can be too rosy, for copies of a multiple eigenvalue above all. Each widening
    is a block Lanczos step; no product is repeated.
    """
    size = Q.shape[0]
    if Q.shape[1] == 0:
        empty = torch.zeros(0, dtype=dtype, device=device)
        return Eigenpairs(empty, torch.zeros(size, 0, dtype=dtype, device=device), empty)
    Q = torch.linalg.qr(Q)[0].to(device=device, dtype=dtype)
    W = A(Q).double()
    Q = Q.double()
    wanted = kept = None
    for step in range(_WIDENINGS + 1):
        H = Q.T @ W
        values, U = torch.linalg.eigh((H + H.T) / 2)
        if wanted is None or kept is None:
            kept = _chosen(values, min(k, values.numel()), which, sigma).to(values.device)
        else:
            # Interior Ritz values of the wider span mean nothing: stay with the pairs nearest the ones first chosen.
            kept = column_norms(wanted.T @ (Q @ U)).argsort(descending=True)[: kept.numel()].sort().values
        wanted = Q @ U[:, kept]
        R = W @ U[:, kept] - wanted * values[kept]
        residuals = column_norms(R)
        pairs = Eigenpairs(values[kept].to(dtype), wanted.to(dtype), residuals.to(dtype))
        bad = residuals > allowed(float(values[kept].abs().max()))
        if step == _WIDENINGS or not bool(bad.any()) or Q.shape[1] + int(bad.sum()) > size:
            break
        new = R[:, bad] / residuals[bad]
        for _ in range(2):
            new = torch.linalg.qr(new - Q @ (Q.T @ new))[0]
        W = torch.cat((W, A(new.to(dtype)).double()), 1)
        Q = torch.cat((Q, new), 1)
    return pairs


def _dense(
    A: Counted,
    size: int,
    k: int,
    which: str,
    sigma: float | None,
    dtype: torch.dtype,
    device: torch.device | str,
    began: float,
) -> tuple[Eigenpairs, Report]:
    M = A(torch.eye(size, dtype=dtype, device=device))
    if not bool(torch.isfinite(M).all()):
        raise DataError("eigsh: the operator's product holds NaN or infinity; check the parameters and the data.")
    pairs = dense_eigsh(M, k, which=which, sigma=sigma)
    reason = f"a Krylov space for k={k} would be all of P={size}: dense eigh of the {size} columns."
    return pairs, Report(algorithm="dense eigh", matvecs=A.columns, seconds=time.perf_counter() - began, reason=reason)


def dense_eigsh(M: Tensor, k: int, *, which: Which | str | None = None, sigma: float | None = None) -> Eigenpairs:
    """The k wanted eigenpairs of a dense symmetric M `(P, P)`, which and sigma as in `eigsh`.

    Raises:
        ShapeError, ValueError: k or which out of range.

    Cost: O(P³), in float64.
    """
    size = M.shape[0]
    if not 1 <= k <= size:
        raise ShapeError(f"k={k} eigenpairs of a ({size}, {size}) operator; expected 1 <= k <= {size}.")
    which = which or ("LA" if sigma is None else "LM")
    if which not in ("LA", "SA", "LM", "SM", "BE"):
        raise ValueError(f"which={which!r}; expected 'LA', 'SA', 'LM', 'SM' or 'BE'.")
    dtype, M = M.dtype, M.double()
    values, vectors = torch.linalg.eigh((M + M.T) / 2)
    residuals = column_norms(M @ vectors - vectors * values)
    pairs = Eigenpairs(values.to(dtype), vectors.to(dtype), residuals.to(dtype))
    return _take(pairs, _chosen(values, k, which, sigma))
