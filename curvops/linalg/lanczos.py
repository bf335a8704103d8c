"""Lanczos tridiagonalisation of many start vectors at once, fully reorthogonalised, and extendable."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from curvops.errors import DataError, ShapeError
from curvops.typing import Matmat


@dataclass(frozen=True)
class Tridiagonal:
    """m Lanczos runs: A V = V T + β_k v_{k+1} e_kᵀ for every start vector, T symmetric tridiagonal.

    A run that has met an invariant subspace after `depth` steps is exact there: its later α repeat α₁ and its later β
    are zero, so that the padding never touches the first row of an eigenvector, and quadrature sees it with weight
    zero.

    Attributes:
        alphas: `(m, k)` diagonals, float64 on the CPU.
        betas: `(m, k)` off-diagonals, `betas[:, -1]` being the residual β_k (0 where the run is exact), float64 on
            the CPU.
        depth: `(m,)` steps taken by each run.
        exact: `(m,)` True where the Krylov space is invariant (to `rounding`): quadrature is exact there.
        norms: `(m,)` 2-norms of the start vectors.
        rounding: `(m,)` η: T belongs to A + E with ‖E‖₂ ≲ η. Measured: the parts of A v_j along v_i, i < j − 1, which
            vanish for a symmetric A in exact arithmetic, plus the unit roundoff of the products' dtype times ‖T‖.
        size: P.
        matvecs: Products spent, in columns.
        blocks: The basis in slabs of `(m, k_i, P)`, one per call; () when it was not kept.
        current: `(m, P)` the next Lanczos vectors; None when the basis was not kept.
    """

    alphas: Float[Tensor, "m k"]
    betas: Float[Tensor, "m k"]
    depth: Int[Tensor, " m"]
    exact: Tensor
    norms: Float[Tensor, " m"]
    rounding: Float[Tensor, " m"]
    size: int
    matvecs: int
    blocks: tuple[Tensor, ...] = ()
    current: Tensor | None = None

    @property
    def steps(self) -> int:
        """k, the steps of the longest run."""
        return self.alphas.shape[1]

    @property
    def basis(self) -> Float[Tensor, "m k P"] | None:
        """`(m, k, P)` Lanczos vectors, zero beyond a run's depth; None when they were not kept."""
        if not self.blocks:
            return None
        return self.blocks[0] if len(self.blocks) == 1 else torch.cat(self.blocks, dim=1)

    def without_basis(self) -> Tridiagonal:
        """The same runs, memory released; they can no longer be extended."""
        return replace(self, blocks=(), current=None)


def lanczos(
    matmat: Matmat, V0: Float[Tensor, "P m"], steps: int, *, basis: bool = True, progress: bool = False
) -> Tridiagonal:
    """Tridiagonalise a symmetric matrix from each column of `V0`, all columns in one product per step.

    Every new vector is orthogonalised against all earlier ones, once after the three-term recurrence and once more
    where that pass took away most of it (Daniel, Gragg, Kaufman, Stewart 1976), so T keeps the moments that Gauss
    quadrature needs. Runs that end early leave the products.

    Args:
        matmat: `(P, K) → (P, K)`, symmetric.
        V0: `(P, m)` start vectors, of any length; a zero column gives a run of depth 0.
        steps: k; capped at P.
        basis: Keep the Lanczos vectors (needed by `extend` and by f(A)v). They exist during the run in any case.
        progress: Show a progress bar.

    Returns:
        The runs.

    Raises:
        ShapeError: `V0` is not `(P, m)`, or `steps` < 1.
        DataError: A start vector or a product is not finite, or the matrix is visibly not symmetric.

    Cost: m·k products, O(P·m·k²) for the orthogonalisation, P·m·k numbers of memory.
    Source: Golub and Meurant, Matrices, Moments and Quadrature, 2010, chapter 4.
    """
    if V0.ndim != 2 or V0.shape[0] < 1 or V0.shape[1] < 1:
        raise ShapeError(f"lanczos expects start vectors of shape (P, m), got {tuple(V0.shape)}.")
    if steps < 1:
        raise ShapeError(f"lanczos expects steps >= 1, got {steps}.")
    with torch.no_grad():
        start = V0.detach().T
        norms = torch.linalg.vector_norm(start, dim=1, dtype=start.dtype)
        lengths = norms.to("cpu", torch.float64)
        if not bool(torch.isfinite(lengths).all()):
            raise DataError(
                "lanczos was given a start vector with NaN or Inf; check the right-hand side or the probes."
            )
        current = start / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
        m = start.shape[0]
        empty = torch.zeros(m, 0, dtype=torch.float64, device="cpu")
        begun = Tridiagonal(
            alphas=empty,
            betas=empty,
            depth=torch.zeros(m, dtype=torch.int64, device="cpu"),
            exact=lengths == 0,
            norms=lengths,
            rounding=torch.zeros(m, dtype=torch.float64, device="cpu"),
            size=start.shape[1],
            matvecs=0,
            current=current,
        )
        done = _advance(matmat, begun, min(steps, start.shape[1]), progress)
    return done if basis else done.without_basis()


def extend(matmat: Matmat, tri: Tridiagonal, more_steps: int, *, progress: bool = False) -> Tridiagonal:
    """Continue runs by `more_steps` (never beyond P) without repeating a product; to rounding what one longer run
    gives.

    Args:
        matmat: The matrix of the first part.
        tri: Runs that kept their basis.
        more_steps: Additional steps, >= 1.
        progress: Show a progress bar.

    Raises:
        ShapeError: The runs did not keep their basis, or `more_steps` < 1.
        DataError: As in `lanczos`.
    """
    if tri.current is None:
        raise ShapeError("These Lanczos runs did not keep their basis; run lanczos(..., basis=True) to extend them.")
    if more_steps < 1:
        raise ShapeError(f"extend expects more_steps >= 1, got {more_steps}.")
    with torch.no_grad():
        return _advance(matmat, tri, min(more_steps, tri.size - tri.steps), progress)


_ONE_BY_ONE = 2**14
"""Entries of a run's basis from which one product per run beats the batched one (measured: sixfold at 10 x 15 x 235,000
on a CPU, whose batched product with a vector does not use the cores' width)."""


def _overlaps(blocks: list[Tensor], w: Tensor) -> list[Tensor]:
    """Inner products `(m, k, 1)` of every w with its run's vectors, block by block."""
    return [
        torch.stack([torch.mv(V, v) for V, v in zip(block, w, strict=True)])[:, :, None]
        if _one_by_one(block)
        else torch.bmm(block, w[:, :, None])
        for block in blocks
    ]


def _subtract(blocks: list[Tensor], coefficients: list[Tensor], w: Tensor) -> None:
    for block, c in zip(blocks, coefficients, strict=True):
        if _one_by_one(block):
            for V, row, v in zip(block, c[:, :, 0], w, strict=True):
                v.addmv_(V.T, row, alpha=-1)
        else:
            w.unsqueeze(2).baddbmm_(block.transpose(1, 2), c, alpha=-1)


def _one_by_one(block: Tensor) -> bool:
    return block.device.type == "cpu" and block.shape[1] * block.shape[2] >= _ONE_BY_ONE


def _advance(matmat: Matmat, tri: Tridiagonal, count: int, progress: bool) -> Tridiagonal:
    if count < 1 or bool(tri.exact.all()):
        return tri
    assert tri.current is not None
    m, size, old = tri.alphas.shape[0], tri.size, tri.steps
    current, dtype = tri.current, tri.current.dtype
    unit = torch.finfo(dtype).eps
    slab = torch.zeros(m, count, size, dtype=dtype, device=current.device)
    alphas = torch.cat([tri.alphas, torch.zeros(m, count, dtype=torch.float64, device="cpu")], dim=1)
    betas = torch.cat([tri.betas, torch.zeros(m, count, dtype=torch.float64, device="cpu")], dim=1)
    depth, exact, rounding = tri.depth.clone(), tri.exact.clone(), tri.rounding.clone()
    scale = _scale(tri.alphas, tri.betas)
    matvecs, taken = tri.matvecs, 0
    previous = tri.blocks[-1][:, -1] if old else None
    # A run that takes no further part must not show up as asymmetry.
    coupling = (tri.betas[:, -1] * ~exact if old else torch.zeros(m, device="cpu")).to(current.device, dtype)
    for step in tqdm(range(count), desc="Lanczos", disable=not progress, leave=False):
        j = old + step
        going = ~exact
        slab[:, step] = current * going.to(current.device, dtype)[:, None]
        if bool(going.all()):
            product = matmat(current.T)
        else:
            product = matmat(current[going.to(current.device)].T)
        if product.shape != (size, int(going.sum())):
            raise ShapeError(f"matmat returned {tuple(product.shape)}, expected {(size, int(going.sum()))}.")
        matvecs += int(going.sum())
        w = torch.zeros_like(current)
        w[going.to(current.device)] = product.detach().to(dtype).T
        blocks = [*tri.blocks, slab[:, : step + 1]]
        full = _norm(w)
        # The three-term recurrence first: one full pass over what it leaves is as good as two over A v_j.
        alpha = torch.linalg.vecdot(current, w)
        w -= alpha[:, None] * current
        if previous is not None:
            w -= coupling[:, None] * previous
        first = _overlaps(blocks, w)
        _subtract(blocks, first, w)
        # A v_j owes nothing to the vectors before v_{j-1}: what is found there is rounding, or asymmetry.
        stray = _norm(torch.cat(first, dim=1)[:, :, 0])
        scalars = torch.stack([alpha, _norm(w), stray, full]).to("cpu", torch.float64)
        if bool((scalars[1] < scalars[2])[going].any()):
            second = _overlaps(blocks, w)
            _subtract(blocks, second, w)
            scalars[1] = _norm(w).to("cpu", torch.float64)
        if not bool(torch.isfinite(scalars).all()):
            raise DataError(f"The product in Lanczos step {j} holds NaN or Inf; check the parameters and the data.")
        a, b, off, size_of_product = scalars
        scale = torch.maximum(scale, size_of_product)
        if bool((off > 30 * unit**0.5 * scale).any()):
            raise DataError(
                f"The matrix is not symmetric: in Lanczos step {j} a product has a part of "
                f"{float((off / scale).nan_to_num().max()):.1e}·‖A‖ "
                "where symmetry leaves none. Lanczos needs a symmetric operator; check is_symmetric, or a product "
                "that varies."
            )
        rounding = torch.maximum(rounding, torch.where(going, 2 * off, rounding))
        floor = torch.maximum(10 * unit * scale, rounding)
        ended = going & ((b <= floor) | (j + 1 >= size))
        rounding = torch.maximum(rounding, torch.where(ended & (j + 1 < size), b, rounding))
        alphas[:, j] = torch.where(going, a, alphas[:, 0])
        betas[:, j] = torch.where(going & ~ended, b, torch.zeros_like(b))
        depth += going
        exact |= ended
        taken = step + 1
        if bool(exact.all()):
            break
        reciprocal = torch.where(exact, torch.zeros_like(b), 1 / b.clamp(min=1e-300))
        previous, coupling = slab[:, step], (b * ~exact).to(current.device, dtype)
        current = w * reciprocal.to(current.device, dtype)[:, None]
    return Tridiagonal(
        alphas=alphas[:, : old + taken],
        betas=betas[:, : old + taken],
        depth=depth,
        exact=exact,
        norms=tri.norms,
        rounding=torch.maximum(rounding, unit * scale),
        size=size,
        matvecs=matvecs,
        blocks=(*tri.blocks, slab[:, :taken]),
        current=current,
    )


def _scale(alphas: Tensor, betas: Tensor) -> Tensor:
    # max_j ‖T e_j‖₂ ≤ ‖A‖: the scale against which a β is called zero.
    before = torch.nn.functional.pad(betas, (1, 0))[:, : alphas.shape[1]]
    rows = (alphas.square() + betas.square() + before.square()).sqrt()
    return torch.nn.functional.pad(rows, (0, 1)).amax(dim=1)


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)
