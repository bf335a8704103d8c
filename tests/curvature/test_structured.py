"""Diagonals, KFAC, EKFAC and blocks of every network of the zoo, against their definitions with loops over the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.autograd import Function
from untouched import untouched

from curvops.curvature.matrixfree import GGN, MCFisher
from curvops.curvature.structured import (
    EKFAC,
    KFAC,
    BlockEF,
    BlockGGN,
    BlockHessian,
    DiagonalEF,
    DiagonalGGN,
    DiagonalHessian,
)
from curvops.errors import (
    DataError,
    NumericalWarning,
    ShapeError,
    StaleOperatorError,
    UnsupportedError,
    UnsupportedLayerError,
)
from curvops.operators.methods import XDiag
from curvops.testing.problems import Problem, problem, problems

EVERY = pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
WHOLE = pytest.mark.parametrize("p", [p for p in problems() if not isinstance(p.params, Tensor)], ids=lambda p: p.name)
DIAGONAL = ("norm", "scale", "unused")


@pytest.fixture(autouse=True)
def _unused_parameters_are_reported():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the outputs do not depend on unused", NumericalWarning)
        yield


def made(kind: type, p: Problem, **options: Any) -> Any:
    options = {"params": p.params, **({"dict_key_x": "a"} if p.name == "dictionary" else {}), **options}
    return kind(p.model(), p.loss(), p.data(), **options)


class Batches:
    """Batches, made anew in every pass, which it announces; an exception among them is raised."""

    def __init__(self, announce: Any, *batches: Any) -> None:
        self.announce, self.batches = announce, batches

    def __iter__(self) -> Iterator[Any]:
        self.announce()
        for batch in self.batches:
            if isinstance(batch, type):
                raise batch
            yield batch


def ggn(p: Problem) -> Tensor:
    return reference.ggn(p.model(), reference.problem_nll(p), *p.data(), p.params)


def fisher(p: Problem, datum: str = "token") -> Tensor:
    return reference.empirical_fisher(p.model(), reference.problem_nll(p), *p.data(), p.params, datum)


def hessian(p: Problem) -> Tensor:
    return reference.hessian(p.oracle_model(), reference.problem_nll(p), *p.data(), p.params)


def blocks_of(M: Tensor, sizes: list[int]) -> Tensor:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return torch.block_diag(*(M[a:b, a:b] for a, b in zip([0, *ends], ends, strict=False)))


def check(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert reference.relative_error(got, expected) < tolerance


class TestDiagonal:
    @EVERY
    def test_of_the_ggn(self, p):
        D = made(DiagonalGGN, p)
        check(D.diagonal(), ggn(p).diagonal())
        check(D.to_dense(), ggn(p).diagonal().diag())

    @EVERY
    def test_of_the_empirical_fisher(self, p):
        check(made(DiagonalEF, p).diagonal(), fisher(p).diagonal())
        if p.tokens:
            check(made(DiagonalEF, p, datum="example").diagonal(), fisher(p, "example").diagonal())

    @EVERY
    def test_of_the_hessian(self, p):
        D = made(DiagonalHessian, p)
        check(D.diagonal(), hessian(p).diagonal())
        assert D.report.stderr == 0

    def test_of_the_hessian_estimated(self):
        p = problem("mlp")
        D = made(DiagonalHessian, p, method=XDiag(on_failure="warn", probes=10))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)
            error = (D.diagonal() - hessian(p).diagonal()).norm()
        assert error <= 4 * torch.as_tensor(D.report.half_width).norm() + 1e-12
        assert repr(D) == "Diagonal(35) [estimated by XDiag]"

    @pytest.mark.parametrize("name", ["mlp", "mlp-weighted", "conv2d", "sdpa", "lstm"])
    def test_sampled_targets_average_to_the_exact_ones(self, name):
        p = problem(name)
        exact = ggn(p).diagonal()
        draws = torch.stack([
            made(DiagonalGGN, p, fisher="mc", generator=torch.Generator().manual_seed(s)).diagonal()
            for s in range(36)
        ])  # fmt: skip
        z = (draws.mean(0) - exact) / (draws.std(0) / 6).clamp(min=1e-12)
        assert (z.abs() > 4).double().mean() < 0.05
        many = made(DiagonalGGN, p, fisher="mc", num_samples=400).diagonal()
        assert reference.relative_error(many, exact) < 0.3

    def test_sampled_targets_are_those_of_the_mc_fisher(self):
        p = problem("conv2d")
        D = made(DiagonalGGN, p, fisher="mc", num_samples=3)
        M = made(MCFisher, p, num_samples=3)
        check(D.diagonal(), M.to_dense().diagonal())


class TestBlocks:
    @pytest.mark.parametrize(
        ("p", "by"),
        [
            *((p, "parameter") for p in problems() if not isinstance(p.params, Tensor)),
            *((problem(name), "module") for name in ("mlp", "lstm", "tied", "frozen", "conv1d", "tokens")),
        ],
        ids=str,
    )
    def test_of_every_curvature(self, p, by):
        for kind, oracle in ((BlockGGN, ggn), (BlockEF, fisher), (BlockHessian, hessian)):
            blocks = made(kind, p, by=by)
            check(blocks.to_dense(), blocks_of(oracle(p), blocks.sizes))

    def test_by_the_users_groups(self):
        p = problem("mlp")
        blocks = made(BlockGGN, p, by=[["0.bias", "2"], ["0.weight"]])
        assert blocks.sizes == [16, 19]
        check(blocks.to_dense(), blocks_of(ggn(p), [16, 19]))
        rest = made(BlockHessian, p, by=[["2.weight", "2.bias"]])
        assert rest.sizes == [16, 4, 15]
        check(rest.to_dense(), blocks_of(hessian(p), [16, 4, 15]))

    @pytest.mark.parametrize(
        ("by", "error", "words"),
        [
            ([["0.weight", "2.bias"]], UnsupportedError, "not a stretch of consecutive parameters"),
            ([["0"], ["0.bias"]], DataError, "in two groups"),
            ([["nowhere"]], DataError, "no selected parameter is named 'nowhere'"),
            (["0.weight"], DataError, r"by=\[\['0.weight'\]\]"),
            ("layer", DataError, "expected \"parameter\", \"module\""),
            (None, DataError, "expected \"parameter\", \"module\""),
            ([3], DataError, "3 stands where a group is expected"),
            ([[]], DataError, "a group is empty"),
        ],
    )  # fmt: skip
    def test_groups_that_make_no_block(self, by, error, words):
        with pytest.raises(error, match=words):
            made(BlockGGN, problem("mlp"), by=by)


# ---- KFAC by its definition, one datum, one column, one position at a time ------------------------------------------


def kfac_of_linear_layers(p: Problem, approx: str) -> list[Tensor]:
    """Blocks of weight and bias of every `nn.Linear` of a network without tying, in the order of its modules."""
    model, (x, y) = p.model(), p.data()
    loss = reference.problem_nll(p)
    blocks = []
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        A, B, terms = 0.0, 0.0, 0.0
        for i in range(reference.length(x)):
            seen: list[tuple[Tensor, Tensor]] = []
            handle = layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
            f = reference.outputs(model, reference.one(x, i))
            handle.remove()
            Lambda = reference.output_hessian(loss, f, y[i : i + 1])
            values, vectors = torch.linalg.eigh(Lambda)
            # Positions of the outputs do not mix in Λ, so that each root column belongs to one position.
            active = [bool((y[i : i + 1] != -100).reshape(-1)[0])]
            if f.ndim == 3:
                C, T = f.shape[2], f.shape[1]
                pieces = [torch.linalg.eigh(Lambda[t * C : (t + 1) * C, t * C : (t + 1) * C]) for t in range(T)]
                active = [bool(v) for v in (y[i] != -100).reshape(T, -1)[:, 0]]
                roots = []
                for t, (w, V) in enumerate(pieces):
                    root = torch.zeros(T * C, C, dtype=f.dtype)
                    root[t * C : (t + 1) * C] = V * w.clamp(min=0).sqrt()
                    roots.append(root)
                columns = torch.cat(roots, 1).T
            else:
                columns = (vectors * values.clamp(min=0).sqrt()).T
            ((a, out),) = seen
            a = a.detach().reshape(-1, a.shape[-1])
            counts = active if len(active) == len(a) else [any(active)] * len(a)
            for column in columns:
                (g,) = torch.autograd.grad(f, out, column.reshape(f.shape), retain_graph=True)
                g = g.reshape(-1, g.shape[-1])
                rows = g.sum(0, keepdim=True) if approx == "reduce" else g
                B = B + sum(torch.outer(r, r) for r in rows)
            kept = torch.stack([v for v, c in zip(a, counts, strict=True) if c]) if any(counts) else a[:0]
            if approx == "reduce" and len(kept):
                kept = kept.mean(0, keepdim=True)
            A, terms = A + sum((torch.outer(v, v) for v in kept), torch.zeros(a.shape[1], a.shape[1]).double()), (
                terms + len(kept)
            )  # fmt: skip
        blocks.append(torch.kron(B, A / terms))
        if layer.bias is not None:
            blocks.append(B)
    return blocks


class Unknown(Function):
    """The identity, of which nothing is known."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class TimesFirst(nn.Module):
    """Reads one position of each example, which its first entry names, from rows that hold the examples one by one."""

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.a, self.b, self.known = nn.Linear(2, 3), nn.Linear(3, 2), known

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.transpose(0, 1)))
        h = h if self.known else Unknown.apply(h)
        return self.b(h.gather(0, x[:, :1, :1].long().transpose(0, 1).expand(1, len(x), 3))[0])


class TestKFAC:
    @pytest.mark.parametrize("last", [(1, 5), (0, 5), (5, 1), (3, 3), (2, 2)])
    @pytest.mark.parametrize("options", [{}, {"approx": "reduce"}, {"y": [1, -100]}, {"y": [-100, 0]}], ids=str)
    def test_what_is_guessed_of_rows_without_gradient_enters_no_mean(self, last, options):
        y, approx = torch.tensor(options.get("y", [1, 0])), options.get("approx", "expand")
        guarded = bool(options)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
        x[:, 0, 0] = torch.tensor(last)
        known, unknown = (TimesFirst(known).double() for known in (True, False))
        unknown.load_state_dict(known.state_dict())
        nll = reference.problem_nll(problem("mlp-ignored"))
        exact = reference.ggn(known, nll, x, y)[:6, :6].diagonal()
        expected = KFAC(known, "classification", (x, y), approx=approx).blocks
        got = KFAC(unknown, "classification", (x, y), approx=approx).blocks
        check(got[2].to_dense(), expected[2].to_dense())
        weight = got[0].to_dense()
        if "Diagonal" in got[0].describe():
            assert guarded
            assert "not certain whose" in got[0].describe()
            with pytest.raises(UnsupportedLayerError, match="open whose they are"):
                KFAC(unknown, "classification", (x, y), approx=approx, fallback="raise").trace()
            check(weight.diagonal(), exact)
        else:
            check(weight, expected[0].to_dense())

    @pytest.mark.parametrize("approx", ["expand", "reduce"])
    @pytest.mark.parametrize(
        "name",
        [
            *(
                "mlp",
                "mlp-regression",
                "mlp-binary",
                "mlp-weighted",
                "mlp-ignored",
                "dealt-ignored",
                "linear",
                "residual",
                "gelu",
            ),
            *(
                "sdpa",
                "tokens",
                "tokens-ignored-weighted",
                "tokens-paired-ignored",
                "tokens-regression",
                "tokens-binary",
            ),
            "dictionary",
        ],
    )
    def test_by_its_definition(self, name, approx):
        p = problem(name)
        K = made(KFAC, p, approx=approx, tokens="separate")
        check(K.to_dense(), torch.block_diag(*kfac_of_linear_layers(p, approx)))

    @pytest.mark.parametrize("kind", [KFAC, EKFAC])
    @pytest.mark.parametrize(
        "name", [p.name for p in problems() if not p.tokens and not isinstance(p.params, Tensor)]
    )  # fmt: skip
    def test_exact_for_one_datum_without_weight_sharing(self, name, kind):
        p = problem(name)
        model, (x, y) = p.model(), p.data()
        one = (reference.one(x, 1), y[1:2])
        options = {"dict_key_x": "a"} if name == "dictionary" else {}
        K = kind(model, p.loss(), one, params=p.params, fallback="full", **options)
        exact = blocks_of(reference.ggn(model, reference.problem_nll(p), *one, p.params), K.sizes)
        modules = {name: type(m).__name__ for name, m in model.named_modules()}
        start = 0
        for parameter, size in zip(K.layout, K.sizes, strict=True):
            owner = modules[parameter.rpartition(".")[0]]
            shares = owner.startswith(("MultiheadAttention", "RNN", "LSTM", "GRU", "NonDynamicallyQuantizableLinear"))
            shares |= owner.startswith("Conv") or "embedding" in name or parameter.startswith(("0.self", "0.lin"))
            shares |= "keywords" in name or parameter.startswith(("shared", "embedding"))
            where = slice(start, start + size)
            if not shares:
                error = (K.blocks[list(K.layout).index(parameter)].to_dense() - exact[where, where]).norm()
                assert error <= 1e-12 * max(1.0, float(exact[where, where].norm()))
            start += size

    def test_exact_for_deep_linear_networks_with_squared_loss(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        K = KFAC(model, "regression", (x, torch.zeros(7, 2, dtype=torch.float64)))
        exact = reference.ggn(model, reference.nll("regression"), x, torch.zeros(7, 2).double())
        check(K.to_dense(), blocks_of(exact, K.sizes))

    @pytest.mark.parametrize(
        ("p", "fisher_kind"),
        [
            *((p, "exact") for p in problems() if not isinstance(p.params, Tensor)),
            *((problem(n), k) for n in ("mlp", "conv1d", "embedding", "lstm", "tied") for k in ("empirical", "mc")),
        ],
        ids=str,
    )
    def test_ekfac_is_nearer_and_nothing_is_dropped(self, p, fisher_kind):
        options = {"fisher": fisher_kind, "tokens": "separate"}
        if fisher_kind == "mc":
            options["num_samples"] = 2
            exact = made(MCFisher, p, num_samples=2).to_dense()
        else:
            exact = ggn(p) if fisher_kind == "exact" else fisher(p)
        for approx in ("expand", "reduce") if fisher_kind == "exact" else ("expand",):
            K, E = made(KFAC, p, approx=approx, **options), made(EKFAC, p, approx=approx, **options)
            assert K.shape == E.shape == tuple(exact.shape)
            target = blocks_of(exact, K.sizes)
            if fisher_kind == "mc" and p.tokens:  # samples of one sequence's positions are pulled back together
                continue
            distance = float((E.to_dense() - target).norm())
            assert distance <= float((K.to_dense() - target).norm()) * (1 + 1e-9) + 1e-12
            check(torch.stack([b.trace() for b in E.blocks]).sum(), target.trace(), 1e-10)

    @WHOLE
    def test_full_fallback_and_norm_layers_are_exact(self, p):
        K = made(KFAC, p, fallback="full")
        exact = ggn(p)
        model = p.model()
        for (name, where), block in zip(K.layout.items(), K.blocks, strict=True):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            if owner.endswith(("Norm", "Norm1d", "Norm2d")) or name == "scale":
                check(block.to_dense(), exact[where, where], 1e-10)

    def test_merged_factors_are_those_of_the_whole_set(self):
        for name in ("mlp", "conv2d", "embedding", "lstm", "layernorm", "tied"):
            p = problem(name)
            for approx in ("expand", "reduce"):
                whole = made(KFAC, p, approx=approx)
                (x, y) = p.data()
                first = KFAC(p.model(), p.loss(), (x[:1], y[:1]), approx=approx)
                second = KFAC(p.model(), p.loss(), (x[1:], y[1:]), approx=approx)
                check(first.merge(second).to_dense(), whole.to_dense())
                shares = first.fraction(4, 1).merge(second.fraction(4, 3))
                if name != "tied":  # the nearest product of a sum of two is not the sum of the nearest
                    check(shares.to_dense(), whole.to_dense())
        loader = [(x[:3], y[:3]), (x[3:], y[3:])]
        check(KFAC(p.model(), p.loss(), loader, approx="reduce").to_dense(), whole.to_dense())

    def test_merge_refuses_other_parameters_and_options(self):
        p, q = problem("mlp"), problem("linear")
        with pytest.raises(ShapeError, match="same parameters"):
            made(KFAC, p).merge(made(KFAC, q))
        with pytest.raises(ShapeError, match="approx"):
            made(KFAC, p).merge(made(KFAC, p, approx="reduce")).to_dense()
        with pytest.raises(ShapeError, match='fisher="empirical"'):
            made(KFAC, p).merge(made(KFAC, p, fisher="empirical")).to_dense()
        n = problem("layernorm")  # a diagonal of p entries would be broadcast to p rows
        with pytest.raises(ShapeError, match='fallback="diag"'):
            made(KFAC, n).merge(made(KFAC, n, fallback="full")).to_dense()
        with pytest.raises(ShapeError, match="float32"):
            made(KFAC, p).merge(KFAC(p.model(torch.float32), p.loss(), p.data(torch.float32)))

    def test_raise_names_the_module_and_its_type(self):
        with pytest.raises(UnsupportedLayerError, match=r"'1.weight' of module '1' \(LayerNorm\)"):
            made(KFAC, problem("layernorm"), fallback="raise").to_dense()

    def test_sketched_tokens_have_the_right_mean(self):
        p = problem("sdpa")
        exact = made(KFAC, p, tokens="separate").to_dense()
        draws = torch.stack([
            made(KFAC, p, tokens="sketched", generator=torch.Generator().manual_seed(s)).to_dense() for s in range(36)
        ])  # fmt: skip
        error = (draws.mean(0) - exact).norm() / exact.norm()
        assert error < 4 * ((draws - exact).flatten(1).norm(dim=1).square().mean().sqrt() / exact.norm()) / 6
        assert draws.std(0).max() > 0

    def test_sampled_targets_average_to_the_exact_ones(self):
        p = problem("mlp-weighted")
        exact = made(KFAC, p).to_dense()
        assert reference.relative_error(made(KFAC, p, fisher="mc", num_samples=1000).to_dense(), exact) < 0.1

    def test_closed_forms(self):
        K = made(KFAC, problem("conv1d"))
        damped = K.add_diagonal({name: 0.5 + i for i, name in enumerate(K.layout)})
        M = damped.to_dense()
        v = torch.randn(len(M), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        check(damped.solve(v), torch.linalg.solve(M, v), 1e-9)
        check(damped.logdet(), torch.logdet(M), 1e-10)
        root = damped.sqrt_matvec(v)
        check(damped.sqrt_matvec(root), M @ v, 1e-9)
        c = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        (c * K).add_diagonal(1.0).logdet().backward()
        eye = torch.eye(len(M), dtype=torch.float64)
        k = K.to_dense()
        check(c.grad, torch.linalg.solve(2 * k + eye, k).trace(), 1e-9)


class TestLazy:
    def test_repr_before_and_after(self):
        K = made(KFAC, problem("mlp"))
        line = "BlockDiagonal(4: Kronecker(4×4), Dense(4), Kronecker(3×4), Dense(3))"
        assert repr(K) == f"{line} [not computed]"
        K.to_dense()
        assert repr(K) == line
        assert "not computed" in repr(made(EKFAC, problem("conv1d")))
        assert repr(made(BlockGGN, problem("linear"))) == "BlockDiagonal(2: Dense(12), Dense(3)) [not computed]"
        assert repr(made(DiagonalGGN, problem("linear"))) == "Diagonal(15) [not computed]"
        D = made(DiagonalGGN, problem("raw-parameters"))
        D.to_dense()
        assert repr(D) == "Diagonal(24) [per-example rows for scale]"

    @pytest.mark.parametrize("kind", [KFAC, EKFAC, BlockGGN, DiagonalGGN])
    def test_one_computation_serves_every_block(self, kind):
        p = problem("mlp")
        passes = []

        x, y = p.data()
        data = Batches(lambda: passes.append(1), (x[:3], y[:3]), (x[3:], y[3:]))
        operator = kind(p.model(), p.loss(), data, num_data=4)
        repr(operator), operator.describe()
        assert len(passes) == 0
        operator.to_dense()
        operator.diagonal()
        assert len(passes) == (2 if kind is EKFAC else 1)
        operator.release()
        operator.to_dense()
        assert len(passes) == (4 if kind is EKFAC else 2)

    @pytest.mark.parametrize("kind", [KFAC, EKFAC, BlockGGN, DiagonalGGN, DiagonalEF, BlockEF])
    def test_chunks_change_nothing(self, kind):
        for name in ("conv2d", "sdpa", "tied", "raw-parameters", "tokens-ignored-weighted"):
            whole = made(kind, problem(name)).to_dense()
            check(made(kind, problem(name), memory_budget=50_000).to_dense(), whole, 1e-12)

    @pytest.mark.parametrize("kind", [KFAC, EKFAC, BlockGGN, BlockHessian, DiagonalGGN, DiagonalHessian])
    def test_the_users_things_stay(self, kind):
        for name in ("layernorm", "transformer-encoder", "tied", "embeddingbag-mean", "raw-parameters"):
            p = problem(name)
            model = p.model()
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            handle = next(model.modules()).register_forward_hook(lambda *_: None)
            with untouched(model):
                kind(model, p.loss(), p.data()).to_dense()
            handle.remove()

    def test_a_failure_in_the_middle_leaves_no_trace(self):
        p = problem("mlp")
        model, (x, y) = p.model(), p.data()
        bad = y.clone()
        bad[-1] = 7
        with untouched(model):
            with pytest.raises(DataError):
                KFAC(model, p.loss(), [(x[:3], y[:3]), (x[3:], bad[3:])]).to_dense()
            with pytest.raises(KeyboardInterrupt):
                DiagonalGGN(model, p.loss(), Batches(lambda: None, (x, y), KeyboardInterrupt)).to_dense()

    def test_float32(self):
        for name in ("mlp", "conv2d", "lstm", "tied"):
            p = problem(name)
            for kind in (KFAC, DiagonalGGN, BlockGGN):
                low = kind(p.model(torch.float32), p.loss(torch.float32), p.data(torch.float32)).to_dense()
                assert low.dtype == torch.float32
                check(low.double(), made(kind, p).to_dense(), 1e-5)

    def test_parameters_changed_since(self):

        p = problem("mlp")
        model = p.model()
        K, computed = KFAC(model, p.loss(), p.data()), KFAC(model, p.loss(), p.data())
        before = computed.to_dense()
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        with pytest.raises(StaleOperatorError):
            K.to_dense()
        assert torch.equal(computed.to_dense(), before)


@pytest.mark.parametrize("kind", [KFAC, EKFAC, DiagonalGGN, BlockGGN])
def test_unused_parameters_are_reported_once(kind):
    p = problem("raw-parameters")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        D = made(kind, p)
        D.to_dense()
        D.to_dense()
    assert [str(w.message) for w in caught] == ["the outputs do not depend on unused; the curvature there is zero"]


@pytest.mark.parametrize("kind", [KFAC, EKFAC, BlockGGN, BlockHessian])
def test_flat_indices_are_refused_where_they_cut_blocks(kind):
    with pytest.raises(UnsupportedError, match="single entries by flat index"):
        made(kind, problem("subnetwork"))


@pytest.mark.parametrize(
    "options", [{"fisher": "true"}, {"approx": "sum"}, {"fallback": "no"}, {"num_samples": 0}, {"tokens": "all"}]
)
def test_unknown_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        made(KFAC, problem("mlp"), **options)


def test_the_ggn_is_watched():
    p = problem("mlp")
    assert isinstance(made(KFAC, p).blocks[0].watch, GGN)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_module_taken_out_before_anything_was_asked_for(kind):
    p = problem("mlp")
    model = p.model()
    operator = kind(model, p.loss(), p.data())
    del model[0]
    assert "not computed" in repr(operator)
    with pytest.raises(StaleOperatorError, match="submodules"):
        operator.diagonal()
