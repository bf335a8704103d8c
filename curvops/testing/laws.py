"""Laws that every operator obeys, for the operators of this library and for the user's own.

>>> import torch
>>> from curvops import Dense
>>> from curvops.testing import check_operator
>>> len(check_operator(Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]])))) > 20
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from curvops.errors import ShapeError
from curvops.operators import Inverse, LinearOperator
from curvops.operators.methods import SOLVE_RTOL
from curvops.testing.lawbook import algebra, answers, behaviour, gradients, products
from curvops.testing.lawbook.subject import RTOL, LawBroken, Subject

Law = Callable[[Subject], None]

LAWS: tuple[Law, ...] = (
    behaviour.words_compute_nothing,
    *products.LAWS,
    *algebra.LAWS,
    *answers.LAWS,
    *behaviour.LAWS,
    *gradients.LAWS,
)
"""Every law; that on words comes first, before anything is computed; each of the others rests on those before it."""

MAX_SIZE = 512
"""Largest rows or columns that the dense oracle takes."""


def check_operator(
    A: LinearOperator,
    *,
    dense: Tensor | None = None,
    rtol: float | None = None,
    user: nn.Module | None = None,
    laws: Iterable[Law] | None = None,
) -> list[str]:
    """Run every law that applies to an operator: products, algebra, answers, behaviour, gradients.

    Args:
        A: The operator, of at most 512 rows and columns (each law compares with a dense matrix).
        dense: The matrix that A must be, found some other way; without it A is only compared with its own `to_dense()`.
        rtol: Relative error that products may have; 1e-10 in float64, 5e-6 in float32 (wider where a product is itself
            an iterative solve). Laws on inverses allow it times the condition number.
        user: A network whose parameters, buffers, gradients, modes and hooks must stay as they are.
        laws: Some of `LAWS`; all by default.

    Returns:
        The names of the laws that held.

    Raises:
        LawBroken: The first law that does not hold; names the law, the operator, and by how much.
        ShapeError: The operator is too large for a dense oracle, or `dense` has another shape.
    """
    chosen = LAWS if laws is None else tuple(laws)
    said = [law for law in chosen if law is behaviour.words_compute_nothing]
    rows, columns = A.shape
    if max(rows, columns) > MAX_SIZE or min(rows, columns) < 1:
        raise ShapeError(
            f"check_operator compares with dense matrices of 1 to {MAX_SIZE} rows and columns; {A!r} is "
            f"{rows} x {columns}."
        )
    if dense is not None and tuple(dense.shape) != (rows, columns):
        raise ShapeError(f"check_operator: dense has shape {tuple(dense.shape)}, and {A!r} is {rows} x {columns}.")
    unread = torch.zeros(rows, columns, dtype=torch.float64)
    before = _state(user)
    for law in said:
        _run(law, Subject(A, unread, 1.0, user))
    M = A.to_dense() if dense is None else dense
    subject = Subject(A, M.detach().cpu().double(), _default_rtol(A) if rtol is None else rtol, user)
    for law in chosen:
        if law not in said:
            _run(law, subject)
        _require_untouched(law, subject, before)
    return [_name(law) for law in chosen]


def _run(law: Law, subject: Subject) -> None:
    try:
        law(subject)
    except LawBroken as broken:
        raise LawBroken(f"law broken: {_name(law)}: {broken}") from None
    except Exception as error:
        raise LawBroken(
            f"law broken: {_name(law)}: raised {type(error).__name__}: {error}\n  operator: {subject.A!r}"
        ) from error


def _name(law: Law) -> str:
    return law.__name__.replace("_", " ")


def _default_rtol(A: LinearOperator) -> float:
    inverses = (node for node in _nodes(A) if isinstance(node, Inverse))
    iterative = any(node.operator._exact("solve") is None and not node.operator._holds_tensors() for node in inverses)
    return max(RTOL[A.dtype], 4 * SOLVE_RTOL[A.dtype] if iterative else 0.0)


def _nodes(operator: LinearOperator) -> Iterator[LinearOperator]:
    yield operator
    for child in operator._children():
        yield from _nodes(child)


def _state(user: nn.Module | None) -> dict[str, object]:
    """What must not change of a network: identities, versions, contents, gradients, modes, hooks."""
    if user is None:
        return {}
    state: dict[str, object] = {}
    for path, module in user.named_modules(remove_duplicate=False):
        state[f"{path}.training"] = module.training
        state[f"{path}: attributes"] = sorted(vars(module))
        state.update({f"{path}.{name}": len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")})
    for name, t in (*user.named_parameters(), *user.named_buffers()):
        grad = None if t.grad is None else (id(t.grad), t.grad.tolist())
        state[name] = (id(t), t.data_ptr(), t._version, t.dtype, t.requires_grad, grad, t.detach().tolist())
    return state


def _require_untouched(law: Law, subject: Subject, before: dict[str, object]) -> None:
    after = _state(subject.user)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if changed:
        raise LawBroken(f"law broken: nothing of the user's changes: {_name(law)} changed {changed} of the network\n"
                        f"  operator: {subject.A!r}")  # fmt: skip
