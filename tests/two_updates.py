"""The update in two processes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from mixgrpo.config import AdvantageConfig, BatchConfig, Config, UpdateConfig
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.maths.transitions import log_ratio, make_transition
from mixgrpo.methods.emphasis import emphasize
from mixgrpo.methods.grpo import Objective, update
from mixgrpo.types import TextEmbedding, Trajectory

CONFIG = Config(
    batch=BatchConfig(prompts=2, samples=8),
    advantage=AdvantageConfig(best_of=4, skip_equal=True),
    update=UpdateConfig(
        optimizer_steps=2, micro_batch=1, step_fraction=0.6, max_grad_norm=torch.inf
    ),
)


class Net(nn.Module):
    """Counts its forwards; each is also a collective, as with sharded weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out = nn.Linear(channels + 1, channels)
        nn.init.constant_(self.out.weight, 0.1)
        nn.init.constant_(self.out.bias, 0.2)
        self.forwards = 0

    def forward(self, x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        self.forwards += 1
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1))
        height = (sigma[:, None, None] + text.pooled[:, :1, None]).expand(-1, x.shape[1], 1)
        return torch.tanh(self.out(torch.cat([x, height], -1)))


def updated(trajectory: Trajectory, advantages: Tensor) -> tuple[list[Tensor], int]:
    """The weights after two optimizer steps on this process's trajectory, and the forwards."""
    net = Net(trajectory.final.shape[-1])
    engine = DataParallel(net, torch.device("cpu"), _plain)
    chosen, mine, emphasis = emphasize(
        CONFIG, 3, trajectory.window, trajectory, advantages, engine.rank, engine.world_size
    )
    objective = Objective(make_transition("flow_sde", 0.7), log_ratio, 1e-4)
    update(engine, engine.module, chosen, mine, objective, CONFIG.update, emphasis)
    return [p.detach() for p in net.parameters()], net.forwards


def _plain(parameters: list[nn.Parameter]) -> tuple[SGD, LambdaLR]:
    optimizer = SGD(parameters, lr=0.1)
    return optimizer, LambdaLR(optimizer, lambda _: 1.0)


def main(folder: Path) -> None:
    """As a process that torchrun has started."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank = dist.get_rank()
    given = torch.load(folder / f"given_{rank}.pt", weights_only=False)
    torch.save(updated(*given), folder / f"updated_{rank}.pt")
    dist.destroy_process_group()
