"""ResNets whose batch norms, additions and activations are fused layers."""

from .resnet import ResNet, cifar_resnet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = ["ResNet", "cifar_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
