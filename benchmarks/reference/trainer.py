"""Usual training of the pointwise reference: autograd, torch's optimizers, and batches prefetched by a thread."""

import time
from collections.abc import Generator, Iterable
from itertools import count

import numpy as np
import torch
from reference.examples import ExampleDataset, Examples, build_examples, window_targets
from reference.pointwise import Embedded, PointwiseA2Gen, reference_loss
from stages import Stopwatch, detached_leaf, resume_backward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from a2gen_rec.config import Config, OptimConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader
from a2gen_rec.utils.distributed import DistributedContext


class ReferenceOptimizers:
    """Adagrad for the tables and AdamW for the dense parameters."""

    def __init__(self, tables: Iterable[Tensor], dense: Iterable[Tensor], config: OptimConfig) -> None:
        self.dense, self.max_grad_norm = list(dense), config.max_grad_norm
        self.optimizers = [
            torch.optim.Adagrad(tables, lr=config.sparse_lr),
            torch.optim.AdamW(self.dense, lr=config.dense_lr, weight_decay=config.weight_decay),
        ]

    def step(self) -> None:
        """Clip the dense gradients and update all parameters."""
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.dense, self.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Reset all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def data_parallel(module: nn.Module, process: DistributedContext) -> nn.Module:
    """Wrap a module in DistributedDataParallel if there are several ranks."""
    return DistributedDataParallel(module) if process.world_size > 1 else module


def repeat_epochs(loader: WindowDataLoader, world_size: int) -> Generator:
    """Yield the batches of a loader, epoch after epoch."""
    for epoch in count():
        yield from loader.iter_epoch(LoaderState(epoch=epoch, world_size=world_size))


class PointwiseTraining:
    """Training of the pointwise reference.

    Attributes:
        wait_s: seconds that steps waited for data.
    """

    def __init__(
        self, data: str, card: DatasetCard, config: Config, process: DistributedContext, batch_targets: int
    ) -> None:
        self.config, self.process = config, process
        self.model = PointwiseA2Gen(card, config.model).to(process.device)
        self.data_parallel = data_parallel(self.model, process)
        tables = list(self.model.tables.parameters())
        dense = [parameter for name, parameter in self.model.named_parameters() if not name.startswith("tables.")]
        self.optimizer = ReferenceOptimizers(tables, dense, config.optim)
        dataset = ExampleDataset(
            Dataset(data, card), "train", config.loader, {}, process.rank, process.world_size, seed=config.train.seed
        )
        dataset.max_history, dataset.batch_targets = config.model.max_history, batch_targets
        self.dataset = dataset
        loader = WindowDataLoader(dataset, config.loader.prefetch, pin_memory=process.device.type == "cuda")
        self.batches = repeat_epochs(loader, process.world_size)
        self.wait_s = 0.0

    def step(self) -> int:
        """Run one step and return its number of targets over all ranks."""
        start = time.perf_counter()
        examples: Examples = next(self.batches)
        self.wait_s += time.perf_counter() - start
        examples = examples.to(self.process.device)
        self.optimizer.zero_grad()
        reference_loss(self.data_parallel(examples), examples, self.config.loss).backward()
        self.optimizer.step()
        return len(examples) * self.process.world_size

    def staged_step(self, watch: Stopwatch) -> int:
        """Run one step with every stage timed; return its number of targets over all ranks."""
        with watch("data wait"):
            examples: Examples = next(self.batches).to(self.process.device)
        self.optimizer.zero_grad()
        with watch("embedding"):
            rows = self.model.embed(examples)
        leaves = Embedded(*map(detached_leaf, rows))
        with watch("forward"):
            loss = reference_loss(self.model.predict(leaves, examples), examples, self.config.loss)
        with watch("backward"):
            loss.backward()
        with watch("embedding"):
            resume_backward(rows, leaves)
        with watch("communication"):
            average_gradients(self.model.parameters(), self.process)
        with watch("optimizer"):
            self.optimizer.step()
        return len(examples) * self.process.world_size

    def loss(self, columns: WindowColumns, rows: np.ndarray) -> float:
        """Return the loss on all targets of the windows ``rows``."""
        examples = build_examples(columns, *window_targets(columns, rows), self.config.model.max_history).to(
            self.process.device
        )
        with torch.no_grad():
            return reference_loss(self.model(examples), examples, self.config.loss).item()

    def lookups_per_target(self, batches: int) -> float:
        """Return the looked-up item ids per target, without padding."""
        lookups = targets = 0
        for _, examples in zip(range(batches), self.dataset, strict=False):
            lookups += int(examples.history_mask.sum()) + len(examples)
            targets += len(examples)
        return lookups / targets

    def close(self) -> None:
        """Stop the loader."""
        self.batches.close()


def average_gradients(parameters: Iterable[Tensor], process: DistributedContext) -> None:
    """Average gradients over ranks, as data parallelism does inside the backward pass."""
    if process.world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / process.world_size
    torch.distributed.all_reduce(flat)
    for gradient, average in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(average.view_as(gradient))
