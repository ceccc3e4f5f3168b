"""The data: the handwritten digits that scikit-learn's package carries. Nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Digits", "load"]


class Digits(NamedTuple):
    """1,797 images in a fixed stratified split of three to one, with mean 0 and variance 1 over the training set.

    ``train_images`` (1347, 1, 8, 8) and ``test_images`` (450, 1, 8, 8) in float32; labels 0...9 in int64.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(device: torch.device) -> Digits:
    """The digits on ``device``, with the same split in every call.

    Source: E. Alpaydin & C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images = (torch.from_numpy(a).float().reshape(-1, 1, 8, 8) for a in split[:2])
    std, mean = torch.std_mean(train_images)
    train_labels, test_labels = (torch.from_numpy(a).long() for a in split[2:])
    return Digits(
        ((train_images - mean) / std).to(device), train_labels.to(device),
        ((test_images - mean) / std).to(device), test_labels.to(device),
    )  # fmt: skip
