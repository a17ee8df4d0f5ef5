"""Training on user windows, with each of its levers on or off."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from reference.trainer import PlainOptimizers, average_gradients, data_parallel, endless
from stages import Stopwatch, detached_leaf, resume_backward
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import JaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from a2gen_rec.config import Config
from a2gen_rec.data.batch import WindowBatch, collate, count_names
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader, WindowDataset
from a2gen_rec.data.schema import ITEM_ID, DatasetCard
from a2gen_rec.data.synced_batches import SynchronizedBatches
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.base import RankingModel, TargetEncoding
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.models.factory import build_model
from a2gen_rec.training.build import ModelWithLoss, build_training_model
from a2gen_rec.utils.distributed import DistributedContext

PAD_ALL = 10**9
"""Cost of a group of action sequences at which all are padded to the longest."""


@dataclass(frozen=True)
class Optimizations:
    """What makes training on windows fast.

    Attributes:
        factorized: attention of all targets in three matrix products; else a matrix for each.
        ragged: action sequences grouped by similar length; else padded to the longest.
        dedup: every distinct id of a batch looked up once.
        fused: sharded tables, updated inside the backward pass; else plain tables and torch's optimizers.
        ahead: batches made by a thread, lookups of the next batch begun during the present one.
        bf16: autocast.
        compiled: the item level, by ``torch.compile``; the rest works on pieces, one for each length of an action
            sequence, which every batch has others of: traced whole, it takes minutes and is traced again.
    """

    factorized: bool = True
    ragged: bool = True
    dedup: bool = True
    fused: bool = True
    ahead: bool = True
    bf16: bool = False
    compiled: bool = False


class WindowTraining:
    """A2Gen in training, as ``training.trainer`` does it.

    Args:
        weights: to begin with, as :func:`whole_weights` gives them; sharded tables begin by the seed alone.
    """

    def __init__(
        self,
        data: str,
        card: DatasetCard,
        config: Config,
        process: DistributedContext,
        levers: Optimizations,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        config = replace(
            config,
            model=replace(config.model, attention_impl="factorized" if levers.factorized else "reference"),
            loader=replace(
                config.loader,
                deduplicate_ids=levers.dedup,
                prefetch=levers.ahead,
                bucket_overhead_tokens=config.loader.bucket_overhead_tokens if levers.ragged else PAD_ALL,
            ),
        )
        self.config, self.process, self.levers = config, process, levers
        self.whole = EmbeddingTables.from_card(card, config.model).full_tables
        if levers.fused:
            built = build_training_model(card, config, process)
            self.model: RankingModel = built.model
            self.task, self.optimizer = built.model_parallel, built.optimizer
            if weights is not None:
                self.model.ranker.load_state_dict(
                    {name.removeprefix("ranker."): value for name, value in weights.items() if "embeddings" not in name}
                )
        else:
            self.model = build_model(card, config, process.device).to(process.device)
            if weights is not None:
                self.model.load_state_dict(weights)
            self.task = data_parallel(ModelWithLoss(self.model, Loss(config.loss, process.world_size)), process)
            self.optimizer = PlainOptimizers(
                self.model.embeddings.parameters(), self.model.ranker.parameters(), config.optim
            )
        if levers.compiled:
            self.model.ranker.get_submodule("encoder").compile(dynamic=True)
        self.stream = WindowDataset(
            Dataset(data, card),
            "train",
            config.loader,
            self.whole,
            process.rank,
            process.world_size,
            seed=config.train.seed,
        )
        loader = WindowDataLoader(self.stream, levers.ahead, pin_memory=process.device.type == "cuda")
        self.batches = SynchronizedBatches(
            endless(loader, process.world_size),
            lambda: self.stream.empty_batch,
            LoaderState(world_size=process.world_size),
            len(count_names(card)),
        )
        self.pipeline = (
            TrainPipelineSparseDist(self.task, self.optimizer, process.device, custom_model_fwd=self._forward)
            if levers.ahead
            else None
        )

    @property
    def wait_s(self) -> float:
        """Seconds that steps have waited for data."""
        return self.batches.wait_s

    def step(self) -> int:
        """One step; returns its targets, over all ranks."""
        if self.pipeline is not None:
            self.pipeline.progress(self.batches)
        else:
            batch = next(self.batches).to(self.process.device)
            self.optimizer.zero_grad()
            self._forward(batch)[0].backward()
            self.optimizer.step()
        return int(self.batches.issued.popleft().counts[0])

    def staged_step(self, watch: Stopwatch) -> int:
        """One step of sharded tables, stage by stage and nothing ahead but the loader. Never after :meth:`step`.

        The tables' update runs inside the backward pass of their lookups, and counts as embedding.
        """
        tables, parameters = self.model.embeddings, self.model.ranker.parameters()
        with watch("data wait"):
            batch = next(self.batches).to(self.process.device)
        self.optimizer.zero_grad()
        with watch("communication"):
            context = tables.create_context()
            ids = tables.input_dist(context, batch.sparse).wait().wait()
        with watch("embedding"):
            found = tables.compute(context, ids)
        sent = list(map(detached_leaf, found))
        with watch("communication"):
            received = tables.output_dist(context, sent).wait()
            rows = {name: detached_leaf(row.values()) for name, row in received.items()}
        with watch("forward"):
            jagged = {name: JaggedTensor(row, lengths=received[name].lengths()) for name, row in rows.items()}
            loss, _ = self.task.module.loss(self.model.ranker(jagged, batch), batch)
        with watch("backward"):
            loss.backward()
        with watch("communication"):
            resume_backward([row.values() for row in received.values()], rows.values())
            average_gradients(parameters, self.process)
        with watch("embedding"):
            resume_backward(found, sent)
        with watch("optimizer"):
            self.optimizer.step()
        return int(self.batches.issued.popleft().counts[0])

    def loss(self, columns: WindowColumns, rows: np.ndarray) -> float:
        """Loss on all targets of the windows ``rows``. Never after :meth:`step`."""
        loader = self.config.loader
        batch = collate(
            columns, rows, self.whole, loader.deduplicate_ids, bucket_overhead=loader.bucket_overhead_tokens
        ).to(self.process.device)
        with torch.no_grad():
            return self._forward(batch)[0].item() / self.process.world_size

    def lookups(self, batches: int) -> float:
        """Item ids looked up per target."""
        looked_up = targets = 0
        for _, batch in zip(range(batches), self.stream, strict=False):
            looked_up += len(batch.sparse[ITEM_ID].values())
            targets += len(batch.target)
        return looked_up / targets

    def close(self) -> None:
        self.batches.close()

    def _forward(self, batch: WindowBatch) -> tuple[Tensor, tuple[Tensor, TargetEncoding]]:
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.levers.bf16):
            return self.task(batch)


def whole_weights(model: nn.Module, process: DistributedContext) -> dict[str, Tensor]:
    """All parameters of a sharded model, whole, on every rank."""
    whole = {}
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            rows = torch.empty(value.size(), device=process.device)
            value.gather(0, rows if process.is_main else None)
            torch.distributed.broadcast(rows, 0)
            value = rows
        whole[name] = value.detach().clone()
    return whole
