"""The machine that a benchmark ran on, and a yardstick to carry its times to another."""

import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

SIDE, ROUNDS = 1024, 9  # of the matrices that are multiplied


def machine() -> dict[str, Any]:
    """Processor, cores, versions, how busy it is, and seconds of a plain matrix product in float32."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        f"matmul_{SIDE}_s": matmul(),
    }


def matmul() -> float:
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return median(times)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}
