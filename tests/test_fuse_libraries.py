"""Models of torchvision, timm and transformers, where they are installed: same numbers, reasons for what is left."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import vgkern


def _check(model, run, fused: int | None = None) -> vgkern.fusion.FusionReport:
    """Fused in float64, eval and then a step in training; ``fused`` batch norms, or all of them."""
    model = model.double().eval()
    ours = vgkern.fuse(model)
    report = vgkern.fusion_report(ours)
    assert report.fused_batch_norms == (report.batch_norms if fused is None else fused), report
    assert all(row.reason for row in report.left)
    assert list(ours.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(run(ours), run(model), rtol=1e-7, atol=1e-7)
    outputs = []
    for net in (ours.train(), model.train()):
        torch.manual_seed(0)  # both drop the same
        outputs.append(run(net))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(*outputs, rtol=1e-7, atol=1e-7)
    gradients, states = ([{k: p.grad for k, p in net.named_parameters()} for net in (ours, model)],
                         [net.state_dict() for net in (ours, model)])  # fmt: skip
    for got, want in (gradients, states):
        largest = max(tensor.abs().max().item() for tensor in want.values() if tensor is not None)
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-7, atol=1e-9 * largest, msg=name)
    return report


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121",
     "regnet_y_400mf", "regnet_x_400mf", "shufflenet_v2_x0_5", "vgg11_bn"],
)  # fmt: skip
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    _check(getattr(models, name)(weights=None, num_classes=10), lambda net: net(x))


def test_torchvisions_segmentation():
    """Its backbone is a container with a forward of its own; what its model returns is a dictionary."""
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4)
    _check(model, lambda net: net(x)["out"])


@pytest.mark.parametrize(
    ("name", "all_of_them"),
    [("resnet18", True), ("resnet26d", True), ("seresnet50", True), ("vgg11_bn", True), ("selecsls42b", True),
     ("resnest14d", True), ("regnetx_002", False), ("efficientnet_b0", False)],
)  # fmt: skip
def test_timm(name, all_of_them):
    timm = pytest.importorskip("timm", exc_type=ImportError)  # it may be there and lack torchvision
    model = timm.create_model(name, pretrained=False, num_classes=10)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    report = _check(model, lambda net: net(x), fused=None if all_of_them else 0)
    # Its own layer of batch norm and activation is a subclass with its own forward, and stays.
    assert all("BatchNormAct2d is a subclass" in row.reason for row in report.left)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_transformers(layer_type):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type=layer_type)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    report = _check(transformers.ResNetModel(config), lambda net: net(pixel_values=x).last_hidden_state)
    joins = Counter(row.operations[1] for row in report.fused if len(row.operations) == 3)
    assert joins == {"residual": 2, "residual's batch norm": 2}  # the first block of each stage has a projection


def test_transformers_that_cannot_be_traced():
    transformers = pytest.importorskip("transformers")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = transformers.MobileNetV2Model(transformers.MobileNetV2Config(depth_multiplier=0.25))
    report = _check(model, lambda net: net(pixel_values=x).last_hidden_state, fused=0)
    assert all("MobileNetV2ConvLayer cannot be traced" in row.reason for row in report.left)
