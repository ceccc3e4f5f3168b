"""Train a net of vgkern.models on CIFAR-10 or on scikit-learn's digits: one process, or several under torchrun.

    python examples/train.py --depth 20 --epochs 20
    python examples/train.py --data cifar-10-batches-py --depth 56 --epochs 180 --amp --clip 1 --monitor
    torchrun --nproc-per-node 2 examples/train.py --depth 20

--plain trains the same net made of torch.nn layers. Each epoch prints a line and the end a summary; a bar on a terminal
shows the steps, and where TensorBoard is installed its files are in OUT/tensorboard. OUT/checkpoint.pt always holds a
whole state: start the same command again with --resume after a kill, and the final weights are, to the bit, those of a
run that was never interrupted (on a GPU, as far as its kernels repeat their bits).
Needs the extra: pip install 'vgkern[demo]'.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _common import Data, load_data
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vgkern
from vgkern.gradients import GradientClipper, GradientMonitor, GradRecord

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError as error:
    sys.exit(f"train.py: {error}: pip install 'vgkern[demo]'")

MODELS = tuple(name for name in vgkern.models.__all__ if name != "ResNet")
#: Options that change nothing of what is computed: a run may be resumed with others.
FREE = {"out", "resume", "save_every", "json", "data"}
CIFAR_PADDING = 4  # pixels around an image of which a random crop is taken (He et al. 2016, section 4.2)


# The data -------------------------------------------------------------------------------------------------------------


def augment(images: Tensor) -> Tensor:
    """A random crop of each image with a margin of zeros, and half of them mirrored."""
    n, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * CIFAR_PADDING + 1, (2, n))
    rows, columns = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
    padded = F.pad(images, (CIFAR_PADDING,) * 4)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    cropped = padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return torch.where(torch.rand(n, 1, 1, 1) < 0.5, cropped, cropped.flip(3))


# The processes --------------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """Which of how many processes this is, and where it computes."""

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def world(device: str) -> Iterator[World]:
    """As torchrun says in the environment; without it, one process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.backends.cudnn.deterministic = True  # the same bits in every run
    if size == 1:
        yield World(rank, size, where)
        return
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield World(rank, size, where)
    finally:
        dist.destroy_process_group()


# Training -------------------------------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace, in_channels: int) -> nn.Module:
    options: dict[str, Any] = {
        "in_channels": in_channels,
        "activation": args.activation,
        "zero_init_residual": args.zero_init_residual,
        "stochastic_depth": args.stochastic_depth,
        "grad_norm_bounds": tuple(args.grad_norm_bounds) if args.grad_norm_bounds else None,
        "fused": args.fused,
    }
    if args.model != "cifar_resnet":
        return getattr(vgkern.models, args.model)(10, **options)
    return vgkern.models.cifar_resnet(args.depth, width=args.width, shortcut=args.shortcut, **options)


class Training:
    """A run: everything that changes while it trains, and so everything that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, where: World, data: Data) -> None:
        self.args, self.where, self.data = args, where, data
        self.steps_per_epoch = (
            len(data.train_images) // args.batch_size
        )  # whole batches: a short one's statistics differ
        if self.steps_per_epoch == 0 or args.batch_size % where.size:
            raise ValueError(
                f"--batch-size: expected a multiple of {where.size}, the number of processes, and at most "
                f"{len(data.train_images)}, got {args.batch_size}"
            )
        self.total_steps = args.epochs * self.steps_per_epoch
        torch.manual_seed(args.seed)  # the same weights in every process
        self.model = make_model(args, data.train_images.shape[1]).to(where.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, args.lr, total_steps=self.total_steps + 1, cycle_momentum=False
        )
        if args.clip is not None:
            GradientClipper(self.optimizer, args.clip)  # from here on the optimiser's own step clips
        # One row: what the last step before the end of an epoch was like. So a checkpoint need not hold any.
        self.monitor = GradientMonitor(self.model, capacity=1) if args.monitor else None
        self.scaler = torch.amp.GradScaler(where.device.type, enabled=args.amp and where.device.type == "cuda")
        self.step = 0
        self.losses: list[Tensor] = []  # of this epoch; they stay on the device
        self.history: list[dict[str, float]] = []  # one row an epoch
        torch.manual_seed(args.seed + 1_000 * where.rank)  # what is drawn from here on differs between processes
        self.net: nn.Module = self.model
        if where.size > 1:
            devices = [where.device] if where.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.model, device_ids=devices)

    def batch(self) -> tuple[Tensor, Tensor]:
        """This process's part of the batch of this step. The order is a function of seed and epoch: nothing to save."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(1_000_003 * self.args.seed + epoch)
        order = torch.randperm(len(self.data.train_images), generator=generator)
        size = self.args.batch_size
        chosen = order[place * size : (place + 1) * size][self.where.rank :: self.where.size]
        images = self.data.train_images[chosen]
        if self.data.augmented:
            images = augment(images)
        return images.to(self.where.device), self.data.train_labels[chosen].to(self.where.device)

    def autocast(self) -> torch.autocast:
        kind = self.where.device.type
        return torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16, enabled=self.args.amp)

    def train_step(self) -> None:
        images, labels = self.batch()
        self.net.train()
        self.optimizer.zero_grad()
        with self.autocast():
            loss = F.cross_entropy(self.net(images), labels)
        self.scaler.scale(loss).backward()
        if self.monitor is not None:
            self.monitor.step()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.losses.append(loss.detach())
        self.step += 1

    @torch.no_grad()
    def close_epoch(self) -> dict[str, float]:
        """The epoch's row: mean loss over all processes, and the test set as the first process sees it."""
        loss = torch.stack(self.losses).double().mean()
        if self.where.size > 1:
            dist.all_reduce(loss)
            loss /= self.where.size
        self.losses.clear()
        self.model.eval()
        test_loss, right = 0.0, 0
        for images, labels in zip(self.data.test_images.split(500), self.data.test_labels.split(500), strict=True):
            with self.autocast():
                scores = self.model(images.to(self.where.device)).float().cpu()
            test_loss += F.cross_entropy(scores, labels, reduction="sum").item()
            right += int((scores.argmax(1) == labels).sum())
        count = len(self.data.test_labels)
        row = {
            "epoch": self.step // self.steps_per_epoch,
            "train_loss": loss.item(),
            "test_loss": test_loss / count,
            "test_accuracy": right / count,
        }
        if self.monitor is not None:
            row |= gradient_health(self.monitor.records())
        self.history.append(row)
        return row

    # A checkpoint is written beside the last one and then takes its name: a kill leaves the one or the other.

    def save(self, path: Path) -> None:
        mine = {"random": [torch.get_rng_state()], "losses": [loss.cpu() for loss in self.losses]}
        if self.where.device.type == "cuda":
            mine["random"].append(torch.cuda.get_rng_state(self.where.device))
        processes = [mine] * self.where.size
        if self.where.size > 1:
            dist.all_gather_object(processes, mine)
        if self.where.rank:
            return
        state = {
            "options": _binding(self.args) | {"processes": self.where.size},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": processes,
            "step": self.step,
            "history": self.history,
        }
        beside = path.with_suffix(".new")
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        options = _binding(self.args) | {"processes": self.where.size}
        differing = [f"{name} ({old}, now {options.get(name)})" for name, old in state["options"].items()
                     if options.get(name) != old]  # fmt: skip
        if differing:
            raise ValueError(f"--resume: {path} is of a run with other options: {', '.join(differing)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        mine = state["processes"][self.where.rank]
        self.losses = [loss.to(self.where.device) for loss in mine["losses"]]
        torch.set_rng_state(mine["random"][0])
        if self.where.device.type == "cuda":
            torch.cuda.set_rng_state(mine["random"][1], self.where.device)


def _binding(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in FREE} | {"data": Path(args.data).name}


def gradient_health(records: list[GradRecord]) -> dict[str, float]:
    """What a step's backward pass reported of the layers with an activation: how much of the gradient at the last of
    them reaches the first, and how many units of the worst are dead."""
    norms = [record.grad_output_norm for record in records if record.backwards and record.activation]
    dead = [record.dead_fraction for record in records if not math.isnan(record.dead_fraction)]
    health = {"grad_first_to_last": norms[0] / norms[-1] if norms[-1] else math.nan} if norms else {}
    return health | ({"dead_most": max(dead)} if dead else {})


def train(args: argparse.Namespace, where: World, console: Console) -> dict[str, Any]:
    """Train, or go on training, to the end; returns the summary."""
    training = Training(args, where, load_data(args.data))
    path = args.out / "checkpoint.pt"
    if path.exists():
        if not args.resume:
            raise ValueError(f"--out: {path} is there already: --resume goes on with it")
        training.load(path)
        console.print(f"resumed at step {training.step} of {training.total_steps}")
    elif where.rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
    writer = _writer(args.out, training.step) if where.rank == 0 else None
    started, first_step = time.perf_counter(), training.step
    with _progress(where) as bar:
        task = bar.add_task("training", total=training.total_steps, completed=training.step)
        while training.step < training.total_steps:
            training.train_step()
            bar.update(task, completed=training.step)
            epoch_ends = training.step % training.steps_per_epoch == 0
            if epoch_ends:
                row = training.close_epoch()
                console.print(
                    "  ".join(f"{name} {value:.4g}" for name, value in row.items()), highlight=False, soft_wrap=True
                )
                if writer is not None:
                    for name, value in row.items():
                        writer.add_scalar(name, value, training.step)
                if not math.isfinite(row["train_loss"]):
                    raise FloatingPointError(f"the loss is {row['train_loss']} in epoch {row['epoch']}")
            if epoch_ends or (args.save_every and training.step % args.save_every == 0):
                training.save(path)
    if writer is not None:
        writer.close()
    seconds = time.perf_counter() - started
    return {
        "options": _binding(args),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "test_accuracy": training.history[-1]["test_accuracy"],
        "seconds_per_step": seconds / max(1, training.step - first_step),
        "history": training.history,
    }


def _progress(where: World) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(
        *columns, console=console, transient=True, disable=where.rank > 0 or not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # else what goes to a file or pipe would go to the terminal
    )  # fmt: skip


def _writer(out: Path, step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(out / "tensorboard", purge_step=step)  # what a killed run wrote beyond its checkpoint


# The command line -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add(
        "--data",
        default="digits",
        help="digits, or the folder of CIFAR-10's python version, pickles: one you trust (default: %(default)s)",
    )
    add("--model", choices=MODELS, default="cifar_resnet", help="of vgkern.models (default: %(default)s)")
    add("--depth", type=int, default=20, help="of cifar_resnet, 6n + 2: 20, 56, 110, ... (default: %(default)s)")
    add("--width", type=int, default=16, help="of cifar_resnet: channels of its first stage (default: %(default)s)")
    add("--no-shortcut", dest="shortcut", action="store_false", help="of cifar_resnet: the plain net of its source")
    add("--fused", action="store_true", default=True, help="on vgkern's layers (the default)")
    add("--plain", dest="fused", action="store_false", help="the same net on torch.nn's layers, for comparison")
    add("--activation", default="relu", choices=vgkern.activations.names(), metavar="NAME",
        help="relu, gelu, silu, ...: any of vgkern.activations.names() (default: %(default)s)")  # fmt: skip
    add("--zero-init-residual", action="store_true", help="every block starts as its shortcut")
    add("--stochastic-depth", type=float, default=0.0, metavar="P",
        help="probability that a sample skips the last block (default: %(default)s)")  # fmt: skip
    add("--grad-norm-bounds", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="keep each layer's gradient between these norms")  # fmt: skip
    add("--epochs", type=int, default=20, help="passes over the training images (default: %(default)s)")
    add("--batch-size", type=int, default=128, help="images a step, of all processes (default: %(default)s)")
    add("--lr", type=float, default=0.1, help="the largest learning rate of its cycle (default: %(default)s)")
    add("--momentum", type=float, default=0.9, help="(default: %(default)s)")
    add("--weight-decay", type=float, default=1e-4, help="(default: %(default)s)")
    add("--clip", type=float, metavar="NORM", help="the largest norm of all gradients together")
    add("--monitor", action="store_true", help="add what the last backward pass reported to each epoch's line")
    add("--amp", action="store_true", help="mixed precision: bfloat16 on a CPU, float16 with loss scaling on a GPU")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    add("--out", type=Path, default=Path("train-out"), metavar="FOLDER", help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on with OUT/checkpoint.pt; without one, start")
    add("--save-every", type=int, default=0, metavar="STEPS", help="checkpoints beside those at the end of each epoch")
    add("--json", type=Path, metavar="FILE", help="write the options, each epoch and the result to FILE")
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.epochs < 1:
        arguments.error(f"--epochs: expected at least 1, got {args.epochs}")
    with world(args.device) as where:
        console = Console(quiet=where.rank > 0)
        try:
            summary = train(args, where, console)
        except (ValueError, OSError) as error:
            arguments.error(str(error))
        except ImportError as error:
            arguments.error(f"{error}: pip install 'vgkern[demo]'")
        except FloatingPointError as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("train.py: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
            return 130
        console.print(
            f"test accuracy {summary['test_accuracy']:.2%}, {summary['parameters']:,} parameters, "
            f"{summary['seconds_per_step'] * 1e3:.1f} ms a step with evaluation and checkpoints",
            highlight=False,
            soft_wrap=True,
        )
        if args.json is not None and where.rank == 0:
            args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
