"""Attention as plain products beside torch's fused kernel: a forward and a backward pass, by length and dtype.

Run it with `OMP_NUM_THREADS=1 python benchmarks/attention.py`; half a minute. It writes
benchmarks/results/attention.json, which is what the rule of `neurograft.attention.choose_attention` rests on.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from neurograft.attention import causal_attention
from render import describe_run

RESULT = Path(__file__).parent / "results" / "attention.json"
SEQUENCES, HEADS, WIDTH, ROUNDS = 4, 8, 64, 7
LENGTHS = (64, 128, 256, 512, 1024)


def main() -> None:
    """Time both ways in turns, and write the ratios of their times."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS:
            query, key, value = (
                torch.randn(SEQUENCES, HEADS, length, WIDTH).to(dtype).requires_grad_() for _ in range(3)
            )

            def fused(q: torch.Tensor = query, k: torch.Tensor = key, v: torch.Tensor = value) -> torch.Tensor:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

            def products(q: torch.Tensor = query, k: torch.Tensor = key, v: torch.Tensor = value) -> torch.Tensor:
                return causal_attention(q, k, v, scale=WIDTH**-0.5)

            both = [(timed(fused), timed(products)) for _ in range(ROUNDS)]
            ratio = statistics.median(ours / theirs for theirs, ours in both[1:])
            milliseconds = [round(1e3 * statistics.median(times), 2) for times in zip(*both[1:], strict=True)]
            rows.append({"dtype": str(dtype), "tokens": length, "milliseconds": milliseconds, "ratio": round(ratio, 2)})
            print(rows[-1], flush=True)
    settings = {"sequences": SEQUENCES, "heads": HEADS, "width": WIDTH, "threads": torch.get_num_threads()}
    result = {"run": describe_run("OMP_NUM_THREADS=1 python benchmarks/attention.py"), "settings": settings}
    RESULT.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def timed(attend: Callable[[], torch.Tensor]) -> float:
    """Return the seconds of a forward and a backward pass."""
    started = time.perf_counter()
    result = attend()
    result.backward(torch.ones_like(result))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
