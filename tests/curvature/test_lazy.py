"""Nothing is computed before someone asks, what was computed is kept as far as memory goes, and dropped when asked."""

from __future__ import annotations

import gc
import weakref

import pytest
import reference
import torch
from curvature_subjects import CURVATURES, KINDS, Counted, Loader, batches, randn
from torch import Tensor

import curvops as co

KIND = pytest.mark.parametrize("kind", KINDS)
VERBS = [
    "solve", "logdet", "slogdet", "trace", "diagonal", "function", "sqrt_matvec", "inv_sqrt_matvec", "frobenius_norm",
    "spectral_norm", "sample", "eigsh", "spectrum", "to_dense", "matvec", "rmatvec",
]  # fmt: skip
BATCHES = 10


def subject(kind: str, **options):
    model, loader = Counted(), Loader(batches(BATCHES))
    return KINDS[kind](model, "classification", loader, **options), model, loader


# ---------------------------------------------------------------- nothing yet


@KIND
def test_building_and_describing_reads_nothing_and_runs_nothing(kind):
    A, model, loader = subject(kind)
    related = [A, A.T, 0.5 * A, -A]
    if kind in CURVATURES:
        related += [A.add_diagonal(1.0), A + A.T, 2 * A.add_diagonal(0.5), A.inverse(), A.add_diagonal(1.0).inverse()]
    for operator in related:
        assert repr(operator).encode("latin-1")
        assert ("43×43" if kind in CURVATURES else "?") in operator.describe()
        for verb in VERBS:
            assert operator.explain(verb).startswith(f"{verb}: ")
    assert (loader.passes, loader.given, model.forwards) == (0, 0, 0)
    assert A.matvec_count == 0


@KIND
def test_building_copies_neither_parameters_nor_data(kind):
    model, data = Counted(), batches(2)
    A = KINDS[kind](model, "classification", data)
    objective = (A if kind in CURVATURES else A.curvature).objective
    assert all(a is b for a, b in zip(objective.selection.tensors, model.parameters(), strict=True))
    assert objective.model is model
    assert all(t is u for (_, t), u in zip(objective.source.tensors(), [t for pair in data for t in pair], strict=True))


def test_data_count_is_found_by_the_first_pass():
    A, _, _ = subject("GGN")
    assert repr(A) == "GGN(P=43, N=?, classification)"
    A @ randn(A.shape[0])
    assert repr(A) == "GGN(P=43, N=29, classification)"
    assert repr(subject("GGN", num_data=29)[0]) == "GGN(P=43, N=29, classification)"


@pytest.mark.parametrize("num_data", [None, 29])
def test_rows_of_function_space_are_found_by_as_few_forwards_as_tell_them(num_data):
    J, model, _ = subject("Jacobian", num_data=num_data)
    assert J.T.describe().startswith("43×?")
    assert J.shape == (87, 43)
    assert model.forwards == (BATCHES if num_data is None else 1)
    before = model.forwards
    assert J.T.shape == (43, 87)
    J.release()
    assert J.shape == (87, 43)
    assert model.forwards == before
    assert J.describe().startswith("87×43")


def test_rows_of_function_space_are_known_after_any_pass():
    G, model, _ = subject("GGN")
    G @ randn(43)
    forwards = model.forwards
    assert G._gram().shape == (2 * 29, 2 * 29)
    assert model.forwards == forwards


def test_a_wrong_output_size_on_the_model_is_not_believed():
    model = Counted()
    model.output_size = 7
    J = co.Jacobian(model, batches(2))
    assert J.shape == (5 * 3, 43)


def test_outputs_of_other_width_in_a_later_batch_are_named():
    class Wider(Counted):
        def forward(self, x: Tensor) -> Tensor:
            f = super().forward(x)
            return f if len(x) == 3 else f[:, :2]

    J = co.Jacobian(Wider(), batches(2), num_data=5)
    with pytest.raises(co.errors.ShapeError, match=r"gave 13 rows, the first of them promised 15"):
        J @ randn(43)


def test_the_choice_for_logdet_waits_for_the_first_forward():
    model, loader = Counted(), Loader(batches(3))
    A = co.GGN(model, "classification", loader).add_diagonal(0.5)
    assert "found by the first forward" in A.explain("logdet")
    assert model.forwards == 0
    value, report = A.logdet(return_report=True)
    assert report.algorithm.startswith("function space")
    assert float(value) == pytest.approx(float(torch.logdet(A.to_dense())), rel=1e-12)
    assert "n = 16 < P = 43" in A.explain("logdet")
    many = co.GGN(model, "classification", Loader(batches(BATCHES))).add_diagonal(0.5)
    value, report = many.logdet(return_report=True)
    assert report.algorithm == "dense Cholesky"
    assert float(value) == pytest.approx(float(torch.logdet(many.to_dense())), rel=1e-12)


# ---------------------------------------------------------------- what is kept


@KIND
def test_policies_give_the_same_numbers(kind):
    V, results = None, []
    for options in ({}, {"cache": True}, {"cache": False}, {"memory_budget": 1}, {"memory_budget": 60_000}):
        A, _, _ = subject(kind, **options)
        V = randn(A.shape[1], 4) if V is None else V
        results.append([A @ V, A @ V, A @ V[:, 0]])
    for found in results:
        assert reference.relative_error(found[0], results[0][0]) <= 1e-14
        assert reference.relative_error(found[1], results[0][0]) <= 1e-14
        assert reference.relative_error(found[2], results[0][0][:, 0]) <= 1e-14


@pytest.mark.parametrize("kind", CURVATURES)
def test_policies_count_forwards_and_passes(kind):
    for options, forwards, passes in (
        ({}, 10, 1),
        ({"cache": True, "memory_budget": 1}, 10, 1),
        ({"cache": False}, 30, 3),
        ({"memory_budget": 1}, 30, 3),
    ):
        A, model, loader = subject(kind, **options)
        v = randn(43)
        A @ v
        assert model.forwards == 10  # one per batch, checks included
        A @ torch.stack([v, v], 1)
        A @ v
        assert (model.forwards, loader.passes) == (forwards, passes)
        assert loader.given == 10 * passes


@pytest.mark.parametrize("kind", CURVATURES)
def test_half_of_the_budget_holds_graphs(kind):
    A, _, _ = subject(kind)
    A @ randn(43)
    sizes = [kept.size for kept in A._linearised.values()]
    budget = 2 * sum(sizes[:4]) + 2 * sizes[9] - 2  # short of room for a fifth by a byte, be it the smallest
    B, model, loader = subject(kind, memory_budget=budget)
    for _ in range(3):
        B @ randn(43)
        assert sum(kept.size for kept in B._linearised.values()) <= budget // 2
    assert list(B._linearised) == [0, 1, 2, 3]
    assert (model.forwards, loader.passes) == (10 + 2 * 6, 3)
    assert "4 batches kept" in B.explain("matvec")


def test_a_graph_grown_by_its_first_product_is_counted_before():
    A, _, _ = subject("GGN")
    J = A._factor()
    J.T @ randn(J.shape[0])  # backward only: the adjoint's graph is still to come
    announced = [kept.size for kept in A._linearised.values()]
    A @ randn(43)
    grown = [kept.piece.graph_bytes for kept in A._linearised.values()]
    assert all(now <= before <= 2 * now for now, before in zip(grown, announced, strict=True))


def test_a_factor_and_its_curvature_share_linearisations():
    A, model, _ = subject("GGN", num_data=29)
    A @ randn(43)
    B = A._factor()
    assert reference.relative_error(B.T @ (B @ (v := randn(43))), A @ v) <= 1e-13
    assert model.forwards == 10


# ---------------------------------------------------------------- what is dropped


@pytest.mark.parametrize("kind", CURVATURES)
def test_release_frees_the_graph_and_the_next_product_builds_it_again(kind):
    A, model, loader = subject(kind)
    v = randn(43)
    first = A @ v
    graphs = [weakref.ref(graph_of(kept.piece)) for kept in A._linearised.values()]
    assert len(graphs) == 10
    assert all(graph() is not None for graph in graphs)
    A.release()
    gc.collect()
    assert all(graph() is None for graph in graphs)
    assert torch.equal(A @ v, first)
    assert (model.forwards, loader.passes) == (20, 2)


@KIND
def test_graphs_go_with_the_operator(kind):
    A, model, _ = subject(kind)
    A @ randn(A.shape[1])
    curvature = A if kind in CURVATURES else A.curvature
    graphs = [weakref.ref(graph_of(kept.piece)) for kept in curvature._linearised.values()]
    operator = weakref.ref(curvature)
    del A, curvature
    assert operator() is None  # by reference counts alone: there is no cycle
    assert all(graph() is None for graph in graphs)
    assert model.forwards >= 10


@pytest.mark.parametrize("options", [{}, pytest.param({"cache": False}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["GGN", "Hessian", "Gram"])
def test_many_products_leave_nothing_behind(kind, options):
    model, data = Counted(), batches(2)
    A = KINDS[kind](model, "classification", data, **options)
    V = randn(A.shape[1], 2)

    def tensors_after(products: int) -> int:
        for _ in range(products):
            A @ V
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    settled = tensors_after(3)
    assert tensors_after(200) <= settled + 2


def graph_of(piece) -> Tensor:
    """A tensor that lives as long as the piece's graph is kept."""
    return piece._grads[0] if hasattr(piece, "_grads") else piece.linearisation._f
