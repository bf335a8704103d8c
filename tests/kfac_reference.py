"""KFAC by its definition: loops over data, columns, uses and positions, independent of everything in curvops.

A network runs with the functions of `torch.nn.functional` replaced by ones that write down every use of a parameter:
what went in, what came out. From there it is Martens & Grosse (2015) and Eschenhagen et al. (2023), term by term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MATMUL = Tensor.__matmul__
_ADD = Tensor.__add__


@dataclass
class Use:
    """One use of a parameter by one datum.

    Attributes:
        kind: "outer" (W `(O, I)`), "flipped" (W `(I, O)`), "lookup" (rows of a table), "shift" (a bias).
        a: `(T, G, I)` inputs by position and group, or `(T,)` rows looked up; None for a bias.
        output: Where the derivative is taken.
        positions: `output's derivative → (T, G, O)`.
    """

    kind: str
    a: Tensor | None
    output: Tensor
    positions: Callable[[Tensor], Tensor]


Uses = dict[int, list[Use]]
"""id of the parameter → its uses."""


def uses(model: nn.Module, x: Any) -> tuple[Tensor, Uses]:
    """f of one datum, and every use of every parameter that is a factor of a product, a table or a bias."""
    found: Uses = {}
    with _written_down(found):
        f = reference.outputs(model, x)
    return f, found


@contextmanager
def _written_down(found: Uses) -> Iterator[None]:
    linear, embedding, addmm = F.linear, F.embedding, torch.addmm

    def use(parameter: Tensor | None, kind: str, a: Tensor | None, output: Tensor, positions: Any) -> None:
        whole = parameter if parameter is None or parameter._base is None else parameter._base
        if not isinstance(whole, nn.Parameter):
            return
        first = parameter.storage_offset() // (whole.stride(0) if whole.dim() else 1)  # some of its rows

        def spread(g: Tensor) -> Tensor:
            g = positions(g)
            if whole.shape == parameter.shape or kind == "lookup":
                return g
            full = g.new_zeros(*g.shape[:2], whole.shape[0])
            full[..., first : first + parameter.shape[0]] = g
            return full

        found.setdefault(id(whole), []).append(Use(kind, None if a is None else a.detach(), output, spread))

    def noted_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        rows = lambda g: g.reshape(-1, 1, g.shape[-1])  # noqa: E731
        use(weight, "outer", x.reshape(-1, 1, x.shape[-1]), out, rows)
        use(bias, "shift", None, out, rows)
        return out.clone()  # what follows may write to it

    def noted_embedding(index: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any) -> Tensor:
        out = embedding(index, weight, padding_idx, *rest)
        counted = 1.0 if padding_idx is None else (index.reshape(-1, 1, 1) != padding_idx).to(out)
        use(weight, "lookup", index.reshape(-1), out, lambda g: g.reshape(-1, 1, g.shape[-1]) * counted)
        return out

    def noted_matmul(x: Tensor, weight: Tensor) -> Tensor:
        out = _MATMUL(x, weight)
        if isinstance(weight, nn.Parameter):
            use(weight, "flipped", x.reshape(-1, 1, x.shape[-1]), out, lambda g: g.reshape(-1, 1, g.shape[-1]))
        return out

    def noted_add(x: Tensor, other: Any) -> Tensor:
        out = _ADD(x, other)
        if isinstance(other, nn.Parameter) and other.shape == out.shape[-1:]:
            use(other, "shift", None, out, lambda g: g.reshape(-1, 1, g.shape[-1]))
        return out

    def noted_addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        out = addmm(bias, x, weight)
        use(weight, "flipped", x.unsqueeze(1), out, lambda g: g.unsqueeze(1))
        use(bias, "shift", None, out, lambda g: g.unsqueeze(1))
        return out

    def noted_convolution(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:  # type: ignore
            out = plain(x, weight, bias, stride, padding, dilation, groups)
            # Each input entry of each position, by the convolution of its own unit kernel: no index arithmetic.
            per_group = weight[0].numel()
            unit = torch.eye(per_group, dtype=x.dtype).reshape(per_group, *weight.shape[1:])
            with torch.no_grad():
                patches = plain(x, unit.repeat(groups, *(1,) * (weight.dim() - 1)), None, stride, padding, dilation,
                                groups)  # fmt: skip
            a = patches.flatten(2)[0].T.unflatten(1, (groups, per_group))
            use(weight, "outer", a, out, lambda g: g.flatten(2)[0].T.unflatten(1, (groups, -1)))
            use(bias, "shift", None, out, lambda g: g.flatten(2)[0].T.unsqueeze(1))
            return out.clone()

        return convolution

    def noted_transposed(plain: Callable[..., Tensor], adjoint: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def transposed(x, weight, bias=None, stride=1, padding=0, extra=0, groups=1, dilation=1) -> Tensor:  # type: ignore
            out = plain(x, weight, bias, stride, padding, extra, groups, dilation)
            per_group = weight[0].numel()
            unit = torch.eye(per_group, dtype=x.dtype).reshape(per_group, *weight.shape[1:])
            unit = unit.repeat(groups, *(1,) * (weight.dim() - 1))

            def positions(g: Tensor) -> Tensor:  # of the input: what each sends its channels' derivatives from
                patches = adjoint(g, unit, None, stride, padding, dilation, groups)
                return patches.flatten(2)[0].T.unflatten(1, (groups, per_group))

            use(weight, "flipped", x.flatten(2)[0].T.unflatten(1, (groups, -1)), out, positions)
            use(bias, "shift", None, out, lambda g: g.flatten(2)[0].T.unsqueeze(1))
            return out.clone()

        return transposed

    patched: dict[str, Any] = {"linear": noted_linear, "embedding": noted_embedding}
    for d in ("1d", "2d", "3d"):
        patched[f"conv{d}"] = noted_convolution(getattr(F, f"conv{d}"))
        patched[f"conv_transpose{d}"] = noted_transposed(getattr(F, f"conv_transpose{d}"), getattr(F, f"conv{d}"))
    with (
        mock.patch.multiple(F, **patched),
        mock.patch.object(Tensor, "__matmul__", noted_matmul),
        mock.patch.object(Tensor, "__add__", noted_add),
        mock.patch.object(torch, "addmm", noted_addmm),
        mock.patch("torch.nn.modules.rnn._VF", _RECURRENT),
    ):
        yield


# ---- recurrent layers, step by step ---------------------------------------------------------------------------------


def _tanh_cell(x: Tensor, h: Tensor, *w: Any) -> Tensor:
    return torch.tanh(F.linear(x, w[0], w[2]) + F.linear(h, w[1], w[3]))


def _lstm_cell(x: Tensor, state: Any, *w: Any) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (F.linear(x, w[0], w[2]) + F.linear(h, w[1], w[3])).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(x: Tensor, h: Tensor, *w: Any) -> Tensor:
    r, z, n = F.linear(x, w[0], w[2]).chunk(3, -1)
    hr, hz, hn = F.linear(h, w[1], w[3]).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    return (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h


def _layer(cell: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, hx: Any, weights: Any, *_: Any) -> Any:
        pair = isinstance(hx, tuple | list)
        state = tuple(s[0] for s in hx) if pair else hx[0]
        outputs = []
        for t in range(x.shape[1]):  # one layer, batch first
            state = cell(x[:, t], state, *weights)
            outputs.append(state[0] if pair else state)
        last = tuple(s.unsqueeze(0) for s in state) if pair else (state.unsqueeze(0),)
        return (torch.stack(outputs, 1), *last)

    return run


_RECURRENT = SimpleNamespace(
    rnn_tanh=_layer(_tanh_cell), lstm=_layer(_lstm_cell), gru=_layer(_gru_cell),
    rnn_tanh_cell=_tanh_cell, lstm_cell=_lstm_cell, gru_cell=_gru_cell,
)  # fmt: skip


# ---- the definition -------------------------------------------------------------------------------------------------


def columns(loss: reference.LossFn, f: Tensor, y: Tensor, fisher: str) -> list[Tensor]:
    """Output derivatives of f's shape whose outer products sum to Λ, or to ∇∇ᵀ of the observed target; one datum.

    Those of different positions are apart.
    """
    flat = f.detach().reshape(-1, f.shape[-1])
    if fisher == "empirical":
        f = f.detach().requires_grad_()
        roots = [g.unsqueeze(0) for g in reference.gradient(loss(f, y), [f]).reshape(flat.shape)]
    else:
        Lambda = reference.output_hessian(loss, f, y).reshape(*flat.shape, *flat.shape)
        roots = []
        for t in range(len(flat)):
            values, vectors = torch.linalg.eigh(Lambda[t, :, t])
            roots.append((vectors * values.clamp(min=0).sqrt()).T)
    found = []
    for t, root in enumerate(roots):
        for column in root:
            u = torch.zeros_like(flat)
            u[t] = column
            found.append(u.reshape(f.shape))
    return found


@dataclass
class _Sum:
    A: Any = 0.0
    B: Any = 0.0
    terms: int = 0


def factors(p: Any, fisher: str = "exact", approx: str = "expand", joint: bool = False) -> list[dict[str, _Sum]]:
    """For each selected parameter the sums of each kind of use. `joint`: a 1 is appended to the inputs."""
    model, (x, y) = p.oracle_model(), p.data()
    loss, chosen = reference.problem_nll(p), reference.parameters(model, p.params)
    sums: list[dict[str, _Sum]] = [{} for _ in chosen]
    for n in range(reference.length(x)):
        f, found = uses(model, reference.one(x, n))
        us = columns(loss, f, y[n : n + 1], fisher)
        counts = (y[n] != -100).reshape(f.reshape(-1, f.shape[-1]).shape[0], -1)[:, 0].tolist()
        for parameter, total in zip(chosen, sums, strict=True):
            for kind in ("outer", "flipped", "lookup", "shift"):
                each = [use for use in found.get(id(parameter), []) if use.kind == kind]
                if each:
                    _add(total.setdefault(kind, _Sum()), each, f, us, counts, approx, joint)
    return sums


def _add(s: _Sum, each: list[Use], f: Tensor, us: list[Tensor], counts: list, approx: str, joint: bool) -> None:  # type: ignore
    kind = each[0].kind
    together = approx == "reduce" and kind != "lookup"
    T = 0
    for u in us:
        g = torch.cat([use.positions(_gradient(f, use.output, u)) for use in each])  # (T, G, O)
        T = len(g)
        for position in [g.sum(0)] if together else g:
            s.B = s.B + torch.stack([torch.outer(v, v) for v in position])
    kept = counts if len(counts) == T and len(counts) > 1 else [any(counts)] * T
    if kind == "shift":
        return
    a = torch.cat([use.a for use in each])[torch.tensor(kept)]
    if not len(a):
        return
    if kind == "lookup":
        s.A = s.A + torch.bincount(a, minlength=2**10).double()
    else:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if joint else a
        a = a.mean(0, keepdim=True) if together else a
        for position in a:
            s.A = s.A + torch.stack([torch.outer(v, v) for v in position])
    s.terms += len(a)


def _gradient(f: Tensor, output: Tensor, u: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(f, output, u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(output) if g is None else g


def block(kinds: dict[str, _Sum], shape: torch.Size) -> Tensor | None:
    """The block of one parameter; None where no use is a factor."""
    products = []
    for kind, s in kinds.items():
        B = s.B
        if kind == "shift":
            return B[0]
        if kind == "lookup":
            products.append(torch.kron(torch.diag(s.A[: shape[0]] / max(1, s.terms)), B[0]))
            continue
        A = s.A / max(1, s.terms)
        pairs = [(b, a) if kind == "outer" else (a, b) for b, a in zip(B, A, strict=True)]
        products.append(torch.block_diag(*(torch.kron(one, two) for one, two in pairs)))
    if len(products) < 2:
        return products[0] if products else None
    return nearest_kronecker(sum(products), shape[0], shape[1])  # type: ignore[arg-type]


def nearest_kronecker(M: Tensor, n: int, m: int) -> Tensor:
    """The Kronecker product of an n x n and an m x m matrix that is nearest to M (Van Loan & Pitsianis 1993)."""
    rows = M.reshape(n, m, n, m).permute(0, 2, 1, 3).reshape(n * n, m * m)
    U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    return torch.kron((S[0] * U[:, 0]).reshape(n, n), Vh[0].reshape(m, m))


def kfac(p: Any, exact: Tensor, fisher: str = "exact", approx: str = "expand") -> list[Tensor]:
    """The blocks of KFAC, one per parameter; the exact diagonal where a parameter is no factor."""
    chosen = reference.parameters(p.oracle_model(), p.params)
    blocks, start = [], 0
    for kinds, parameter in zip(factors(p, fisher, approx), chosen, strict=True):
        where = slice(start, start + parameter.numel())
        found = block(kinds, parameter.shape)
        blocks.append(exact[where, where].diagonal().diag() if found is None else found)
        start = where.stop
    return blocks
