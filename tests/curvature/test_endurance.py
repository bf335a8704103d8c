"""Hundreds of products hold no more memory than one, and graphs go when their operator goes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import curvops as co

KINDS = pytest.mark.parametrize("kind", [co.GGN, co.EmpiricalFisher, co.MCFisher, co.Hessian], ids=lambda k: k.__name__)


def operator(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return kind(model, "classification", (torch.randn(20, 6), torch.randint(3, (20,))))


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@KINDS
@pytest.mark.parametrize("columns", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_products_leave_no_tensor_behind(kind, columns):
    A, v = operator(kind), torch.ones(53, columns)
    for _ in range(24):  # until the calls are on a tape
        first = A @ v
    held, kept = tensors(), sum(entry.piece.graph_bytes for entry in A._linearised.values())
    for _ in range(500):
        last = A @ v
    assert torch.equal(first, last)
    del last
    assert tensors() <= held
    assert sum(entry.piece.graph_bytes for entry in A._linearised.values()) == kept > 0


@KINDS
@pytest.mark.parametrize("how", ["deleted", "released"])
def test_the_graph_goes_with_the_operator(kind, how):
    A = operator(kind)
    for _ in range(24):
        A @ torch.ones(53)
    piece = next(iter(A._linearised.values())).piece
    roots = piece._grads if kind is co.Hessian else [piece.linearisation._f, *piece.linearisation._tangent[2]]
    graphs = [weakref.ref(t) for t in roots]
    assert len(graphs) > 1
    del piece, roots
    gc.disable()  # without reference cycles nothing has to wait for the collector
    try:
        if how == "released":
            A.release()
        else:
            del A
        assert [graph() for graph in graphs] == [None] * len(graphs)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [co.KFAC, co.EKFAC, co.DiagonalGGN], ids=lambda kind: kind.__name__)
def test_a_structured_curvature_leaves_nothing_to_the_collector(kind):
    operator(kind).trace()  # what is kept for good is kept now
    gc.collect()
    gc.disable()
    try:
        A = operator(kind)
        A.trace()
        gone = weakref.ref(A)
        del A
        assert gone() is None
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [thing for thing in gc.garbage if isinstance(thing, torch.Tensor | torch.autograd.graph.Node)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
