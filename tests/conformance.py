"""Every interface class x method x setting x network: right to an oracle, or refused with advice.

`python tests/conformance.py` prints the tables of the README, from running code; with `--write` it puts them there.
ASDL's rows need `pip install '.[asdl]'`.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvops as co
from curvops.errors import NumericalWarning, UnsupportedError
from curvops.linalg.probes import resolve_seed
from curvops.nets.likelihoods import resolve
from curvops.testing.problems import Problem, problem

METHODS = ("jacobians", "last_layer_jacobians", "gradients", "full", "kron", "diag")
SETTINGS = ("plain", "last_layer", "subnetwork", "stochastic", "dict")
NATIVE = ("GGNInterface", "EFInterface", "HessianInterface")
CLASSES = (
    *NATIVE, "CurvlinopsGGN", "CurvlinopsEF", "CurvlinopsHessian", "BackPackGGN", "BackPackEF", "AsdlGGN", "AsdlEF",
    "AsdlHessian",
)  # fmt: skip
NETWORKS = (
    "mlp", "mlp-regression", "mlp-binary", "mlp-weighted", "mlp-ignored", "cnn", "conv2d-same", "batchnorm1d",
    "layernorm", "residual", "module-twice", "tied", "tokens", "keywords",
)  # fmt: skip
"""Those of the table; each stands for a kind of layer, of likelihood or of habit."""

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- conformance: python tests/conformance.py --write -->", "<!-- end of conformance -->"
N, SAMPLES = 9, 2


def installed(cls: str) -> bool:
    """Whether the class's library is there."""
    return not cls.startswith("Asdl") or importlib.util.find_spec("asdl") is not None


class Cell(NamedTuple):
    """One question and its answer.

    Attributes:
        verdict: "right", "refused", "wrong", or "unasked" where the question makes no sense.
        detail: The relative error, or the message.
    """

    verdict: str
    detail: str = ""


@cache
def cell(cls: str, method: str, network: str, setting: str = "plain") -> Cell:
    """Ask one class for one thing, and compare."""
    if setting == "stochastic" and not cls.endswith("GGN") and cls != "GGNInterface":
        return Cell("unasked")
    p = problem("dictionary" if setting == "dict" else network)
    try:
        model, params, options = _subject(p, method, setting)
    except UnsupportedError:
        return Cell("unasked")  # it has no linear last layer
    x, y = p.data()
    if not reference.parameters(model, params):
        return Cell("unasked")  # its last layer is frozen
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)
            backend = _made(cls, model, p, params, options)
            wanted = _wanted(_kind(cls), method, p.name, setting)
            if wanted is None and cls in NATIVE:
                _asked(backend, method, x, y)  # refuses, or answers what nothing here can judge
                return Cell("unasked")
            if wanted is None:
                wanted = _asked(_made(f"{_kind(cls)}Interface", model, p, params, options), method, x, y)
            found = _asked(backend, method, x, y)
    except UnsupportedError as error:
        return Cell("refused", str(error)) if _advises(str(error)) else Cell("wrong", f"no advice: {error}")
    except Exception as error:
        return Cell("wrong", f"{type(error).__name__}: {error}")
    if found.shape != wanted.shape:
        return Cell("wrong", f"shape {tuple(found.shape)} for {tuple(wanted.shape)}")
    error = reference.relative_error(found, wanted)
    return Cell("right" if error < 1e-9 else "wrong", f"{error:.1e}")


def _made(cls: str, model: nn.Module, p: Problem, params: Any, options: dict[str, Any]) -> Any:
    backend = getattr(co, cls)(model, p.loss(), **options, generator=_seeded())
    if isinstance(params, Tensor):
        backend.subnetwork_indices = params
    return backend


def _advises(message: str) -> bool:
    return any(word in message for word in ("use ", "Interface", "install", "give it"))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _kind(cls: str) -> str:
    return next(kind for kind in ("GGN", "EF", "Hessian") if kind in cls)


def _subject(p: Problem, method: str, setting: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model, which of its parameters count for the oracle, and the interface's options."""
    model, x = p.model(), p.data()[0]
    options: dict[str, Any] = {"dict_key_x": "a"} if p.name == "dictionary" else {}
    if setting == "stochastic":
        options |= {"stochastic": True, "num_samples": SAMPLES}
    if setting == "last_layer" or method == "last_layer_jacobians":
        extractor = co.FeatureExtractor(model)
        with torch.no_grad():
            extractor.find_last_layer(x)
        return extractor, "last_layer", options | ({"last_layer": True} if setting == "last_layer" else {})
    if setting == "subnetwork":
        indices = torch.tensor([3, 30, 0, 17, 22])
        return model, indices, options
    return model, None, options


def _asked(backend: Any, method: str, x: Any, y: Tensor) -> Tensor:
    if method.endswith("jacobians"):
        return getattr(backend, method)(x)[0]
    if method == "gradients":
        return backend.gradients(x, y)[0]
    operator = getattr(backend, method)(x, y, N=N)[1]
    return operator.diagonal() if method == "diag" else operator.to_dense()


# -------------------------------------------------------------------- oracles


@cache
def _wanted(kind: str, method: str, network: str, setting: str) -> Tensor | None:
    p = problem(network)
    model, params, _ = _subject(p, method, setting)
    return _oracle(kind, method, p, setting, model, params)


def _oracle(kind: str, method: str, p: Problem, setting: str, model: nn.Module, params: Any) -> Tensor | None:
    """By `reference`, in loops; None for Kronecker factors of layers whose definition is not written down here."""
    (x, y), loss = p.data(), reference.problem_nll(p)
    factor = resolve(p.loss()).factor
    if method.endswith("jacobians"):
        return reference.jacobian(model, x, params)
    if method == "diag" and kind != "GGN":
        dense = _wanted(kind, "full", p.name, setting)
        assert dense is not None
        return dense.diagonal()
    if method == "gradients":
        return reference.gradients(model, loss, x, y, params) / factor
    if method == "kron":
        return _kfac(kind, p, setting, model, params)
    if kind == "EF":
        dense = reference.empirical_fisher(model, loss, x, y, params) / factor
    elif kind == "Hessian":
        dense = reference.hessian(model, loss, x, y, params)
    elif setting == "stochastic":
        dense = reference.mc_fisher(model, x, _draws(p, reference.outputs(model, x).detach(), y), params)
    else:
        dense = reference.ggn(model, loss, x, y, params)
    return dense.diagonal() if method == "diag" else dense


def _draws(p: Problem, f: Tensor, y: Tensor) -> list[Tensor]:
    seed = resolve_seed(_seeded())
    draw = resolve(p.loss()).pseudo_gradients_at
    return [draw(f, y, seed=seed, position=0, sample=s) for s in range(SAMPLES)]


def _columns(kind: str, p: Problem, setting: str, f: Tensor, y: Tensor, i: int) -> list[Tensor]:
    """What is pulled back of datum i: vectors of its outputs' shape, those of every position apart."""
    loss, factor = reference.problem_nll(p), resolve(p.loss()).factor
    if setting == "stochastic":
        return [draw[i] / math.sqrt(SAMPLES) for draw in _draws(p, f, y)]
    f_i = f[i : i + 1].clone().requires_grad_()
    positions = f_i.reshape(-1, f.shape[-1]).shape[0]
    result = []
    for t in range(positions):
        here = torch.zeros(positions, f.shape[-1], dtype=f.dtype)
        if kind == "EF":
            here[t] = reference.gradient(loss(f_i, y[i : i + 1]), [f_i]).reshape(positions, -1)[t] / math.sqrt(factor)
            result.append(here.reshape(f[i].shape))
            continue
        C = f.shape[-1]
        Lambda = reference.output_hessian(loss, f_i, y[i : i + 1])[t * C : (t + 1) * C, t * C : (t + 1) * C]
        values, vectors = torch.linalg.eigh(Lambda)
        for value, vector in zip(values.clamp(min=0), vectors.T, strict=True):
            column = here.clone()
            column[t] = vector * value.sqrt()
            result.append(column.reshape(f[i].shape))
    return result


def _inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weight with, one row per position."""
    if isinstance(layer, nn.Conv2d):
        padded = F.pad(x, [1, 1, 1, 1]) if layer.padding == "same" else x  # of a kernel of three
        padding = 0 if layer.padding == "same" else layer.padding
        return F.unfold(padded, layer.kernel_size, layer.dilation, padding, layer.stride)[0].T
    if isinstance(layer, nn.Embedding):
        return F.one_hot(x.reshape(-1), layer.num_embeddings).double()
    return x.reshape(-1, x.shape[-1])


def _kfac(kind: str, p: Problem, setting: str, model: nn.Module, params: Any) -> Tensor | None:
    """KFAC ("expand") by its definition: one datum, one column, one position at a time; other layers diagonal."""
    if kind == "Hessian" or p.name == "tied" or isinstance(params, Tensor):
        return None
    x, y = p.data()
    tensors = reference.parameters(model, params)
    f = reference.outputs(model, x).detach()
    M = reference.length(x)
    exact = None
    blocks = []
    for name, layer in model.named_modules():
        own = [q for q in layer.parameters(recurse=False) if any(q is t for t in tensors)]
        if not own:
            continue
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            if exact is None:
                exact = _oracle(kind, "diag", p, setting, model, params)
            sizes = {n: q.numel() for n, q in model.named_parameters()}
            for n in (n for n in sizes if n.startswith(f"{name}.")):
                start = sum(size for before, size in sizes.items() if list(sizes).index(before) < list(sizes).index(n))
                assert exact is not None
                blocks.append(torch.diag(exact[start : start + sizes[n]]))
            continue
        A, B, terms = torch.zeros(()), torch.zeros(()), 0
        for i in range(M):
            seen: list[tuple[Tensor, Tensor]] = []
            handle = layer.register_forward_hook(lambda _, given, out, seen=seen: seen.append((given[0], out)))
            f_i = reference.outputs(model, reference.one(x, i))
            handle.remove()
            for given, out in seen:
                for column in _columns(kind, p, setting, f, y, i):
                    (g,) = torch.autograd.grad(f_i, out, column.reshape(f_i.shape), retain_graph=True)
                    for r in g.flatten(2)[0].T if isinstance(layer, nn.Conv2d) else g.reshape(-1, g.shape[-1]):
                        B = B + torch.outer(r, r)
                if bool((y[i] != -100).any()):
                    for a in _inputs(layer, given.detach()):
                        A, terms = A + torch.outer(a, a), terms + 1
        A = A / terms * M / N
        blocks.append(torch.kron(A, B) if isinstance(layer, nn.Embedding) else torch.kron(B, A))
        blocks += [B] * (len(own) - 1)
    return torch.block_diag(*blocks)


# -------------------------------------------------------------------- tables


def by_method(cls: str, networks: Iterable[str] = NETWORKS) -> list[str]:
    """How many networks a class is right on, of those it was asked about, for every method.

    The tied network's factors, a sum of Kronecker products, have no oracle here: of the native classes they are not
    asked, and those of others would be compared with the native ones.
    """
    texts = []
    for method in METHODS:
        verdicts = [cell(cls, method, network).verdict for network in networks]
        asked = [v for v in verdicts if v != "unasked"]
        right = asked.count("right")
        texts.append("all" if right == len(asked) else f"{right} of {len(asked)}" if right else "refused")
        if "wrong" in asked:
            raise AssertionError(f"{cls}.{method} is wrong on {list(networks)[verdicts.index('wrong')]}")
    return texts


def by_setting(cls: str) -> list[str]:
    """Which methods a class answers in every setting, on a small MLP (dict: two branches that are multiplied)."""
    texts = []
    for setting in SETTINGS:
        verdicts = {method: cell(cls, method, "mlp", setting).verdict for method in METHODS}
        if "wrong" in verdicts.values():
            raise AssertionError(f"{cls}, {setting}: {verdicts}")
        refused = [method for method, verdict in verdicts.items() if verdict == "refused"]
        unasked = all(verdict == "unasked" for verdict in verdicts.values())
        texts.append("" if unasked else "all but " + ", ".join(refused) if refused else "all")
    return texts


def rows(classes: Iterable[str] = CLASSES) -> list[str]:
    """Two lines of Markdown per class that is installed, for the two tables."""
    return [
        f"| `{cls}` | {' | '.join(texts)} |"
        for make in (by_method, by_setting)
        for cls in classes
        if installed(cls)
        for texts in (make(cls),)
    ]


def text() -> str:
    """Both tables."""
    lines = rows()
    half = len(lines) // 2
    first = ["", *(f"`{method}`" for method in METHODS)]
    second = ["", *(setting if setting in ("plain", "dict") else f"`{setting}`" for setting in SETTINGS)]
    tables = [
        "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *part])
        for heads, part in ((first, lines[:half]), (second, lines[half:]))
    ]
    return "\n\n".join(tables)


def in_readme() -> str:
    """The tables that the README holds."""
    page = README.read_text(encoding="utf-8")
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)].strip()


def main(arguments: list[str]) -> int:
    """Print, or write."""
    missing = [cls for cls in CLASSES if not installed(cls)]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    tables = text()
    if "--write" not in arguments:
        print(tables)
        return 0
    if missing:
        return 1
    page = README.read_text(encoding="utf-8")
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    README.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
