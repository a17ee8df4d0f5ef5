"""Training the pointwise reference as it usually is: autograd, torch's optimizers, batches made ahead by a thread."""

import time
from collections.abc import Generator, Iterable
from itertools import count

import numpy as np
import torch
from reference.examples import Examples, ExampleStream, build, targets_of
from reference.pointwise import Embedded, PointwiseA2Gen, loss
from stages import Stopwatch, detached_leaf, resume_backward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from a2gen_rec.config import Config, OptimConfig
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.utils.distributed import DistributedContext


class PlainOptimizers:
    """Adagrad for the tables and AdamW for the rest, as modules of their own."""

    def __init__(self, tables: Iterable[Tensor], dense: Iterable[Tensor], config: OptimConfig) -> None:
        self.dense, self.clip_norm = list(dense), config.max_grad_norm
        self.each = [
            torch.optim.Adagrad(tables, lr=config.sparse_lr),
            torch.optim.AdamW(self.dense, lr=config.dense_lr, weight_decay=config.weight_decay),
        ]

    def step(self) -> None:
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.dense, self.clip_norm)
        for optimizer in self.each:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.each:
            optimizer.zero_grad()


def data_parallel(module: nn.Module, process: DistributedContext) -> nn.Module:
    """The module with its gradients averaged over the ranks, if there are several."""
    return DistributedDataParallel(module) if process.world_size > 1 else module


def endless(loader: WindowDataLoader, world: int) -> Generator:
    """Epoch after epoch of a loader's batches."""
    for epoch in count():
        yield from loader.iter_epoch(LoaderState(epoch=epoch, world_size=world))


class Pointwise:
    """The reference in training.

    Attributes:
        wait_s: seconds that steps have waited for data.
    """

    def __init__(
        self, data: str, card: DatasetCard, config: Config, process: DistributedContext, batch_targets: int
    ) -> None:
        self.config, self.process = config, process
        self.model = PointwiseA2Gen(card, config.model).to(process.device)
        self.task = data_parallel(self.model, process)
        tables = list(self.model.tables.parameters())
        dense = [parameter for name, parameter in self.model.named_parameters() if not name.startswith("tables.")]
        self.optimizer = PlainOptimizers(tables, dense, config.optim)
        stream = ExampleStream(
            Dataset(data, card), "train", config.loader, {}, process.rank, process.world_size, seed=config.train.seed
        )
        stream.history, stream.batch_targets = config.model.max_history, batch_targets
        self.stream = stream
        loader = WindowDataLoader(stream, config.loader.prefetch, pin_memory=process.device.type == "cuda")
        self.batches = endless(loader, process.world_size)
        self.wait_s = 0.0

    def step(self) -> int:
        """One step; returns its targets, over all ranks."""
        began = time.perf_counter()
        examples: Examples = next(self.batches)
        self.wait_s += time.perf_counter() - began
        examples = examples.to(self.process.device)
        self.optimizer.zero_grad()
        loss(self.task(examples), examples, self.config.loss).backward()
        self.optimizer.step()
        return len(examples) * self.process.world_size

    def staged_step(self, watch: Stopwatch) -> int:
        """One step, stage by stage."""
        with watch("data wait"):
            examples: Examples = next(self.batches).to(self.process.device)
        self.optimizer.zero_grad()
        with watch("embedding"):
            rows = self.model.embed(examples)
        cut = Embedded(*map(detached_leaf, rows))
        with watch("forward"):
            value = loss(self.model.predict(cut, examples), examples, self.config.loss)
        with watch("backward"):
            value.backward()
        with watch("embedding"):
            resume_backward(rows, cut)
        with watch("communication"):
            average_gradients(self.model.parameters(), self.process)
        with watch("optimizer"):
            self.optimizer.step()
        return len(examples) * self.process.world_size

    def loss(self, columns: WindowColumns, rows: np.ndarray) -> float:
        """Loss on all targets of the windows ``rows``."""
        examples = build(columns, *targets_of(columns, rows), self.config.model.max_history).to(self.process.device)
        with torch.no_grad():
            return loss(self.model(examples), examples, self.config.loss).item()

    def lookups(self, batches: int) -> float:
        """Item ids looked up per target, padding left out."""
        looked_up = targets = 0
        for _, examples in zip(range(batches), self.stream, strict=False):
            looked_up += int(examples.visible.sum()) + len(examples)
            targets += len(examples)
        return looked_up / targets

    def close(self) -> None:
        self.batches.close()


def average_gradients(parameters: Iterable[Tensor], process: DistributedContext) -> None:
    """What data parallelism does inside the backward pass, by itself."""
    if process.world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / process.world_size
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
