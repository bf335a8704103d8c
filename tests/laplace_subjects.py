"""What the comparisons with laplace-torch share: networks, loaders, and fitted approximations side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

N, B = 20, 7
"""Data, and data in a batch: the last one is smaller, so that M/N counts."""

SUBNETWORK = torch.tensor([3, 1, 17, 25, 20])

CELLS = [
    ("all", "full"), ("all", "kron"), ("all", "diag"),
    ("last_layer", "full"), ("last_layer", "kron"), ("last_layer", "diag"),
    ("subnetwork", "full"), ("subnetwork", "diag"),
]  # fmt: skip
"""`subset_of_weights` and `hessian_structure`: all that laplace-torch can do over weights."""


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """3-5-2, tanh; the same parameters at every call."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    drawn(model)
    return model.to(dtype)


def drawn(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with parameters from a private generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(p[0].numel(), 1) ** 0.5)
    return model.double()


def data(likelihood: str, n: int = N) -> tuple[Tensor, Tensor]:
    """x `(n, 3)`, and targets `(n, 2)` or classes 0 and 1."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    if likelihood == "regression":
        return x, torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (n,), generator=generator)


def loader(likelihood: str) -> DataLoader:
    """Batches of 7, 7 and 6."""
    return DataLoader(TensorDataset(*data(likelihood)), batch_size=B)


def fitted(backend: Any, likelihood: str, subset: str = "all", structure: str = "full", **options: Any) -> Any:
    """`laplace.Laplace(…)`, fitted."""
    from laplace import Laplace

    if subset == "subnetwork":
        options["subnetwork_indices"] = SUBNETWORK
    options = {"prior_precision": 0.7, **options}
    model = options.pop("model", None)
    batches = options.pop("loader", None)
    la = Laplace(
        network() if model is None else model, likelihood, subset_of_weights=subset, hessian_structure=structure,
        backend=backend, **options,
    )  # fmt: skip
    la.fit(loader(likelihood) if batches is None else batches)
    return la


def dense(H: Any) -> Tensor:
    """The matrix, or the diagonal, of what laplace-torch keeps."""
    return H.to_matrix() if hasattr(H, "to_matrix") else H


def close(got: Any, wanted: Any, rtol: float = 1e-6) -> None:
    """Equal within `rtol` of the largest entry; in tuples one by one."""
    if isinstance(wanted, tuple | list):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            close(one, other, rtol)
        return
    got, wanted = torch.as_tensor(got).detach(), torch.as_tensor(wanted).detach()
    assert got.shape == wanted.shape, f"{got.shape} and {wanted.shape}"
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    assert float((got - wanted).abs().max()) <= rtol * scale, f"{got} and {wanted}"
