"""Time and memory of a weighted loss by batch size, width and processes: `python -m benchmarks.cost.scaling`.

The loss is the `NTXentLoss` of lightly, or of pytorch-metric-learning, forward and backward, on two random views in
float32. Each measurement has a
process of its own. The memory is the increase of its peak of resident memory (on a GPU: of allocated memory) over a
step. `docs/scaling.md` discusses the tables.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from multiprocessing.connection import Connection
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightly.loss import NTXentLoss
from pytorch_metric_learning import losses as metric_losses
from torch import Tensor, multiprocessing, nn
from torch.utils.benchmark import timer
from tqdm import tqdm

from undimix_plugins import UnDiMix, Uniform, Weighting, undimix

WEIGHTINGS: dict[str, Weighting | None] = {"plain": None, "`Uniform()`": Uniform(), "`UnDiMix()`": UnDiMix()}
# The most pairs: lightly's loss needs some 16 matrices [views, views], pytorch-metric-learning's five of a number for
# each view and each two views.
PLAIN_UP_TO = {"lightly": 8192, "pytorch-metric-learning": 256}
PARTS = ("batches", "widths", "processes", "metric_learning")


def criterion(toolkit: str, weighting: Weighting | None, *, gather: bool = False) -> nn.Module:
    host = NTXentLoss(gather_distributed=gather)
    if toolkit == "pytorch-metric-learning":
        host = metric_losses.SelfSupervisedLoss(metric_losses.NTXentLoss(temperature=0.5))
    return host if weighting is None else undimix(host, weighting)


def views(batch: int, width: int, device: str) -> list[Tensor]:
    return [torch.randn(batch, width, device=device, requires_grad=True) for _ in range(2)]


def seconds(loss: nn.Module, inputs: list[Tensor], repeats: int) -> float:
    """The median time of a step (forward and backward)."""
    times = []
    for _ in range(repeats):
        start = timer()  # waits for the device
        loss(*inputs).backward()
        times.append(timer() - start)
    return median(times)


def peak(device: str) -> int:
    """The process's peak of memory so far, in bytes."""
    if device == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(torch.cuda.max_memory_allocated(device))


class Case(NamedTuple):
    """A measurement. The batch size is in pairs, of all processes together."""

    batch: int
    width: int = 128
    weighting: Weighting | None = None
    processes: int = 1
    threads: int = 1  # of each process
    device: str = "cpu"
    toolkit: str = "lightly"


def step(rank: int, sent: Connection, root: str, case: Case) -> None:
    """Runs steps. The first process sends their median time, and the MiB that the first one adds to the peak."""
    torch.set_num_threads(case.threads)
    if case.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=case.processes)
    loss = criterion(case.toolkit, case.weighting, gather=case.processes > 1)
    inputs = views(case.batch // case.processes, case.width, case.device)
    loss(*views(4, case.width, case.device)).backward()
    before = peak(case.device)
    first = seconds(loss, inputs, 1)
    added = (peak(case.device) - before) / 2**20
    taken = first if case.batch > PLAIN_UP_TO["lightly"] else seconds(loss, inputs, 5)
    if rank == 0:
        sent.send((taken, added))
    if case.processes > 1:
        dist.destroy_process_group()


def measured(case: Case) -> str:
    """The cell of a table; empty where the plain loss would need too much memory."""
    if case.weighting is None and case.batch > PLAIN_UP_TO[case.toolkit]:
        return ""
    received, sent = multiprocessing.get_context("spawn").Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as root:
        running = multiprocessing.spawn(step, (sent, root, case), nprocs=case.processes, join=False)
        sent.close()
        try:
            taken, added = received.recv()
        except EOFError:  # the process was killed for lack of memory
            return "too much"
        while not running.join():
            pass
    return f"{taken:.3g} s, {added:,.0f} MiB"


def table(head: str, cases: dict[str, Case]) -> str:
    lines = [f"| {head} | {' | '.join(WEIGHTINGS)} |", "|---|" + "---|" * len(WEIGHTINGS)]
    for name, case in tqdm(cases.items(), file=sys.stderr):
        cells = [measured(case._replace(weighting=weighting)) for weighting in WEIGHTINGS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS, help="which tables to print; default: all")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {options.device}, {threads} threads: seconds of a step, MiB added to the peak")
    one = Case(1024, threads=threads, device=options.device)
    tables = {
        "batches": (
            "batch, width 128",
            {f"{batch:,}": one._replace(batch=batch) for batch in (256, 1024, 4096, 8192, 16384, 32768)},
        ),
        "widths": ("width, batch 1,024", {f"{width:,}": one._replace(width=width) for width in (32, 128, 512, 2048)}),
        "processes": (
            "CPU processes of a thread each, 2,048 pairs together",
            {str(count): Case(2048, processes=count) for count in (1, 2, 4)},
        ),
        "metric_learning": (
            "pytorch-metric-learning, batch, width 128",
            {
                f"{batch:,}": one._replace(batch=batch, toolkit="pytorch-metric-learning")
                for batch in (64, 128, 256, 1024, 4096)
            },
        ),
    }
    for part in options.only:
        print(f"\n{table(*tables[part])}", flush=True)


if __name__ == "__main__":
    main()
