"""What every module between an image and the outputs has to do, one class for each: it is written plainly in dense
tensors, and the tests of `LayerCase` compare the module with that on every backend. All groupings are fixed; the
gradients of gates have tests of their own (test_conv.py, test_estimators.py)."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sfg_fast import FilterGroups, SFGConv2d, backend
from sfg_fast.layers.feature_norm import FeatureNorm
from sfg_fast.layers.streams import Heads, Merge, RoutedBlock, StreamBlock
from tests.backends import EVERY, FAST
from tests.oracle import assert_close, merge, sfg_layer

TASKS, K = ("a", "b"), 5
ASSIGNMENT = [2, 0, 1, 1, 0]  # of the features that a layer reads


def batch_norm(x, norm, drawn=None):
    """By the batch, written out. `drawn`: T+1 tensors, and for each kernel the number of the one that is measured."""
    rows = x if drawn is None else torch.stack([drawn[0][g][:, k] for k, g in enumerate(drawn[1])], 1)
    mean = rows.mean((0, 2, 3))
    var = ((rows - mean[:, None, None]) ** 2).mean((0, 2, 3))
    scale = norm.weight / (var + norm.eps).sqrt()
    return x * scale[:, None, None] + (norm.bias - mean * scale)[:, None, None]


class LayerCase:
    """`make` is the module, which reads features of one SFG layer, or streams if `reads_streams`; `plainly` gives the
    dense tensors that it has to return, from T+1 dense tensors [N, K, H, W]. Both in training, in float64."""

    reads_streams = False

    def make(self):
        raise NotImplementedError

    def plainly(self, layer, dense):
        raise NotImplementedError

    def run(self, layer, features):
        """T+1 dense tensors, or whatever the module returns, as a list."""
        return list(layer(features))

    @pytest.fixture(autouse=True)
    def _double(self, float64):
        pass

    def problem(self):
        torch.manual_seed(3)
        first, layer = SFGConv2d(2, K, 3, tasks=TASKS), self.make()
        first.assign(ASSIGNMENT)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        x = torch.randn(2, 2, 9, 8, requires_grad=True)
        return first, layer, x

    def features(self, first, x):
        features = first(x)
        return self.streams(features) if self.reads_streams else features

    @property
    def streams(self):
        torch.manual_seed(4)
        return StreamBlock(K, TASKS, first=True, norm=None)

    def results(self, first, layer, x, plainly=False, memory_format=torch.contiguous_format):
        """Outputs, and the gradients of x and of every parameter."""
        features = self.features(first, x.contiguous(memory_format=memory_format))
        out = self.plainly(layer, list(features)) if plainly else self.run(layer, features)
        weights = [torch.linspace(-1, 1, one.numel()).view(one.shape) for one in out]
        leaves = [x, *layer.parameters()]
        found = torch.autograd.grad(
            sum((a * b).sum() for a, b in zip(out, weights, strict=True)), leaves, allow_unused=True
        )
        names = [*(f"output {n}" for n in range(len(out))), "dx", *(f"d{name}" for name, _ in layer.named_parameters())]
        return dict(zip(names, [*out, *found], strict=True))

    @pytest.mark.parametrize("name", EVERY)
    def test_what_it_computes(self, name):
        first, layer, x = self.problem()
        with backend("masked"):
            expected = self.results(first, layer, x, plainly=True)
        with backend(name):
            found = self.results(first, layer, x)
        assert found.keys() == expected.keys()
        for what, one in found.items():
            if expected[what] is None:  # the module has a parameter that is not used, such as p of a fixed assignment
                assert one is None or not one.any(), what
            else:
                assert_close(one, expected[what], 1e-9, what)

    @pytest.mark.parametrize("name", FAST)
    def test_the_same_bits_twice_and_in_a_copy(self, name):
        first, layer, x = self.problem()
        twin = copy.deepcopy(layer)
        with backend(name):
            found = [self.results(first, one, x) for one in (layer, layer, twin)]
        for again in found[1:]:
            for what, one in found[0].items():
                assert one is again[what] or torch.equal(one, again[what]), what

    @pytest.mark.parametrize("name", FAST)
    def test_channels_last_gives_the_same(self, name):
        first, layer, x = self.problem()
        with backend(name):
            found = [
                self.results(first, layer, x, memory_format=layout)
                for layout in (torch.contiguous_format, torch.channels_last)
            ]
        for what, one in found[0].items():
            if one is not None:
                assert_close(found[1][what], one, 1e-10, what)

    @pytest.mark.parametrize("name", FAST)
    def test_eval_is_the_reference(self, name):
        """After three steps, whose running statistics they share."""
        first, layer, x = self.problem()
        with torch.no_grad(), backend(name):
            for _ in range(3):
                self.run(layer, self.features(first, x + torch.randn_like(x)))
        layer.eval()
        found = []
        for one in (name, "reference"):
            with torch.no_grad(), backend(one):
                found.append(self.run(layer, self.features(first, x)))
        for n, pair in enumerate(zip(*found, strict=True)):
            assert_close(*pair, 1e-10, f"output {n}")

    def test_its_state_goes_round(self):
        first, layer, x = self.problem()
        with torch.no_grad():
            self.run(layer, self.features(first, x))
        twin = self.make()
        twin.load_state_dict(layer.state_dict())
        assert twin.state_dict().keys() == layer.state_dict().keys()
        with torch.no_grad():
            outs = [self.run(one.eval(), self.features(first, x)) for one in (layer, twin)]
        assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))


class TestSFGConv2d(LayerCase):
    drawn = (1, 1, 2, 0)

    def make(self):
        return SFGConv2d(K, 4, 3, padding=1, tasks=TASKS, norm="batch", activation="relu")

    def run(self, layer, features):
        return list(layer(features, FilterGroups.from_assignment(list(self.drawn), TASKS)))

    def plainly(self, layer, dense):
        z = F.one_hot(torch.tensor(self.drawn), 3).double()
        norm = layer.norm.weight, layer.norm.bias, layer.norm.eps
        return sfg_layer(dense, layer.weight, layer.bias, z, padding=1, relu=True, norm=norm)


class TestRoutedBlock(LayerCase):
    """x + SFG(SFG(x)); the second layer has the grouping of x."""

    drawn = (0, 2, 1, 2, 0)

    def make(self):
        return RoutedBlock(SFGConv2d(2, K, 3, tasks=TASKS), dilation=2, tasks=TASKS, norm="batch")

    def run(self, layer, features):
        return list(layer(features, FilterGroups.from_assignment(list(self.drawn), TASKS)))

    def plainly(self, layer, dense):
        z = [F.one_hot(torch.tensor(one), 3).double() for one in (self.drawn, ASSIGNMENT)]
        h = dense
        for conv, gates, relu in ((layer.conv1, z[0], True), (layer.conv2, z[1], False)):
            norm = conv.norm.weight, conv.norm.bias, conv.norm.eps
            h = sfg_layer(h, conv.weight, conv.bias, gates, padding=2, dilation=2, relu=relu, norm=norm)
        return [a + b for a, b in zip(dense, h, strict=True)]


class TestStreamBlock(LayerCase):
    """x + conv(relu(bn(conv(relu(bn(x)))))) on each stream."""

    reads_streams, first = True, False

    def make(self):
        return StreamBlock(K, TASKS, dilation=2, first=self.first)

    def plainly(self, layer, dense):
        out = []
        for g, x in enumerate(dense):
            rows, h = slice(g * K, (g + 1) * K), x
            norms = [None if one is None else Slice(one, rows) for one in (layer.norm1, layer.norm2)]
            h = h if self.first else batch_norm(h, norms[0]).relu()
            bias = None if layer.conv1.bias is None else layer.conv1.bias[rows]
            h = batch_norm(F.conv2d(h, layer.conv1.weight[rows], bias, 1, 2, 2), norms[1]).relu()
            out.append(x + F.conv2d(h, layer.conv2.weight[rows], layer.conv2.bias[rows], 1, 2, 2))
        return out


class TestFirstStreamBlock(TestStreamBlock):
    """Right behind an SFG layer: it starts with the convolution."""

    reads_streams, first = False, True


class Slice:
    """Some channels of a batch normalisation."""

    def __init__(self, norm, rows):
        self.weight, self.bias, self.eps = norm.weight[rows], norm.bias[rows], norm.eps


class TestMerge(LayerCase):
    """[F_t | F_s] and a 1x1 convolution for each task; the shared stream passes."""

    reads_streams = True

    def make(self):
        return Merge(K, TASKS)

    def plainly(self, layer, dense):
        shared, *tasks = dense
        pieces = zip(tasks, layer.conv.weight.split(K), layer.conv.bias.split(K), strict=True)
        return [shared, *(F.conv2d(torch.cat([task, shared], 1), weight, bias) for task, weight, bias in pieces)]


class TestHeads(LayerCase):
    """A 1x1 convolution of F_t + F_s for each task."""

    def make(self):
        return Heads(K, {"a": 2, "b": 1})

    def run(self, layer, features):
        return list(layer(features).values())

    def plainly(self, layer, dense):
        _, *read = merge(dense, "arrow")
        pieces = zip(read, layer.conv.weight.split([2, 1]), layer.conv.bias.split([2, 1]), strict=True)
        return [F.conv2d(x, weight, bias) for x, weight, bias in pieces]


class TestFeatureNorm(LayerCase):
    """F' = z * (scale * h + shift) for F = z * h, by the statistics of each kernel's drawn row."""

    def make(self):
        return FeatureNorm(K, 3)

    def plainly(self, layer, dense):
        z = F.one_hot(torch.tensor(ASSIGNMENT), 3).double().t()[:, :, None, None]
        return [batch_norm(x, layer.norm, (dense, ASSIGNMENT)) * gate for x, gate in zip(dense, z, strict=True)]
