"""How channels are followed through whole networks: compared with torch-pruning's graph, and by hand."""

from __future__ import annotations

import weakref

import nets
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
import torchvision
from torch import nn

from pruning import Budget, prune, trace
from pruning.graph.plan import Plan
from pruning.planning import count
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify
from pruning.tracing.passes import flow
from pruning.utils.compare import TOLERANCE
from pruning.utils.modules import call

pytestmark = pytest.mark.quick

TORCHVISION = ["resnet18", "mobilenet_v2", "densenet121", "googlenet", "vgg11_bn", "squeezenet1_1"]


def made(name):
    """Return a network, and images for it."""
    if name in nets.NETS:
        return nets.make(name), nets.images()
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, num_classes=4, **options).eval(), torch.randn(2, 3, 64, 64)


def by_oracle(net, images, root, positions):
    """Return the positions of each side of each layer that torch-pruning removes with those of one layer."""
    graph = torch_pruning.DependencyGraph().build_dependency(net, images)
    layer = net.get_submodule(root)
    names = {module: name for name, module in net.named_modules()}
    remove = graph.get_pruner_of_module(layer).prune_out_channels
    found = {}
    for item in graph.get_pruning_group(layer, remove, positions):
        module = item.dep.target.module
        reads = graph.is_in_channel_pruning_fn(item.dep.handler)
        makes = graph.is_out_channel_pruning_fn(item.dep.handler)
        if module in names and list(module.parameters(recurse=False)):
            side = "in" if reads and not makes else "out"
            found.setdefault((names[module], side), set()).update(item.idxs)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "lenet", "residual", "dense", "inverted", "tokens", *TORCHVISION])
def test_groups_equal_those_of_torch_pruning(name):
    net, images = made(name)
    traced = trace(net, images)
    assert traced.groups
    shown = [group for group in traced.groups.values() if "aux" not in group.name]
    for group in shown if len(shown) < 30 else shown[:: len(shown) // 6]:
        root = next(m for m in group.side("out") if m.layer == group.name)
        channel = torch.tensor([group.channels - 1])
        ours = {
            (m.layer, m.side): set(m.positions(channel).tolist())
            for m in group.members
            if len(m.positions(channel)) and "aux" not in m.layer  # which runs only in training
        }
        assert ours == by_oracle(net, images, group.name, root.positions(channel).tolist()), group.name


@pytest.mark.parametrize("name", ["resnet18", "shuffled", "scaled", "attention", "grouped"])
def test_tracing_runs_on_the_meta_device(name):
    net, images = made(name)
    probe = flow(net, call, images).probe
    assert probe is not None and {t.device.type for t in probe.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", ["shuffled", "scaled", "patches"])
def test_parameters_outside_layers_are_narrowed(name):
    net, images = made(name)
    step = prune(net, images, Budget(params="50%"), score="l2", ranking="group")
    before, after = net.state_dict(), step.model.state_dict()
    narrowed = {key for key in before if before[key].shape != after[key].shape}
    wanted = {"shuffled": {"stem.0.weight"}, "scaled": {"mean", "scale", "layer_scale"},
              "patches": {"token", "position"}}[name]  # fmt: skip
    assert wanted <= narrowed
    assert step.after.params == sum(p.numel() for p in step.model.parameters()) - (
        sum(m.num_features for m in step.model.modules() if isinstance(m, nn.BatchNorm2d))
        if name == "shuffled"
        else 0
    )


class Beside(nn.Module):
    """Joins a channel of one value to those of a layer."""

    def __init__(self, fill):
        super().__init__()
        self.fill, self.first, self.last = fill, nn.Conv2d(3, 8, 3), nn.Conv2d(9, 4, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.cat([x, self.fill(x)], 1))


@pytest.mark.parametrize(
    "fill",
    [
        lambda x: torch.zeros(len(x), 1, *x.shape[2:]),
        lambda x: torch.zeros_like(x[:, :1]),
        lambda x: torch.full_like(x[:, -1:, :].detach(), 0.5),
        lambda x: torch.ones_like(x[:, 0]).unsqueeze(1),
    ],
)
def test_a_slice_of_which_only_the_shape_is_read_ties_no_channels(fill):
    net, images = Beside(fill).eval(), nets.images()
    traced = trace(net, images)
    assert traced.widths == {"first": 8}, traced.skipped
    plan = Plan({"first": (2, 3, 7)})
    small = apply(net, traced, plan)
    assert small.last.in_channels == 4
    assert verify(net, small, traced, plan, images) <= TOLERANCE


def test_a_slice_whose_values_are_read_ties_channels():
    traced = trace(Beside(lambda x: x[:, :1] + torch.zeros_like(x[:, :1])).eval(), nets.images())
    assert traced.widths == {} and "all tied" in traced.skipped["first"]


class Centered(nets.WithNorm):
    """A layer whose code computes with another weight than the parameter."""

    def forward(self, x):
        return self.norm(self._conv_forward(x, self.weight - self.weight.mean(0), self.bias))


def test_a_layer_that_contains_its_norm_is_narrowed_with_it():
    net, images = nets.make("holders"), nets.images()
    step = prune(net, images, Budget(macs="50%"), score="l2")
    assert not {"0", "1", "2"} & step.trace.skipped.keys()
    assert step.model[0].out_channels == step.model[0].norm.num_features == step.model[1].groups < 8
    assert step.after.macs == count(step.model, images).macs


def test_parameters_of_functional_convolutions_are_skipped_with_the_reason():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.bent = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.centered = Centered(4, 4, nn.BatchNorm2d(4))

        def forward(self, x):
            x = torchvision.ops.deform_conv2d(F.conv2d(x, self.kernel), torch.zeros(2, 18, 10, 10), self.bent)
            return self.centered(x)

    skipped = trace(Functional(), nets.images()).skipped
    assert "deform_conv2d" in skipped["kernel"] and "differently from its type" in skipped["centered"]
    assert "calls deform_conv2d" in skipped["bent"]


def test_a_decoder_with_the_transposed_weight_of_a_layer_is_narrowed_with_it():
    class Autoencoder(nn.Module):
        """An autoencoder whose last layer is its first one, transposed."""

        def __init__(self):
            super().__init__()
            self.encode, self.wide, self.narrow = nn.Linear(30, 16), nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            hidden = self.narrow(torch.relu(self.wide(torch.relu(self.encode(x)))))
            return F.linear(hidden, self.encode.weight.t())

    step = prune(Autoencoder(), torch.randn(2, 30), Budget(params="70%"), score="l2")
    assert step.trace.widths == {"encode": 16, "wide": 24}
    assert step.model.encode.out_features == step.model.narrow.out_features == step.plan.widths["encode"]


def test_a_layer_whose_weight_other_code_reads_is_skipped_and_the_rest_is_narrowed():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.wide, self.last = nn.Linear(30, 16), nn.Linear(16, 24), nn.Linear(24, 3)

        def forward(self, x):
            return self.last(self.wide(self.encode(x))) + self.encode.weight.t().sum()

    step = prune(Summed(), torch.randn(2, 30), Budget(params="70%"), score="l2")
    assert "another module reads what encode holds" in step.trace.skipped["encode"]
    assert step.model.wide.out_features < 24 and step.model.encode.out_features == 16


def test_channels_of_one_pixel_shuffle_square_are_removed_together():
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1)).eval()
    traced = trace(net, nets.images())
    assert traced.widths == {"0": 3}
    plan = Plan({"0": (0, 2)})
    small = apply(net, traced, plan)
    assert small[0].out_channels == 8 and small[2].in_channels == 2
    assert verify(net, small, traced, plan, nets.images()) <= TOLERANCE


def test_a_channel_shuffle_keeps_the_same_channels_in_every_part():
    shuffle, parts = nn.ChannelShuffle(4), nn.Conv2d(32, 8, 1, groups=4)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), shuffle, parts, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    traced = trace(net, nets.images())
    assert traced.widths["0"] == 2  # every part of the shuffle and of the convolution loses the same number
    plan = Plan({"0": (1,)})
    small = apply(net, traced, plan)
    assert small[0].out_channels == small[2].in_channels == 16
    assert verify(net, small, traced, plan, nets.images()) <= TOLERANCE


def test_a_head_that_runs_only_in_training_is_narrowed():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.aux, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = nn.functional.dropout(torch.relu(self.stem(x)), training=self.training)
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    small = prune(Auxiliary(), nets.images(), Budget(macs="50%"), score="l2").model
    assert small.aux.in_channels == small.head.in_channels < 6
    small.train()(nets.images())


def test_a_model_that_reads_values_is_traced_on_its_own_device():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, images):
            x = torch.relu(self.a(images))
            if images.sum().item() < 1e9:
                x = torch.relu(self.b(x))
            return self.head(x)

    assert set(trace(Looks(), nets.images()).groups) == {"a", "b"}


@pytest.mark.parametrize("written", [False, True])
def test_multiplication_by_a_single_channel_map_ties_no_channels(written):
    """Spatial attention: the map is expanded to the channel count, which may be a constant in the code."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.map, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 3)

        def forward(self, x):
            y = torch.relu(self.stem(x))
            weight = torch.sigmoid(self.map(y))
            return self.head(y * (weight.expand(-1, 8, -1, -1) if written else weight.expand_as(y)))

    net = Attention()
    if written:
        assert "tied to its width" in trace(net, nets.images()).skipped["stem"]
    else:
        step = prune(net, nets.images(), Budget(channels=3), score="l2")
        assert step.plan.widths == {"stem": 3} and step.difference < 1e-5


def test_channels_of_a_sampling_grid_are_not_pruned():
    """Optical flow: neither of a grid's two channels can be removed."""

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.flow = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
            self.edges, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(14, 3, 1)

        def forward(self, x):
            y = torch.relu(self.stem(x))
            flow = self.flow(y)
            moved = F.grid_sample(y, flow.permute(0, 2, 3, 1).tanh(), align_corners=False)
            return self.head(torch.cat([moved, torch.relu(self.edges(flow))], 1))

    step = prune(Flow(), nets.images(), Budget(channels=8), score="random", ranking="group")
    assert "reads positions from it" in step.trace.skipped["flow"]
    assert step.plan.widths.keys() == {"stem", "edges"} and step.difference < 1e-5


def test_offsets_of_a_deformable_convolution_are_not_pruned_and_the_rest_is():
    net, images = nets.make("deformable"), nets.images()
    step = prune(net, images, Budget(channels=16), score="random", ranking="group")
    # The channels of the two parts of the first layer are tied, so its group has half as many.
    assert step.plan.widths == {"first": 2, "bent": 7, "own": 3, "still": 3}
    small = step.model
    assert small.bent.in_channels == 4 and small.each.groups == small.each.out_channels == 7
    assert small.places.out_channels == 54 and "reads positions" in step.trace.skipped["own.offset"]
    assert step.difference < 1e-5 and step.after.macs == count(small, images).macs
    of_one = sum(m.weight.numel() * 49 for m in (net.each, net.own, net.own.offset, net.still))
    whole = sum(m.weight.numel() * 196 for m in (net.first, net.places, net.bent, net.where))
    assert count(net, images).macs == of_one + whole + net.head.weight.numel()


@pytest.mark.parametrize("pool", ["roi_align", "roi_pool"])
def test_cropped_regions_have_the_channels_of_their_image(pool):
    ops = pytest.importorskip("torchvision.ops")

    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8 * 9, 6), nn.Linear(6, 4)

        def forward(self, x, boxes):
            maps = getattr(ops, pool)(torch.relu(self.stem(x)), boxes, (3, 3))
            return self.out(torch.relu(self.fc(maps.flatten(1))))

    boxes = torch.tensor([[0, 0.0, 0, 6, 6], [1, 2, 2, 9, 9], [1, 0, 3, 5, 9]])
    step = prune(Regions(), (nets.images(), boxes), Budget(channels=7), score="l2", ranking="group")
    assert step.plan.widths == {"stem": 4, "fc": 3} and step.difference < 1e-5


def test_channels_are_followed_through_unpooling():
    class Unpooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)

        def forward(self, x):
            small, places = F.max_pool2d(torch.relu(self.stem(x)), 2, return_indices=True)
            return self.head(F.max_unpool2d(small, places, 2))

    step = prune(Unpooled(), nets.images(), Budget(channels=3), score="l2")
    assert step.plan.widths == {"stem": 3} and step.difference < 1e-5


def test_a_buffer_that_the_pass_replaces_is_not_confused_with_a_new_tensor():
    """ConViT does so: it builds its table of positions at the first image."""
    gone = []

    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
            self.register_buffer("table", torch.zeros(1, 1, 1), persistent=False)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            before = weakref.ref(self.table)
            self.table = x.new_zeros(1, 1, 1)
            gone.append(before() is None)
            return self.head(x)

    found = flow(Replacing(), call, nets.images())
    assert gone and not any(gone) and ("stem", "out") in found.sides
    assert trace(Replacing(), nets.images()).widths == {"stem": 8}
