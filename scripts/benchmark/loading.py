"""Host memory of several processes while they load a FLUX transformer of random weights.

    python scripts/benchmark/loading.py --processes 4

Plain: each process loads the whole transformer, then shards it (FSDP2, float32). Sharded: each
process builds it on the meta device and reads its own part of every weight, as training with
engine.kind fsdp does. Everything is on the CPU. The weights are first written to a folder and kept
there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from environment import ROOT, environment, output_file

from mixgrpo.config import EngineConfig
from mixgrpo.engines import Network
from mixgrpo.engines.fsdp import FullySharded
from mixgrpo.files.disk import write_text_whole
from mixgrpo.models.flux import FLUX
from mixgrpo.models.stored import StoredWeights, empty_transformer

MEGABYTE = 2**20
WIDTHS = {"num_attention_heads": 12, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
SIZE = {**WIDTHS, "num_layers": 4, "num_single_layers": 5, "joint_attention_dim": 1024}
SMALL = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4}
CPU = torch.device("cpu")


class Memory:
    """The largest proportional (shared pages divided) and resident memory above the start's."""

    def __init__(self) -> None:
        self.start = self._now()
        self.peak = dict.fromkeys(self.start, 0)
        self.over = Event()
        self.thread = Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _now(self) -> dict[str, int]:
        text = Path("/proc/self/smaps_rollup").read_text()
        found = {key: int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1])  # type: ignore[index]
                 for key in ("Pss", "Pss_Anon", "Rss")}  # fmt: skip
        return {key: value * 1024 for key, value in found.items()}

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            self._note()

    def _note(self) -> None:
        for key, value in self._now().items():
            self.peak[key] = max(self.peak[key], value - self.start[key])

    def stop(self) -> dict[str, int]:
        self.over.set()
        self.thread.join()
        self._note()
        return self.peak


def write_model(folder: Path, size: dict[str, Any]) -> int:
    """Writes the transformer's folder, in bfloat16; returns its number of weights."""
    with torch.device("meta"):
        module = torch.nn.Module.to(FluxTransformer2DModel(**size), torch.bfloat16)
    count = sum(parameter.numel() for parameter in module.parameters())
    if not (folder / "transformer" / "config.json").exists():
        module.to_empty(device=CPU)
        torch.manual_seed(0)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter.data, std=0.02)
        module.save_pretrained(folder / "transformer", max_shard_size="300MB")
    return count


def load_plain(folder: Path) -> Network:
    module = FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    return _network(module, None)


def load_sharded(folder: Path) -> Network:
    module = empty_transformer(FLUX, str(folder), torch.float32)
    return _network(module, StoredWeights(folder / "transformer", module, seed=0))


def _network(module: Any, stored: StoredWeights | None) -> Network:
    blocks = [*module.transformer_blocks, *module.single_transformer_blocks]
    return Network(module, blocks, torch.float32, stored)


LOADS: dict[str, Callable[[Path], Network]] = {"plain": load_plain, "sharded": load_sharded}


def in_process(rank: int, count: int, way: str, folder: Path, meeting: str, answers: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    memory, start = Memory(), perf_counter()
    engine = FullySharded(LOADS[way](folder), EngineConfig(kind="fsdp"), CPU, _no_optimizer)
    peak = memory.stop()
    seconds = perf_counter() - start
    total = torch.stack([shard.double().sum() for shard in engine.shards]).sum()
    dist.all_reduce(total)
    answers.put((peak, seconds, total.item()))
    dist.barrier()
    dist.destroy_process_group()


def _no_optimizer(parameters: Any) -> Any:
    return None, None


def measure(way: str, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures each way in separate processes."""
    context = multiprocessing.get_context("fork")  # what is imported is not loaded again
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (chosen.processes, way, folder, f"{meeting}/store", answers)
        running = [context.Process(target=in_process, args=(rank, *arguments))
                   for rank in range(chosen.processes)]  # fmt: skip
        for each in running:
            each.start()
        found = [answers.get() for _ in running]
        for each in running:
            each.join()
    peaks = [peak for peak, _, _ in found]
    return {
        "way": way,
        **{key: [peak[key] for peak in peaks] for key in peaks[0]},
        "seconds": max(seconds for _, seconds, _ in found),
        "sum": found[0][-1],
    }


HEADS = ("way", "Pss, each", "Pss, all", "anonymous, all", "Rss, each", "s")
ROW = "{:>8} {:>10} {:>9} {:>15} {:>10} {:>7}"


def row(found: dict[str, Any]) -> str:
    sizes = (max(found["Pss"]), sum(found["Pss"]), sum(found["Pss_Anon"]), max(found["Rss"]))
    megabytes = (f"{size / MEGABYTE:.0f}" for size in sizes)
    return ROW.format(found["way"], *megabytes, f"{found['seconds']:.1f}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=4)
    add("--ways", nargs="+", choices=list(LOADS), default=list(LOADS))
    add("--small", action="store_true", help="use a transformer of a few megabytes")
    add(
        "--folder",
        type=Path,
        default=ROOT / "runs" / "loading",
        help="where the weights are written",
    )
    add("--json", type=output_file, help="also write the results to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    size = {**SIZE, **SMALL} if chosen.small else SIZE
    folder = chosen.folder / ("small" if chosen.small else "large")
    count, about = write_model(folder, size), environment(CPU)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(
        f"task: {chosen.processes} processes, {count / 1e6:.0f}M weights in bfloat16 on the disk, "
        f"{4 * count / MEGABYTE:.0f} MB in float32; memory in MB above the start's\n"
    )
    print(ROW.format(*HEADS))
    results = []
    for way in chosen.ways:
        results.append(measure(way, chosen, folder))
        print(row(results[-1]), flush=True)
    if chosen.json:
        write_text_whole(chosen.json, json.dumps({**about, "results": results}, indent=1) + "\n")
    sums = [found["sum"] for found in results]
    if max(sums) - min(sums) > 1e-6 * abs(sums[0]):
        print(f"DIFFERENT weights: their sums are {sums}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
