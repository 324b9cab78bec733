"""Lightning's sharding strategies on a CPU: two of them refuse one, so that subclasses stand in for tests."""

from __future__ import annotations

import argparse

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.callbacks.test_rejuvenation import Calibrated
from tests.sharding import fsdp2, tensor_parallel


class FSDPOnCPU(FSDPStrategy):
    def _setup_model(self, model):
        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class DeepSpeedOnCPU(DeepSpeedStrategy):
    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        trained = [p for p in model.parameters() if p.requires_grad]
        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped


class Sharded(Calibrated):
    """Shards its own model where ``ModelParallelStrategy`` has a mesh for it; the same batch on every rank."""

    def configure_model(self):
        mesh = getattr(self, "device_mesh", None)
        if mesh is None:
            return
        if mesh["tensor_parallel"].size() > 1:
            tensor_parallel(self.model, mesh["tensor_parallel"])
        if mesh["data_parallel"].size() > 1:
            fsdp2(self.model, mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self._data[:1], batch_size=None)


def deepspeed(stage):
    return lambda: DeepSpeedOnCPU(
        stage=stage, zero_allow_untested_optimizer=True, logging_batch_size_per_gpu=1
    )


STRATEGIES = {
    "ddp": DDPStrategy,
    # PyTorch 2.13 crashes on a CPU where FSDP1 puts a full state dict together.
    "fsdp1": lambda: FSDPOnCPU(auto_wrap_policy={LlamaDecoderLayer}, state_dict_type="sharded"),
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "tensor parallel": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
}
DEEPSPEED = {f"deepspeed zero {stage}": deepspeed(stage) for stage in (1, 2, 3)}
