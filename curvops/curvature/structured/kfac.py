"""KFAC: one Kronecker product per weight, its factors from the layers' inputs and output derivatives."""

from __future__ import annotations

from typing import Protocol

from curvops.curvature.structured.factored import Factored, Source, Sums
from curvops.curvature.structured.statistics import Statistics
from curvops.errors import ShapeError
from curvops.operators.base import LinearOperator


class KFAC(Factored):
    """Kronecker-factored curvature (Martens & Grosse 2015), block-diagonal over the parameters in their order.

    A weight of a layer that computes `W a` has the block B ⊗ A, its bias B; an embedding (num, dim) A ⊗ B, A diagonal;
    grouped convolutions have one product per group. All uses of a parameter enter its factors. A parameter that is no
    factor of a product (norm layers, scales, whatever no rule covers) has an exact block; so has one
    where it is not certain whose some of its inputs are, if not all count alike (ignored targets, approx="reduce").
    A factor that is a sum over fewer vectors than three quarters of its width (a layer wider than the batch) is kept as
    these, `LowRank`: nothing of its width squared is formed by any verb but `to_dense`.

    Args:
        model, likelihood, data, options: As for `GGN`; `params` by flat indices is refused.
        fisher, approx, fallback, weight_and_bias, num_samples, generator, datum, tokens: As for `Factored`.

    Scale: a sum over the data; B sums, A averages.

    Cost: one forward, C backward passes through the activations (one for "mc" with one sample; no more behind a linear
    last layer than it has inputs), O(d²) per position and layer of width d; a decomposition takes O(d³) per factor, or
    O(d·n²) for one of n vectors. Nothing is computed before it is needed.
    """

    source: _Statistical

    def _from(self, sums: Sums) -> Source:
        return _OfSums(sums)

    def statistics(self) -> list[list[Statistics]]:
        """The sums that the factors are made of, one per block (two where weight and bias turned out to be apart)."""
        return self.source.statistics()

    def merge(self, other: KFAC) -> KFAC:
        """The KFAC of both data sets: factors accumulated, not operators added.

        B adds, A becomes the average over the terms of both, so that the factors of mini-batches merge to those of the
        whole set (Ritter et al. 2018 average otherwise; see `fraction`).

        Raises:
            ShapeError: Other parameters, or other options.
        """
        if not isinstance(other, KFAC) or _names(other) != _names(self) or other.sizes != self.sizes:
            raise ShapeError(
                f"merge: expected a KFAC of the same parameters and the same blocks as {self!r}, got {other!r}."
            )
        if (other.dtype, other.device) != (self.dtype, self.device):
            raise ShapeError(
                f"merge: one is of {self.dtype} on {self.device}, the other of {other.dtype} on {other.device}; move "
                "one of the two models and its data."
            )
        return self._over(_Merged(self.source, other.source))

    def fraction(self, num_data: int, batch: int, scale: float = 1.0) -> KFAC:
        """With A multiplied by batch / num_data: mini-batch factors, plainly added, then give the whole set's.

        `merge` of such adds both factors without another average. `scale` multiplies the curvature, in B.

        Raises:
            ValueError: Numbers of which the factors would be no second moments.
        """
        if not (num_data > 0 and batch > 0 and scale >= 0):
            raise ValueError(
                f"fraction({num_data}, {batch}, {scale}): expected numbers of data above 0 and a scale of at least 0; "
                "another multiple is that of the curvature."
            )
        return self._over(_Fraction(self.source, batch / num_data, scale))

    def _over(self, source: _Statistical) -> KFAC:
        result = KFAC.__new__(KFAC)
        result._fill(source, self._sums, watched=False)
        return result


def _names(curvature: KFAC) -> tuple[str, ...]:
    return curvature._sums.objective.selection.names


class _Statistical(Source, Protocol):
    def statistics(self) -> list[list[Statistics]]: ...


class _FromStatistics:
    """Blocks by `statistics()`."""

    def statistics(self) -> list[list[Statistics]]:
        raise NotImplementedError

    def operators(self, number: int) -> list[LinearOperator]:
        return [one.operator() for one in self.statistics()[number]]


class _OfSums(_FromStatistics):
    def __init__(self, sums: Sums) -> None:
        self.sums = sums

    def statistics(self) -> list[list[Statistics]]:
        return self.sums.statistics()

    def forget(self) -> None:
        self.sums.forget()

    def note(self, number: int) -> str | None:
        return self.sums.note(number)


class _Merged(_FromStatistics):
    def __init__(self, one: _Statistical, two: _Statistical) -> None:
        self.one, self.two = one, two
        self._found: list[list[Statistics]] | None = None

    def statistics(self) -> list[list[Statistics]]:
        if self._found is None:
            self._found = [
                _merged(mine, theirs) for mine, theirs in zip(self.one.statistics(), self.two.statistics(), strict=True)
            ]
        return self._found

    def forget(self) -> None:
        self._found = None

    def note(self, number: int) -> str | None:
        return self.one.note(number)


class _Fraction(_FromStatistics):
    def __init__(self, source: _Statistical, share: float, scale: float) -> None:
        self.source, self.share, self.scale = source, share, scale

    def statistics(self) -> list[list[Statistics]]:
        return [[one.averaged(self.share, self.scale) for one in unit] for unit in self.source.statistics()]

    def forget(self) -> None:
        self.source.forget()

    def note(self, number: int) -> str | None:
        return self.source.note(number)


def _merged(mine: list[Statistics], theirs: list[Statistics]) -> list[Statistics]:
    if len(mine) != len(theirs):
        raise ShapeError(
            "merge: a weight and its bias make one matrix in one of the two, and are apart in the other; build both "
            'with weight_and_bias="separate", or one KFAC over all the data.'
        )
    return [a.plus(b) for a, b in zip(mine, theirs, strict=True)]
