from __future__ import annotations

import pytest
import reference
import torch
from torch import nn
from untouched import untouched

from curvops.errors import StaleOperatorError
from curvops.nets.watch import Content, Watch, snapshot
from curvops.testing.problems import problem, problems


def network() -> nn.Module:
    return problem("batchnorm1d").model()


@pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
def test_nothing_changed(p):
    model, (x, y) = p.model(), p.data()
    tensors = [("y", y)] + ([("x", x)] if isinstance(x, torch.Tensor) else [])
    with untouched(model):
        watch = Watch(model, tensors)
        assert watch.check() is False
        watch.check_content()


class TestReal:
    """Changes that matter raise, and the message names them."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda m: m[0].weight.data.add_(1.0), "parameter '0.weight' changed value"),
            (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())), "'0.weight' was replaced"),
            (lambda m: setattr(m[0].weight, "data", m[0].weight.data + 1), "'0.weight' changed value"),
            (lambda m: m[3].bias.requires_grad_(False), "'3.bias' changed requires_grad"),
            (lambda m: m.float(), "changed dtype"),
            (lambda m: m.train(), r"module '\(the model itself\)' went to train mode.*\.eval\(\)"),
            (lambda m: m[1].train(), "module '1' went to train mode"),
            (lambda m: m[1].running_mean.add_(1.0), "buffer '1.running_mean' changed value"),
            (lambda m: m.__setitem__(2, nn.ReLU()), "submodules of .* were replaced"),
            (lambda m: m.append(nn.ReLU()), "submodules of .* were replaced"),
        ],
    )
    def test_is_seen_by_one_of_the_two_watches(self, change, words):
        model = network()
        watch = Watch(model)
        with torch.no_grad():
            change(model)
        with pytest.raises(StaleOperatorError, match=words):  # noqa: PT012
            watch.check()
            watch.check_content()

    def test_optimiser_step_is_seen_by_the_cheap_watch(self):
        model = network()
        watch = Watch(model)
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with pytest.raises(StaleOperatorError, match="changed value"):
            watch.check()

    def test_numpy_view_is_seen_by_the_thorough_watch(self):
        model = network()
        watch = Watch(model)
        model[0].weight.detach().numpy()[0, 0] += 1.0
        assert watch.check() is False
        with pytest.raises(StaleOperatorError, match=r"'0\.weight' changed value.*snapshot=True"):
            watch.check_content()

    def test_vector_to_parameters(self):
        model = network()
        watch = Watch(model)
        vector = nn.utils.parameters_to_vector(model.parameters()).detach()
        nn.utils.vector_to_parameters(vector * 2, model.parameters())
        with pytest.raises(StaleOperatorError, match="changed value"):
            watch.check()

    def test_data(self):
        x = torch.zeros(3)
        watch = Watch(network(), [("x of batch 0", x)])
        x[1] = 1.0
        with pytest.raises(StaleOperatorError, match="data tensor x of batch 0 was written to"):
            watch.check()

    def test_many_changes_are_summarised(self):
        model = network()
        watch = Watch(model)
        for p in model.parameters():
            p.data.add_(1.0)
        with pytest.raises(StaleOperatorError, match="and 2 more changed value"):
            watch.check_content()


class TestHarmless:
    def test_same_content_written_again_reports_the_touch_once(self):
        model = network()
        watch = Watch(model)
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
        assert watch.check() is True
        assert watch.check() is False
        watch.check_content()

    def test_data_that_moved(self):
        model = network()
        watch = Watch(model)
        model[0].weight.data = model[0].weight.data.clone()
        assert watch.check() is True
        assert watch.check() is False

    def test_gradients_are_no_change(self):
        model = network()
        watch = Watch(model)
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        assert watch.check() is False
        watch.check_content()


class TestContent:
    """Large tensors are summed, not copied: every kind of change must still show."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool])
    def test_one_entry(self, dtype):
        t = torch.zeros(70, 1000).to(dtype)
        content = Content([torch.ones(2), t])
        assert content.changed() == []
        for position in ((0, 0), (35, 501), (69, 999)):
            t[position] = 1
            assert content.changed() == [1]
            t[position] = 0
            assert content.changed() == []

    def test_the_last_bit(self):
        t = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
        content = Content([t])
        t[50, 50] = torch.nextafter(t[50, 50], torch.tensor(10.0))
        assert content.changed() == [0]

    @pytest.mark.parametrize("shape", [(100, 100), (1024, 1024), (1021, 1021), (5000,), (4096, 4)])
    def test_permutations(self, shape):
        t = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        content = Content([t])
        original = t.clone()
        permutations = [original.flip(0), original.roll(1, 0), original.reshape(-1).flip(0).reshape(shape)]
        if len(shape) == 2:
            permutations += [original.flip(1), original.roll(1, 1)]
        if len(shape) == 2 and shape[0] == shape[1]:
            permutations.append(original.T)
        for permuted in permutations:
            t.copy_(permuted)
            assert content.changed() == [0]
        t.copy_(original)
        assert content.changed() == []

    def test_swaps(self):
        g = torch.Generator().manual_seed(0)
        t = torch.randn(300_000, generator=g)
        content = Content([t])
        for _ in range(200):
            i, j = torch.randint(len(t), (2,), generator=g).tolist()
            t[i], t[j] = t[j].clone(), t[i].clone()
            assert (content.changed() == []) == (i == j)
            t[i], t[j] = t[j].clone(), t[i].clone()

    @pytest.mark.parametrize("width", [1024, 1021, 2045])
    def test_identity_against_its_mirror_image(self, width):
        # Row and column sums of a permutation matrix are all ones; the strides must not fall into step with the rows.
        t = torch.eye(width)
        content = Content([t])
        t[[0, 1]] = t[[1, 0]]
        assert content.changed() == [0]

    def test_sign_of_zero_and_nan(self):
        t = torch.zeros(10_000)
        t[3] = float("nan")
        content = Content([t, t[:100]])
        assert content.changed() == []
        t[5] = -0.0
        assert content.changed() == [0, 1]

    def test_strided(self):
        t = torch.randn(100, 200, generator=torch.Generator().manual_seed(0)).T
        content = Content([t])
        assert content.changed() == []
        t[3, 4] += 1
        assert content.changed() == [0]

    @pytest.mark.parametrize("size", [3, 5000])
    @pytest.mark.parametrize("other", [torch.ones(1), torch.zeros(7000), torch.zeros(3, dtype=torch.float64)])
    def test_another_size_until_it_is_put_back(self, size, other):
        t, beside = torch.zeros(size), torch.zeros(4)
        content, original = Content([t, beside]), t.data
        t.data = other
        beside += 1
        assert content.changed() == content.changed() == content.changed() == [0]
        t.data = original.clone()
        assert content.changed() == content.changed() == [1]
        beside -= 1
        assert content.changed() == content.changed() == []

    @pytest.mark.parametrize("view", [torch.conj, lambda t: t.conj().imag, torch.real])
    def test_views_of_complex_numbers(self, view):
        t = torch.randn(10, dtype=torch.complex64)
        content = Content([view(t)])
        assert content.changed() == []
        before = t[3].clone()
        t[3] += 1 + 1j
        assert content.changed() == [0]
        t[3] = before
        assert content.changed() == []

    def test_another_shape(self):
        t = torch.randn(4, 6)
        content = Content([t])
        t.data = t.data.view(6, 4)
        assert content.changed() == [0]
        t.data = t.data.view(4, 6)
        assert content.changed() == []

    @pytest.mark.parametrize(("side", "most"), [(500, 2**18), (1000, 2 * (1024 + 1021))])
    def test_memory_is_bounded(self, side, most):
        content = Content([torch.zeros(side, side)])
        assert content.changed() == []
        assert content._copies is None
        assert sum(kept.numel() for kept in content._kept) <= most

    @pytest.mark.parametrize("side", [500, 1000])
    def test_a_change_before_the_first_comparison(self, side):
        t, beside = torch.zeros(side, side), torch.zeros(3)
        content = Content([beside, t])
        t.view(-1)[-1] = 1
        assert content.changed() == [1]
        t.data = torch.zeros(side, side)
        assert content.changed() == []


class TestSnapshot:
    @pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
    def test_same_function_other_storage(self, p):
        model, (x, _) = p.model(), p.data()
        with untouched(model):
            copy = snapshot(model)
        assert [n for n, _ in copy.named_parameters()] == [n for n, _ in model.named_parameters()]
        for a, b in zip(model.parameters(), copy.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
            assert a.requires_grad == b.requires_grad
        for a, b in zip(model.buffers(), copy.buffers(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
        assert [m.training for m in copy.modules()] == [m.training for m in model.modules()]
        before = _output(copy, x)
        with torch.no_grad():
            for t in model.parameters():
                t.zero_()
        assert torch.equal(_output(copy, x), before)

    def test_a_module_that_keeps_activations(self):
        model = network()
        model.kept = model(torch.ones(2, 4, dtype=torch.float64))
        copy = snapshot(model)
        assert not copy.kept.requires_grad
        assert torch.equal(copy.kept, model.kept)

    def test_compiled_model_gives_the_module_inside(self):
        model = network()
        assert type(snapshot(torch.compile(model))) is nn.Sequential


def _output(model, x):
    return reference.outputs(model, x).detach()
