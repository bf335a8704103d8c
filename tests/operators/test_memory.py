"""What a verb will need is said by `explain` and held against the budget before it starts."""

from __future__ import annotations

import pytest
import torch

import curvops as co
from curvops.errors import MemoryBudgetError
from curvops.memory import Need, in_turn

SIZE = 2**18


def scaled(budget: int | None = None):
    """2 I as a closure, which counts its products and holds nothing."""
    A = co.Closure(lambda V: 2.0 * V, (SIZE, SIZE), dtype=torch.float32, batched=True, is_psd=True, lower_bound=2.0)
    A.memory_budget = budget
    return A


VERBS = {
    "solve": lambda A: A.solve(torch.ones(SIZE)),
    "logdet": lambda A: A.logdet(),
    "trace": lambda A: A.trace(),
    "diagonal": lambda A: A.diagonal(),
    "eigsh": lambda A: A.eigsh(2),
    "spectrum": lambda A: A.spectrum(),
    "sqrt_matvec": lambda A: A.sqrt_matvec(torch.ones(SIZE)),
    "function": lambda A: A.function(torch.exp, torch.ones(SIZE)),
    "sample": lambda A: co.Gaussian(torch.zeros(SIZE), A).sample(3),
    "to_dense": lambda A: A.to_dense(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_past_the_budget_is_refused_before_its_first_product(verb):
    A = scaled(2**21)
    with pytest.raises(MemoryBudgetError, match=r"2\.1 MB"):
        VERBS[verb](A)
    assert A.matvec_count == 0


@pytest.mark.parametrize("verb", [*VERBS, "matvec"])
def test_explain_names_the_memory_and_computes_nothing(verb):
    A = scaled()
    said = A.explain(verb)
    assert "about" in said or "from" in said, said
    assert "MB" in said or "GB" in said, said
    assert A.matvec_count == 0


def test_more_columns_need_more_memory():
    A = scaled(20 * SIZE * 4)
    assert A.solve(torch.ones(SIZE)).shape == (SIZE,)
    with pytest.raises(MemoryBudgetError, match="fewer columns"):
        A.solve(torch.ones(SIZE, 8))


def test_lanczos_deepens_no_further_than_the_budget_goes():
    d = torch.logspace(0, 6, 4096, dtype=torch.float64)
    A = co.Closure(lambda V: d[:, None] * V, (4096, 4096), batched=True, is_psd=True, lower_bound=1.0)
    A.memory_budget = 40 * 10 * 4096 * 8  # forty steps of ten probes, half of which are for the bases
    with pytest.raises(co.errors.ConvergenceError, match="20 Lanczos steps"):
        A.logdet(co.SLQ(probes=10, rtol=1e-9))


def test_columns_that_do_not_fit_together_go_as_deep_as_they_need_among_fewer():
    d = torch.logspace(0, 4, 512, dtype=torch.float64)
    A = co.Closure(lambda V: d[:, None] * V, (512, 512), batched=True, is_psd=True, lower_bound=1.0)
    A.memory_budget = 4 * 2**20  # five bases of all the 512 steps, four bases of 128; there are forty columns
    V = torch.randn(512, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X, report = A.sqrt_matvec(V, co.Lanczos(rtol=1e-8), return_report=True)
    assert report.converged
    assert report.iterations > 128
    assert torch.linalg.vector_norm(X - d.sqrt()[:, None] * V, dim=0).max() <= 1e-8 * float(X.norm(dim=0).max())
    with pytest.raises(co.errors.ConvergenceError, match="10 steps were allowed"):
        A.sqrt_matvec(V, co.Lanczos(steps=10, rtol=1e-8))


def test_needs_add_up():
    one, two = Need(100, 10), Need(50, 5, complete=False)
    assert in_turn([one, two]) == Need(100, 15, complete=False)
    assert one.beside(3).peak == 113
    assert str(Need(1000)) == "about 1 kB"
    assert str(Need(1000, grows=True)) == "from 1 kB"
    assert "first pass" in str(two)


def test_a_network_s_graphs_enter_once_a_pass_has_measured_them():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x, y = torch.ones(40, 6, dtype=torch.float64), torch.zeros(40, dtype=torch.long)
    G = co.GGN(model, "classification", [(x[:20], y[:20]), (x[20:], y[20:])])
    assert "first pass measures" in G.explain("matvec")
    G @ torch.ones(53, dtype=torch.float64)
    assert "first pass measures" not in G.explain("matvec")
    assert "2 batches kept, 0 recomputed" in G.explain("matvec")
    warm = G._product_need(1)
    G.release()
    cold = G._product_need(1)
    assert warm.kept == 0
    assert cold.kept > 0
    N = co.GGN(model, "classification", [(x[:20], y[:20]), (x[20:], y[20:])], cache=False)
    N @ torch.ones(53, dtype=torch.float64)
    assert "0 batches kept, 2 recomputed" in N.explain("matvec")
    assert N._product_need(1).kept == 0
