"""Training on user windows with individual optimizations on or off."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from reference.trainer import ReferenceOptimizers, average_gradients, data_parallel, repeat_epochs
from stages import Stopwatch, detached_leaf, resume_backward
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import JaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from a2gen_rec.config import Config
from a2gen_rec.data.batch import WindowBatch, count_names
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader, WindowDataset
from a2gen_rec.data.schema import ITEM_ID
from a2gen_rec.data.synced_batches import SynchronizedBatches
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.base import RankingModel, TargetEncoding
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.models.factory import build_model
from a2gen_rec.training.build import ModelWithLoss, build_training_model
from a2gen_rec.utils.distributed import DistributedContext

PAD_TO_MAX = 10**9
"""Bucket overhead in tokens that pads all action sequences to the longest."""


@dataclass(frozen=True)
class Optimizations:
    """Optimizations of training on windows.

    Attributes:
        factorized: attention of all targets in three matrix products; else one attention matrix per target.
        jagged: action sequences bucketed by length; else padded to the longest.
        deduplicate: one lookup per distinct id of a batch.
        fused_tables: sharded tables updated inside the backward pass; else unsharded tables and torch's optimizers.
        prefetch: batches collated by a thread, and lookups of the next batch started during the current one.
        bf16: bfloat16 autocast.
        compile_item_level: ``torch.compile`` of the item level. The other levels process one piece per length of an
            action sequence. The lengths differ between batches: compiling these levels takes minutes and is repeated.
    """

    factorized: bool = True
    jagged: bool = True
    deduplicate: bool = True
    fused_tables: bool = True
    prefetch: bool = True
    bf16: bool = False
    compile_item_level: bool = False


@dataclass(frozen=True)
class Variant:
    """Variant of training.

    Attributes:
        name: name in the table.
        optimizations: its optimizations; None for the pointwise reference.
        base_index: index of the variant with one optimization less.
    """

    name: str
    optimizations: Optimizations | None
    base_index: int


VARIANTS = [
    Variant("pointwise reference", None, 0),
    Variant("+ one history per window", Optimizations(False, False, False, False, False), 0),
    Variant("+ factorized attention", Optimizations(True, False, False, False, False), 1),
    Variant("+ jagged action level", Optimizations(True, True, False, False, False), 2),
    Variant("+ deduplicated lookups", Optimizations(True, True, True, False, False), 3),
    Variant("+ sharded tables, fused update", Optimizations(True, True, True, True, False), 4),
    Variant("+ prefetched batches and lookups", Optimizations(), 5),
    Variant("all, in bf16", Optimizations(bf16=True), 6),
    Variant("all, item level compiled", Optimizations(compile_item_level=True), 6),
]
REFERENCE, FULL = 0, 6


class WindowTraining:
    """Training of A2Gen as in ``training.trainer``.

    Args:
        data: dataset directory.
        card: card of the dataset.
        config: configuration.
        process: distributed context.
        optimizations: optimizations to use.
        weights: initial weights from :func:`full_state_dict`; sharded tables are initialized from the seed only.
    """

    def __init__(
        self,
        data: str,
        card: DatasetCard,
        config: Config,
        process: DistributedContext,
        optimizations: Optimizations,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        config = replace(
            config,
            model=replace(config.model, attention_impl="factorized" if optimizations.factorized else "reference"),
            loader=replace(
                config.loader,
                deduplicate_ids=optimizations.deduplicate,
                prefetch=optimizations.prefetch,
                bucket_overhead_tokens=config.loader.bucket_overhead_tokens if optimizations.jagged else PAD_TO_MAX,
            ),
        )
        self.config, self.process, self.optimizations = config, process, optimizations
        self.tables = EmbeddingTables.from_card(card, config.model).full_tables
        if optimizations.fused_tables:
            built = build_training_model(card, config, process)
            self.model: RankingModel = built.model
            self.model_parallel, self.optimizer = built.model_parallel, built.optimizer
            if weights is not None:
                self.model.ranker.load_state_dict(
                    {name.removeprefix("ranker."): value for name, value in weights.items() if "embeddings" not in name}
                )
        else:
            self.model = build_model(card, config, process.device).to(process.device)
            if weights is not None:
                self.model.load_state_dict(weights)
            self.model_parallel = data_parallel(
                ModelWithLoss(self.model, Loss(config.loss, process.world_size)), process
            )
            self.optimizer = ReferenceOptimizers(
                self.model.embeddings.parameters(), self.model.ranker.parameters(), config.optim
            )
        if optimizations.compile_item_level:
            self.model.ranker.get_submodule("encoder").compile(dynamic=True)
        self.dataset = WindowDataset(
            Dataset(data, card),
            "train",
            config.loader,
            self.tables,
            process.rank,
            process.world_size,
            seed=config.train.seed,
        )
        loader = WindowDataLoader(self.dataset, optimizations.prefetch, pin_memory=process.device.type == "cuda")
        self.batches = SynchronizedBatches(
            repeat_epochs(loader, process.world_size),
            lambda: self.dataset.empty_batch,
            LoaderState(world_size=process.world_size),
            len(count_names(card)),
        )
        self.pipeline = (
            TrainPipelineSparseDist(self.model_parallel, self.optimizer, process.device, custom_model_fwd=self._forward)
            if optimizations.prefetch
            else None
        )

    @property
    def wait_s(self) -> float:
        """Seconds that steps waited for data."""
        return self.batches.wait_s

    def step(self) -> int:
        """Run one step and return its number of targets over all ranks."""
        if self.pipeline is not None:
            self.pipeline.progress(self.batches)
        else:
            batch = next(self.batches).to(self.process.device)
            self.optimizer.zero_grad()
            self._forward(batch)[0].backward()
            self.optimizer.step()
        return int(self.batches.issued.popleft().counts[0])

    def staged_step(self, watch: Stopwatch) -> int:
        """Run one step of sharded tables with every stage timed; return its number of targets over all ranks.

        Only the loader prefetches. The tables' update runs inside the backward pass of the lookups and counts as
        embedding. Must not be called after :meth:`step`.
        """
        tables, parameters = self.model.embeddings, self.model.ranker.parameters()
        with watch("data wait"):
            batch = next(self.batches).to(self.process.device)
        self.optimizer.zero_grad()
        with watch("communication"):
            context = tables.create_context()
            ids = tables.input_dist(context, batch.sparse).wait().wait()
        with watch("embedding"):
            lookups = tables.compute(context, ids)
        sent = list(map(detached_leaf, lookups))
        with watch("communication"):
            received = tables.output_dist(context, sent).wait()
            rows = {name: detached_leaf(row.values()) for name, row in received.items()}
        with watch("forward"):
            jagged = {name: JaggedTensor(row, lengths=received[name].lengths()) for name, row in rows.items()}
            loss, _ = self.model_parallel.module.loss(self.model.ranker(jagged, batch), batch)
        with watch("backward"):
            loss.backward()
        with watch("communication"):
            resume_backward([row.values() for row in received.values()], rows.values())
            average_gradients(parameters, self.process)
        with watch("embedding"):
            resume_backward(lookups, sent)
        with watch("optimizer"):
            self.optimizer.step()
        return int(self.batches.issued.popleft().counts[0])

    def loss(self, columns: WindowColumns, rows: np.ndarray) -> float:
        """Return the loss on all targets of the windows ``rows``. Must not be called after :meth:`step`."""
        loader = self.config.loader
        batch = collate(
            columns, rows, self.tables, loader.deduplicate_ids, bucket_overhead=loader.bucket_overhead_tokens
        ).to(self.process.device)
        with torch.no_grad():
            return self._forward(batch)[0].item() / self.process.world_size

    def lookups_per_target(self, batches: int) -> float:
        """Return the looked-up item ids per target."""
        lookups = targets = 0
        for _, batch in zip(range(batches), self.dataset, strict=False):
            lookups += len(batch.sparse[ITEM_ID].values())
            targets += len(batch.target)
        return lookups / targets

    def close(self) -> None:
        """Stop the loader."""
        self.batches.close()

    def _forward(self, batch: WindowBatch) -> tuple[Tensor, tuple[Tensor, TargetEncoding]]:
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.optimizations.bf16):
            return self.model_parallel(batch)


def full_state_dict(model: nn.Module, process: DistributedContext) -> dict[str, Tensor]:
    """Gather all parameters of a sharded model, unsharded, on every rank."""
    full = {}
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            rows = torch.empty(value.size(), device=process.device)
            value.gather(0, rows if process.is_main else None)
            torch.distributed.broadcast(rows, 0)
            value = rows
        full[name] = value.detach().clone()
    return full
