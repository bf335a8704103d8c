"""The same products by other libraries: name → a function of one vector, for each that is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

Product = Callable[[Tensor], Any]


def summed_loss(f: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy summed over data and positions."""
    return nn.functional.cross_entropy(f.reshape(-1, f.shape[-1]), y.reshape(-1), reduction="sum")


class Flat(nn.Module):
    """Positions as data: `(B, T, C)` → `(B·T, C)`, which is what the peers take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, -2)


def products(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> dict[str, Product]:
    """`"library: curvature"` → product with it on one batch, whatever the peer needs set up already."""
    model, y = Flat(model), y.reshape(-1)
    parameters = list(model.parameters())
    made: dict[str, Product] = {"torch.func: GGN": _torch_func(model, x)}
    if importlib.util.find_spec("curvlinops"):
        made.update(_curvlinops(model, parameters, x, y, seed))
    if importlib.util.find_spec("backpack"):
        made["BackPACK: GGN"] = _backpack(model, parameters, x, y)
    return made


def _split(v: Tensor, like: list[Any]) -> list[Tensor]:
    pieces = v.split([p.numel() for p in like])
    return [t.view_as(p) for t, p in zip(pieces, like, strict=True)]


def _curvlinops(model: nn.Module, parameters: list[Any], x: Tensor, y: Tensor, seed: int) -> dict[str, Product]:
    import curvlinops

    kinds = {"GGN": "GGNLinearOperator", "MC Fisher": "FisherMCLinearOperator", "EF": "EFLinearOperator",
             "Hessian": "HessianLinearOperator"}  # fmt: skip
    made: dict[str, Product] = {}
    # Its batch size is that of x, which is not the number of rows of y where positions are data.
    for name, kind in kinds.items():
        more = {"seed": seed} if kind.startswith("FisherMC") else {}
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            operator = getattr(curvlinops, kind)(
                model, nn.CrossEntropyLoss(reduction="sum"), parameters, [(x, y)], check_deterministic=False,
                num_data=x.shape[0], **more,
            )  # fmt: skip
        made[f"curvlinops: {name}"] = _math_attention(lambda v, operator=operator: operator @ v)
    return made


def _backpack(model: nn.Module, parameters: list[Any], x: Tensor, y: Tensor) -> Product:
    from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist

    def product(v: Tensor) -> Any:
        f = model(x)
        return ggn_vector_product_from_plist(summed_loss(f, y), f, parameters, _split(v, parameters))

    return _math_attention(product)


def _torch_func(model: nn.Module, x: Tensor) -> Product:
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())

    def outputs(*parameters: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    def product(v: Tensor) -> Any:
        f, tangent = jvp(outputs, values, tuple(_split(v, list(values))))
        p = f.softmax(-1)
        weighted = p * (tangent - (p * tangent).sum(-1, keepdim=True))
        return vjp(outputs, *values)[1](weighted)

    return _math_attention(product)


def _math_attention(product: Product) -> Product:
    def guarded(v: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return product(v)

    return guarded
