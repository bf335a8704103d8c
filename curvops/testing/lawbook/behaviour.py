"""Laws of behaviour: words compute nothing, copies are private, modes are the caller's, no global state changes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator

import torch

from curvops.errors import UnsupportedError
from curvops.operators import Deferred, LinearOperator
from curvops.testing.lawbook.subject import Subject

_VERBS = (
    "solve", "logdet", "slogdet", "trace", "diagonal", "function", "sqrt_matvec", "inv_sqrt_matvec", "frobenius_norm",
    "spectral_norm", "sample", "eigsh", "spectrum", "to_dense", "matvec", "matmat", "rmatvec",
)  # fmt: skip


def words_compute_nothing(s: Subject) -> None:
    """`repr`, `describe` and `explain` multiply nothing and build nothing; `repr` is one line of Latin-1."""
    nodes = list(_nodes(s.A))
    before = [(node.matvec_count, node.is_computed if isinstance(node, Deferred) else None) for node in nodes]
    line = repr(s.A)
    s.require(bool(line) and "\n" not in line, f"repr is not one line: {line!r}")
    try:
        line.encode("latin-1")
    except UnicodeEncodeError as error:
        s.fail(f"repr has signs outside Latin-1: {error}")
    s.require(str(s.A.dtype).removeprefix("torch.") in s.A.describe(), "describe() does not name the dtype")
    for verb in _VERBS:
        s.require(s.A.explain(verb).startswith(f"{verb}: "), f"explain({verb!r}) is {s.A.explain(verb)!r}")
    after = [(node.matvec_count, node.is_computed if isinstance(node, Deferred) else None) for node in nodes]
    s.require(before == after, f"repr, describe or explain computed something: {before} became {after}")


def deferred_parts_are_built_once(s: Subject) -> None:
    """A deferred part is built at the first need, once; `release()` drops it, and it is built again."""
    for node in _nodes(s.A):
        if not isinstance(node, Deferred):
            continue
        node.release()
        s.require(not node.is_computed, "release() kept what was computed")
        first = node.content()
        node @ s_vector(s, node)
        s.require(node.content() is first, "a deferred part was built twice")


def release_changes_no_answer(s: Subject) -> None:
    """After `release()` the same products come out."""
    v = s.vector(s.M.shape[1], 21)
    before = s.A @ v
    if s.is_square and s.A.is_symmetric:
        s.A.function(torch.exp, 0.0 * v)  # fills what is kept
    s.A.release()
    s.close(s.A @ v, before, s.norm * float(v.norm()), "A v after release()")


def pickled_copies_are_equal(s: Subject) -> None:
    """`pickle` and `torch.save` round trips, or a clear refusal by operators that hold a function or a network."""
    try:
        data = pickle.dumps(s.A)
    except UnsupportedError as refusal:
        s.require(len(str(refusal)) > 20, f"pickling is refused without a reason: {refusal}")
        return
    copy = pickle.loads(data)
    s.require(type(copy).__name__ in (type(s.A).__name__, _kind(s.A)), f"pickle gave a {type(copy).__name__}")
    s.equals(copy, s.M, "a pickled copy")
    buffer = io.BytesIO()
    torch.save(s.A, buffer)
    buffer.seek(0)
    s.equals(torch.load(buffer, weights_only=False), s.M, "a copy through torch.save")


def converted_copies_are_private(s: Subject) -> None:
    """`.to(dtype)` gives the same matrix in another dtype, and leaves the operator as it was; or refuses clearly."""
    dtype = s.A.dtype
    other = torch.float32 if dtype == torch.float64 else torch.float64
    v = s.vector(s.M.shape[1], 22)
    try:
        copy = s.A.to(other)
    except UnsupportedError as refusal:
        s.require(len(str(refusal)) > 20, f".to({other}) is refused without a reason: {refusal}")
        return
    s.require(copy.dtype == other, f".to({other}) has dtype {copy.dtype}")
    product = copy @ v.to(other)
    s.require(product.dtype == other, f".to({other}) multiplies in {product.dtype}")
    scale = s.norm * float(v.norm())
    s.close(product, s.M @ v.cpu().double(), scale, f".to({other}) @ v", max(1.0, 1e-5 / s.rtol))
    s.require(s.A.dtype == dtype, ".to() changed the operator itself")
    s.close(s.A @ v, s.M @ v.cpu().double(), scale, "A v after .to()")
    s.require(s.A.to(s.A.device).dtype == dtype, ".to(device) changed the dtype")


def modes_are_the_callers(s: Subject) -> None:
    """Verbs answer under `no_grad` and `inference_mode`, and what they kept there serves autograd later."""
    s.A.release()
    v = s.vector(s.M.shape[1], 23)
    expected, scale = s.M @ v.cpu().double(), s.norm * float(v.norm())
    well_posed = s.is_square and s.condition * s.eps < 1e-4
    b = s.vector(s.M.shape[0], 24)
    with torch.inference_mode():
        s.close(s.A @ v, expected, scale, "A v in inference_mode")
        if well_posed:
            s.A.solve(b)
        if s.is_square and s.A.is_symmetric:
            s.A.function(torch.exp, 0.0 * v)
    with torch.no_grad():
        product = s.A @ v
        s.require(not product.requires_grad, "A v in no_grad requires grad")
        s.close(product, expected, scale, "A v in no_grad")
    if s.has_transpose():
        w = s.vector(s.M.shape[1], 23).requires_grad_()
        (s.A @ w).sum().backward()
        ones = torch.ones(s.M.shape[0], dtype=torch.float64)
        assert w.grad is not None
        s.close(w.grad, s.M.T @ ones, s.norm * len(ones) ** 0.5, "gradient of sum(A v) after inference_mode")
        if well_posed:
            c = b.clone().requires_grad_()
            s.A.solve(c).sum().backward()
            s.require(c.grad is not None, "solve after inference_mode has no gradient")


def global_randomness_is_untouched(s: Subject) -> None:
    """No verb draws from the global generator, and estimates repeat bit for bit."""
    state = torch.get_rng_state()
    if s.is_square and s.A.is_symmetric:
        first, second = s.A.trace(), s.A.trace()
        s.require(bool((first == second).all()), "trace() gave two different answers")
        s.A.eigsh(1)
    s.A @ s.vector(s.M.shape[1])
    s.require(bool((torch.get_rng_state() == state).all()), "the global random state was advanced")


def s_vector(s: Subject, node: LinearOperator) -> torch.Tensor:
    """A vector for a part of the operator."""
    return s.vector(node.shape[1], 25)


def _nodes(operator: LinearOperator) -> Iterator[LinearOperator]:
    yield operator
    for child in operator._children():
        yield from _nodes(child)


def _kind(operator: LinearOperator) -> str:
    return operator.kind.__name__ if isinstance(operator, Deferred) else ""


LAWS = (
    deferred_parts_are_built_once,
    release_changes_no_answer,
    pickled_copies_are_equal,
    converted_copies_are_private,
    modes_are_the_callers,
    global_randomness_is_untouched,
)
