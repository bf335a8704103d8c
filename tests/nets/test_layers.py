from __future__ import annotations

import copy

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint
from untouched import untouched

from curvops.errors import UnsupportedError
from curvops.nets.capture import Layers
from curvops.nets.factorblocks import block, gram
from curvops.nets.forward import Network
from curvops.nets.parameters import ParameterSelection
from curvops.nets.squares import SquareSums, with_squares
from curvops.testing.models import Apply
from curvops.testing.problems import Problem, problem, problems

WHOLE = [p for p in problems() if not isinstance(p.params, Tensor)]
EVERY = pytest.mark.parametrize("p", WHOLE, ids=lambda p: p.name)


def captured(p: Problem, K: int = 3, device: torch.device | str = "cpu"):
    model = p.model(device=device)
    x = p.data(device=device)[0]
    selection = ParameterSelection(model, p.params)
    layers = Layers(Network(model), selection)
    batch = layers.capture(x, reference.length(x))
    U = cotangents(batch.outputs, K)
    J = reference.jacobian(p.model(), p.data()[0], p.params)
    B, P = J.shape[0], J.shape[-1]
    rows = torch.einsum("bcp,bck->kbp", J.reshape(B, -1, P), U.cpu().reshape(B, -1, K)).to(device)
    return batch, batch.factors(U), rows.split(list(selection.sizes), dim=-1)


def cotangents(outputs: Tensor, K: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*outputs.shape, K, generator=generator, dtype=torch.float64).to(outputs.device)


def check(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    # Gradients that cancel exactly (a bias before InstanceNorm) are rounding on both sides: of the order of 1e-15.
    assert float((got - expected).norm()) <= 1e-12 * max(float(expected.norm()), 1.0)


@EVERY
def test_per_example_gradients(p, device):
    batch, factors, expected = captured(p, device=device)
    for i, (factor, rows) in enumerate(zip(factors, expected, strict=True)):
        if factor is None:
            assert i in batch.unused
            assert not rows.any()
            continue
        check(factor.per_example(), rows)
        check(factor.squares(), rows.square().sum((0, 1)))


@EVERY
def test_columns_in_turn(p, monkeypatch, device):
    monkeypatch.setattr("curvops.nets.layergraph._TOGETHER", 0)
    batch, factors, expected = captured(p, device=device)
    assert device.type != "cpu" or not batch.batched
    for factor, rows in zip(factors, expected, strict=True):
        check(rows.new_zeros(rows.shape) if factor is None else factor.per_example(), rows)


@pytest.mark.parametrize("call", [0, 2**13])
@EVERY
def test_squares_of_columns_that_come_in_steps(p, call, monkeypatch, device):
    monkeypatch.setattr("curvops.nets.squares._CALL", call)
    batch, _, expected = captured(p, K=5, device=device)
    first, second = cotangents(batch.outputs, 5).split([2, 3], -1)
    sums = SquareSums([rows.shape[-1] for rows in expected], batch.outputs)
    for _ in range(2):  # as of other examples
        sums.add(batch.factors(first), hold=3)
        sums.add(batch.factors(second), hold=3)
        sums.flush()
    for value, rows in zip(sums.values, expected, strict=True):
        check(value, 2 * rows.square().sum((0, 1)))


@pytest.mark.parametrize("entries", [2, 100])
def test_squares_of_columns_in_any_layout(entries):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(7, 100, entries, generator=generator, dtype=torch.float64)
    last = first.movedim(0, -1).contiguous().movedim(-1, 0)
    shared = torch.randn(7, entries, generator=generator, dtype=torch.float64).unsqueeze(1).expand(7, 100, entries)
    for columns in (first, last, shared):
        expected = columns.square().sum(0)
        total = with_squares(None, columns)
        check(total, expected)
        check(with_squares(total, columns), 2 * expected)


def test_a_hook_that_keeps_what_it_sees_keeps_tensors():
    kept: list[Tensor] = []
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(x: Tensor) -> Tensor:
        h = net[1](net[0](x))
        h.register_hook(kept.append)
        return net[2](h)

    model = Apply(forward)
    model.net = net
    x = torch.randn(5, 3, dtype=torch.float64)
    batch = Layers(Network(model), ParameterSelection(model)).capture(x, 5)
    batch.factors(cotangents(batch.outputs, 3))
    assert [g.sum().item() for g in kept]


def test_a_weight_and_its_bias_are_squared_once(monkeypatch):
    calls: list[tuple[int, ...]] = []

    def counted(total, columns):
        calls.append(tuple(columns.shape))
        return with_squares(total, columns)

    monkeypatch.setattr("curvops.nets.squares.with_squares", counted)
    batch, factors, _ = captured(problem("mlp"))
    SquareSums(batch.selection.sizes, batch.outputs).add(factors)
    assert len(calls) == len(factors) / 2


@EVERY
def test_blocks_and_inner_products(p, device):
    _, factors, expected = captured(p, device=device)
    present = [(f, rows) for f, rows in zip(factors, expected, strict=True) if f is not None]
    for f, rows in present:
        check(gram(f, f), torch.einsum("kbp,lcp->bkcl", rows, rows))
        for h, columns in present:
            check(block(f, h), torch.einsum("kbp,kbq->pq", rows, columns))


@EVERY
def test_only_scalars_without_rule_fall_back(p, device):
    batch, _, _ = captured(p, device=device)
    names = [batch.selection.names[i] for i in batch.fallback]
    assert names == (["scale"] if p.name == "raw-parameters" else [])


@EVERY
def test_the_users_things_stay(p):
    model, x = p.model(), p.data()[0]
    selection = ParameterSelection(model, p.params)
    with untouched(model):
        batch = Layers(Network(model), selection).capture(x, reference.length(x))
        batch.factors(torch.ones(*batch.outputs.shape, 2, dtype=torch.float64))


# ---- habits beyond the zoo -----------------------------------------------------------------------------------------


class Model(nn.Module):
    """Modules and parameters by keyword, and a function of them and x as the forward."""

    def __init__(self, function, **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.zeros(part)))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _cross_attention(m, x):
    return m.attention(x[:, :1], torch.sin(x), torch.cos(x))[0][:, 0]


def _positions(m, x):
    return m.head(torch.tanh(m.token(x) + m.position(torch.arange(x.shape[1], device=x.device)))).sum(1)


def _class_token(m, x):
    h = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position
    return m.head(torch.tanh(h))[:, 0]


def _routed(m, x):
    left = x[:, 0] > 0
    h = torch.zeros_like(x)
    h = h.index_put((left.nonzero()[:, 0],), m.a(x[left])).index_put(((~left).nonzero()[:, 0],), m.b(x[~left]))
    return m.head(torch.tanh(h))


def _frames(m, x):  # (B, frames, C, H, W): the frames fold into the batch
    h = torch.tanh(m.conv(x.flatten(0, 1))).mean((2, 3)).unflatten(0, x.shape[:2])
    return m.head(h).sum(1)


def _time_first(m, x):
    return m.head(torch.tanh(m.body(x.transpose(0, 1)))).sum(0)


class Cube(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def _shared_rows(m, x):  # a projection of a constant, broadcast to the examples
    grid = torch.linspace(-1, 1, 6, dtype=x.dtype, device=x.device).reshape(3, 2)
    return m.head(torch.tanh(x + m.project(grid).unsqueeze(0))).sum(1)


EXTRA = {
    "cross-attention": (Model(_cross_attention, attention=nn.MultiheadAttention(4, 2, batch_first=True)), (5, 3, 4)),
    "attention-bias-kv": (
        Model(_cross_attention, attention=nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True, batch_first=True)),
        (5, 3, 4),
    ),
    "positions": (Model(_positions, token=nn.Embedding(5, 3), position=nn.Embedding(4, 3), head=nn.Linear(3, 2)), 4),
    "class-token": (Model(_class_token, token=(1, 1, 3), position=(1, 4, 3), head=nn.Linear(3, 2)), (5, 3, 3)),
    "routed": (Model(_routed, a=nn.Linear(3, 3), b=nn.Linear(3, 3), head=nn.Linear(3, 2)), (7, 3)),
    "frames": (Model(_frames, conv=nn.Conv2d(2, 3, 2), head=nn.Linear(3, 2)), (5, 3, 2, 3, 3)),
    "time-first": (Model(_time_first, body=nn.Linear(3, 4), head=nn.Linear(4, 2)), (5, 3, 3)),
    "shared-rows": (Model(_shared_rows, project=nn.Linear(2, 3), head=nn.Linear(3, 2)), (5, 3, 3)),
    "own-function": (
        Model(
            lambda m, x: m.head(Cube.apply(m.body(x.transpose(0, 1)) + m.position).transpose(0, 1)).sum(1),
            body=nn.Linear(3, 4),
            position=(3, 1, 4),
            head=nn.Linear(4, 2),
        ),
        (5, 3, 3),
    ),
    "own-function-positions": (
        Model(
            lambda m, x: m.head(Cube.apply(m.token(x) + m.position(torch.arange(x.shape[1], device=x.device)))).sum(1),
            token=nn.Embedding(5, 3),
            position=nn.Embedding(4, 3),
            head=nn.Linear(3, 2),
        ),
        4,
    ),
    "einsum": (Model(lambda m, x: torch.einsum("bti,io->bo", x, m.W), W=(3, 2)), (5, 3, 3)),
    "left-product": (Model(lambda m, x: torch.tanh(m.W @ x.T).T, W=(2, 3)), (5, 3)),
    "scaled-bias": (Model(lambda m, x: x * m.s + m.b, s=(3,), b=(3,)), (5, 3)),
    "channel-scale": (Model(lambda m, x: (x * m.s + m.b).sum((2, 3)), s=(2, 1, 1), b=(2, 1, 1)), (5, 2, 3, 3)),
    "table-seen-otherwise": (
        Model(lambda m, x: torch.tanh(nn.functional.embedding(x, m.W.view(5, 2))).sum(1), W=(2, 5)),
        3,
    ),
    "kernel-seen-otherwise": (
        Model(lambda m, x: torch.tanh(nn.functional.conv1d(x, m.W.view(4, 1, 3), groups=2)).flatten(1), W=(4, 3)),
        (5, 2, 4),
    ),
    "grouped-transpose": (
        nn.Sequential(nn.ConvTranspose1d(4, 6, 3, 2, padding=1, output_padding=1, groups=2, dilation=2), nn.Flatten()),
        (4, 4, 3),
    ),
    "strided-dilated": (nn.Sequential(nn.Conv2d(2, 4, (2, 3), (2, 1), (1, 2), (1, 2), 2), nn.Flatten()), (4, 2, 4, 5)),
    "transpose3d": (nn.Sequential(nn.ConvTranspose3d(2, 1, (1, 2, 2)), nn.Flatten()), (3, 2, 2, 2, 1)),
    "weight-norm": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Tanh(), nn.PReLU()),
        (5, 3),
    ),
    "bilinear": (Model(lambda m, x: m.pair(x, torch.sin(x)), pair=nn.Bilinear(2, 2, 3)), (5, 2)),
    "lstm-two-ways": (
        Model(lambda m, x: m.lstm(x)[0][:, 0], lstm=nn.LSTM(2, 2, 2, batch_first=True, bidirectional=True)),
        (5, 3, 2),
    ),
    "rnn-cell": (Model(lambda m, x: m.cell(x[:, 1], m.cell(x[:, 0])), cell=nn.GRUCell(2, 2)), (5, 2, 2)),
    "transformer-prenorm": (
        Model(
            lambda m, x: m.layer(x).flatten(1),
            layer=nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=True, activation="gelu"),
        ),
        (5, 3, 4),
    ),
}
FALLBACK = {"weight-norm": 3, "bilinear": 1, "routed": 4, "own-function": 1}


@pytest.mark.parametrize("name", EXTRA)
def test_per_example_gradients_beyond_the_zoo(name, device):
    model, shape = EXTRA[name]
    generator = torch.Generator().manual_seed(5)
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for q in model.parameters():
            q.copy_(torch.randn(q.shape, generator=generator, dtype=torch.float64))
    if isinstance(shape, int):
        x = torch.randint(5, (6, shape), generator=generator)
    else:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    J = reference.jacobian(model, x)  # PyTorch's kernels on accelerators lose digits of weight norm's derivative
    model, x = model.to(device), x.to(device)
    selection = ParameterSelection(model)
    with untouched(model):
        batch = Layers(Network(model), selection).capture(x, reference.length(x))
        U = torch.randn(*batch.outputs.shape, 2, generator=generator, dtype=torch.float64).to(device)
        factors = batch.factors(U)
    rows = torch.einsum("bcp,bck->kbp", J, U.cpu()).to(device)
    for factor, expected in zip(factors, rows.split(list(selection.sizes), -1), strict=True):
        assert factor is not None
        check(factor.per_example(), expected)
        check(factor.squares(), expected.square().sum((0, 1)))
        check(block(factor, factor), torch.einsum("kbp,kbq->pq", expected, expected))
    assert len(batch.fallback) == FALLBACK.get(name, 0)


def test_examples_that_mix_are_refused():
    model = Model(lambda m, x: m.body(x - x.mean(0)), body=nn.Linear(3, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match="depend on the other examples"):
        Layers(Network(model), ParameterSelection(model)).capture(x, reference.length(x))


def test_a_second_batch_of_another_structure_is_examined_anew():
    model = Model(
        lambda m, x: m.body(torch.tanh(m.body(x))) if x.shape[0] > 4 else m.body(x), body=nn.Linear(2, 2)
    ).double()
    layers = Layers(Network(model), ParameterSelection(model))
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert layers.capture(x, 4).fallback == []
    with pytest.raises(UnsupportedError, match="depend on the other examples"):
        layers.capture(torch.cat([x, x]), 8)
    with pytest.raises(UnsupportedError, match="depend on the other examples"):
        Layers(Network(model), ParameterSelection(model)).capture(torch.cat([x, x]), 8)


def test_a_first_batch_that_tells_nothing_decides_nothing():
    # Inside attention the positions come first and the examples last; one example alone does not show it.
    p = problem("multihead-attention")
    model, (x, _) = p.model(), p.data()
    layers = Layers(Network(model), ParameterSelection(model))
    for rows in (slice(0, 1), slice(1, 4), slice(0, 4), slice(3, 4)):
        batch = layers.capture(x[rows], len(x[rows]))
        U = torch.ones(*batch.outputs.shape, 1, dtype=torch.float64)
        J = reference.jacobian(model, x[rows]).sum(1, keepdim=True).movedim(1, 0)
        got = torch.cat([f.per_example() for f in batch.factors(U) if f is not None], -1)
        check(got, J)


def test_rows_sorted_by_the_data_are_not_taken_for_examples_in_order():
    def forward(m, x):  # as many rows as examples, in an order that each batch decides
        order = x[:, 0].argsort()
        return m.head(torch.tanh(m.body(x[order]))[order.argsort()])

    model = Model(forward, body=nn.Linear(2, 3), head=nn.Linear(3, 2)).double()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:2] = x[:2][x[:2, 0].argsort()]  # the first two are in order, the others are not
    batch = Layers(Network(model), ParameterSelection(model)).capture(x, 6)
    U = torch.ones(6, 2, 1, dtype=torch.float64)
    J = reference.jacobian(model, x).sum(1, keepdim=True).movedim(1, 0)
    check(torch.cat([f.per_example() for f in batch.factors(U) if f is not None], -1), J)
    assert batch.fallback == []


@pytest.mark.parametrize("size", [2, 4, 7])
def test_examples_that_mix_in_pairs_are_refused(size):
    def forward(m, x):  # the first two make a pair of their own, among themselves and among all
        h = torch.tanh(m.body(x))
        h = torch.cat([h, h.new_zeros(len(x) % 2, 4)]).reshape(-1, 2, 4)
        return m.head((h + h.flip(1)).reshape(-1, 4)[: len(x)])

    model = Model(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2)).double()
    x = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match="depend on the other examples"):
        Layers(Network(model), ParameterSelection(model)).capture(x, size)


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("positions", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_rows_shared_by_all_are_told_from_rows_of_examples_when_only_one_counts(size, positions, at):
    # Of the table's rows an example reaches one, which may be where its own would lie.
    model = Model(
        lambda m, x: m.head(torch.tanh(m.body(x) + m.table(torch.arange(x.shape[1])))[:, at]),
        body=nn.Linear(3, 4), table=nn.Embedding(positions, 4), head=nn.Linear(4, 2),
    ).double()  # fmt: skip
    x = torch.randn(size, positions, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = Layers(Network(model), ParameterSelection(model)).capture(x, size)
    U = torch.ones(size, 2, 1, dtype=torch.float64)
    J = reference.jacobian(model, x).sum(1, keepdim=True).movedim(1, 0)
    check(torch.cat([f.per_example() for f in batch.factors(U) if f is not None], -1), J)


def _strided(h: Tensor, n: int, d: int) -> Tensor:
    return h.as_strided((len(h) // n, n, d), (d, len(h) // n * d, 1)).reshape(h.shape)


DEALT = {
    "views": lambda h, n: h.reshape(n, -1, h.shape[-1]).transpose(0, 1).reshape(h.shape),
    "strides": lambda h, n: _strided(h, n, h.shape[-1]),
    "chunks": lambda h, n: torch.stack(h.chunk(n), 1).flatten(0, 1),
    "a product": lambda h, n: torch.eye(len(h), dtype=h.dtype).reshape(n, -1, len(h)).transpose(0, 1).flatten(0, 1) @ h,
}  # fmt: skip


@pytest.mark.parametrize("size", [4, 6, 40])
@pytest.mark.parametrize("way", DEALT)
@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
def test_examples_dealt_anew_by_their_number(activation, way, size):
    # Of two or three examples all lie in order. ReLU leaves rows that no gradient goes through.
    deal = DEALT[way]
    model = Model(
        lambda m, x: (
            m.head(activation(m.body(x)))
            if len(x) < 4
            else deal(m.head(activation(m.body(deal(x.contiguous(), 2)))).contiguous(), len(x) // 2)
        ),
        body=nn.Linear(3, 2),
        head=nn.Linear(2, 2),
    ).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, dtype=torch.float64, generator=generator)
    U = torch.randn(size, 2, 2, generator=generator, dtype=torch.float64)
    batch = Layers(Network(model), ParameterSelection(model)).capture(x, size)
    J = torch.einsum("bcp,bck->kbp", reference.jacobian(model, x), U)
    check(torch.cat([f.per_example() for f in batch.factors(U) if f is not None], -1), J)
    assert batch.fallback == []


# Two of the examples, beside all, have the outputs that they have among all, and depend on the others nonetheless.
UNSEEN = {
    "turned round": (lambda m, x: m.head(torch.tanh(m.body(x) + m.body(x).flip(0))), 4),
    "scaled by the largest": (lambda m, x: m.head(m.body(x) / m.body(x).abs().max()), 5),
    "in their derivatives alone": (lambda m, x: m.head(torch.tanh(m.body(x) + _centre(m.body(x)))), 5),
    "in pairs from the end": (lambda m, x: m.head(torch.tanh(m.body(x) + _partners(m.body(x)))), 5),
    "moved round": (lambda m, x: m.head(torch.tanh(m.body(x.roll(1, 0) * 1.0)).roll(-1, 0)), 5),
}


def _centre(h: Tensor) -> Tensor:
    return h.mean(0) - h.mean(0).detach()


def _partners(h: Tensor) -> Tensor:
    first = len(h) % 2
    return torch.cat([h[:first], h[first:].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)])


@pytest.mark.parametrize("name", UNSEEN)
def test_what_two_examples_do_not_show_is_not_trusted(name):
    function, size = UNSEEN[name]
    model = Model(function, body=nn.Linear(3, 4), head=nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for q in model.parameters():
            q.copy_(torch.randn(q.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(size, 3, dtype=torch.float64, generator=generator)
    if name == "scaled by the largest":
        x[2] *= 10  # of those looked at
    try:
        batch = Layers(Network(model), ParameterSelection(model)).capture(x, size)
    except UnsupportedError as error:
        assert "depend on the other examples" in str(error)  # noqa: PT017  (else the numbers are the right ones)
        return
    if name == "in their derivatives alone":  # of an example alone they are others than of the batch
        assert batch.fallback[:2] == [0, 1]
        return
    U = torch.randn(size, 2, 3, generator=generator, dtype=torch.float64)
    f, tensors = model(x), list(model.parameters())
    rows = [[reference.gradient((f[n] * U[n, :, k]).sum(), tensors) for n in range(size)] for k in range(3)]
    expected = torch.stack([torch.stack(row) for row in rows])  # of the batch as a whole, since examples may meet in it
    check(torch.cat([f.per_example() for f in batch.factors(U) if f is not None], -1), expected)


@pytest.mark.parametrize("few", [True, False])
def test_checkpoints_run_again_in_the_only_pass(few):
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True, activation="gelu")
    plain = Model(lambda m, x: m.head(m.layer(x)).sum(1), layer=layer, head=nn.Linear(4, 2)).double().eval()
    model = Model(
        lambda m, x: m.head(checkpoint(m.layer, x, use_reentrant=False)).sum(1), layer=plain.layer, head=plain.head
    ).eval()
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        batch = Layers(Network(model), ParameterSelection(model), few=few).capture(x, size)
        U = torch.ones(size, 2, 1, dtype=torch.float64)
        factors = batch.factors(U, last=True)
        J = reference.jacobian(plain, x).sum(1, keepdim=True).movedim(1, 0)
        check(torch.cat([f.per_example() for f in factors if f is not None], -1), J)


def test_a_failure_leaves_nothing_for_the_next_batch():
    model = Model(lambda m, x: m.body(torch.tanh(x)).sum(1), body=nn.Linear(3, 2)).double()
    for size in (2, 5):
        layers = Layers(Network(model), ParameterSelection(model))
        x = {T: torch.randn(size, T, 3, dtype=torch.float64) for T in (2, 3)}
        layers.learn(x[2], size)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            layers.capture(x[2][..., :2], size)
        for T in (3, 2):
            assert layers.capture(x[T], size).fallback == []
