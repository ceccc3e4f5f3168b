"""What the examples share: the data, training, the command line of those that reproduce a paper, table and figure."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The data -------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Images (N, C, H, W) in float32, of mean 0 and variance 1 in each channel over the training set; int64 labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augmented: bool


def load_data(name: str) -> Data:
    """The digits, or CIFAR-10 from the folder of its "python version"."""
    if name == "digits":
        from vgkern.demo import data

        return Data(*data.load(torch.device("cpu")), augmented=False)
    train = [_cifar_batch(Path(name) / f"data_batch_{number}") for number in range(1, 6)]
    train_images, train_labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    test_images, test_labels = _cifar_batch(Path(name) / "test_batch")
    std, mean = torch.std_mean(train_images, (0, 2, 3), keepdim=True)
    return Data((train_images - mean) / std, train_labels, (test_images - mean) / std, test_labels, augmented=True)


def _cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    with path.open("rb") as file:
        batch = pickle.load(file, encoding="bytes")
    images = torch.from_numpy(np.asarray(batch[b"data"])).reshape(-1, 3, 32, 32).float() / 255
    return images, torch.tensor(batch[b"labels"])


# Training -------------------------------------------------------------------------------------------------------------


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    *,
    epochs: int,
    batch_size: int = 128,
    loss_factor: float = 1.0,
    before_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train on whole batches in random order; the cross entropy, without ``loss_factor``, at each step."""
    losses = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train_labels)).split(batch_size):
            if len(chosen) < batch_size:
                continue
            optimizer.zero_grad()
            loss = F.cross_entropy(net(data.train_images[chosen]), data.train_labels[chosen])
            (loss_factor * loss).backward()
            before_step()
            optimizer.step()
            losses.append(loss.item())
    return losses


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified right, in batches of at most 500 and in the mode that the net is in."""
    with torch.no_grad():
        right = [(net(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return (sum(right) / len(labels)).item()


def smooth(values: Sequence[float], steps: int) -> list[float]:
    """The mean of each ``steps`` values that follow each other."""
    return torch.tensor(values)[: len(values) // steps * steps].unflatten(0, (-1, steps)).mean(1).tolist()


# Command line, table, figure ------------------------------------------------------------------------------------------


def arguments(doc: str, script: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """``data`` and ``out`` from the command line, as the ``main`` of each paper's script takes them."""
    summary, _, details = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", metavar="FOLDER",
        help="of CIFAR-10's python version, pickles: one you trust; without it scikit-learn's digits")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(f"{Path(script).stem}.png"), metavar="PNG",
        help="the figure (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        importlib.import_module("matplotlib")  # missing, it would be missed when all is computed

        return {"data": load_data(args.data), "out": args.out}
    except ImportError as error:
        parser.error(f"{error}: pip install 'vgkern[demo]'")
    except OSError as error:
        parser.error(str(error))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Each row as soon as it is there: the first column to the left, the others to the right below their names."""
    for row in itertools.chain([header], rows):
        cells = [str(cell).rjust(max(6, len(name))) for name, cell in zip(header[1:], row[1:], strict=True)]
        print(f"{row[0]:24}", *cells, sep="  ", flush=True)


@contextlib.contextmanager
def panels(out: Path, *titles: tuple[str, str], size: tuple[float, float] = (5, 3.9), **subplots: Any) -> Iterator[Any]:
    """A row of axes, one for each (title, explanation), ``size`` inches each; written to ``out`` at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    from vgkern.figures import LIGHT, panel_title, style

    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(size[0] * len(titles), size[1]), layout="constrained")
        axes = figure.subplots(1, len(titles), squeeze=False, **subplots)[0]
        for ax, title in zip(axes, titles, strict=True):
            panel_title(ax, *title)
        yield axes
        figure.savefig(out, dpi=130)
