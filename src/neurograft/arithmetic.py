"""How matrices are multiplied: chosen by measuring on this machine, not by the names of processors.

The same float32 product takes less than half the time in one library than in another, and which one wins depends on the
processor; bfloat16 is several times faster on some machines and slower on others. A second of measuring tells.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from neurograft.errors import NeurograftError
from neurograft.files import atomic_file, read_bounded

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")

Precision = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["float32", "float32-onednn", "bfloat16"]
Attention = Literal["fused", "products"]

# A relative error that float32 products have and narrower ones exceed a thousandfold.
_FLOAT32_ERROR = 1e-5
# How much faster another way must be before it is taken: less could be noise, and a choice should not flicker.
ARITHMETIC_FOLDER = "arithmetic"
"""Of the cache."""
_WORTH_IT = 1.2
# The same between two libraries for float32: where a machine is shared, equal ones were seen a third apart.
_WORTH_ANOTHER_LIBRARY = 1.5
_SECONDS, _LEAST = 0.4, 5
_LARGEST_NOTE = 1 << 16  # bytes
# Rows and width of the products that are timed. Starting a product takes an accelerator longer than a small one itself,
# and all ways would look alike.
_ON_CPUS, _ON_ACCELERATORS = (1024, 512), (4096, 2048)


@dataclass(frozen=True)
class Arithmetic:
    """One way to multiply matrices.

    Attributes:
        kernels: `float32`: as torch does by default. `float32-onednn`: on CPUs, by oneDNN, as exact as the default and
            on some processors more than twice as fast. `bfloat16`: factors rounded to bfloat16, sums in float32
            (torch's autocast); parameters and their updates stay float32.
        attention: How models that call torch's fused attention attend.
    """

    kernels: Kernels
    attention: Attention = "fused"

    @contextmanager
    def active(self, device: torch.device, *, backward: bool = False) -> Iterator[None]:
        """Multiply this way inside the block; afterwards as before.

        Args:
            device: Where the matrices are.
            backward: Whether it holds a backward pass, which follows the dtypes of the forward pass by itself.
        """
        import torch

        from neurograft.attention import attending

        autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.kernels == "bfloat16" and not backward:
            autocast = torch.autocast(device.type, torch.bfloat16)
        with _onednn(self.kernels == "float32-onednn"), attending(self.attention), autocast:
            yield


@contextmanager
def _onednn(wanted: bool) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices, which torch leaves to another library unless less precision is allowed."""
    import torch

    if not wanted:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def choose_arithmetic(precision: Precision, device: torch.device) -> Arithmetic:
    """Return the fastest way to multiply matrices on a device.

    Args:
        precision: `float32`: torch's own way, or that of another library where it is faster by half at least;
            `bfloat16`: that one; `auto`: bfloat16 where it is faster by a fifth at least, else float32.
        device: Where the matrices are.
    """
    if precision == "bfloat16":
        return Arithmetic("bfloat16")
    seconds = _measured(str(device))
    exact: dict[Kernels, float] = {kernels: taken for kernels, taken in seconds.items() if kernels != "bfloat16"}
    best: Kernels = min(exact, key=lambda kernels: exact[kernels])
    if exact["float32"] < _WORTH_ANOTHER_LIBRARY * exact[best]:
        best = "float32"
    if precision == "auto" and exact[best] > _WORTH_IT * seconds["bfloat16"]:
        best = "bfloat16"
    return Arithmetic(best)


@functools.cache
def _measured(device_name: str) -> dict[Kernels, float]:
    """Return the seconds that products take each way; as they were found when this kind of machine was first measured.

    They are kept in the cache: what is measured differs a little each time, and the same command should come to the
    same bits.
    """
    import torch

    from neurograft.models import cache_directory

    device = torch.device(device_name)
    path = cache_directory() / ARITHMETIC_FOLDER / f"{_machine(device)}.json"
    if noted := _read(path):
        return noted
    found = _measure(device)
    log.info("matrix products: %s", ", ".join(f"{kernels} {1e3 * taken:.2f} ms" for kernels, taken in found.items()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, overwrite=False) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
    except (NeurograftError, OSError) as error:
        log.info("what was measured can't be kept (%s)", error)
    # Another process may have been a moment earlier.
    return _read(path) or found


def _machine(device: torch.device) -> str:
    """Return a name for all machines that multiply alike: of the processor, with threads and version of torch."""
    import torch

    parts: list[object] = [torch.__version__, str(device)]
    if device.type == "cpu":
        parts += [_processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    elif device.type == "cuda":
        parts += [torch.cuda.get_device_name(device)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """Return what the system calls the processor, with all that it can do where the system says so."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(told)}))
    return f"{platform.machine()} {platform.processor()}"


def _read(path: Path) -> dict[Kernels, float]:
    """Read what was noted; nothing where nothing was, or something that is no such note."""
    try:
        found = json.loads(read_bounded(path, _LARGEST_NOTE))
        noted = {kernels: float(found[kernels]) for kernels in get_args(Kernels) if kernels in found}
    except (NeurograftError, OSError, ValueError, TypeError):
        return {}
    return noted if {"float32", "bfloat16"} <= set(noted) and all(0 < taken < 60 for taken in noted.values()) else {}


def _measure(device: torch.device) -> dict[Kernels, float]:
    """Time products each way, in turns: other work on the machine should hit all ways alike.

    A float32 way that is not exact is left out.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, width = _ON_CPUS if device.type == "cpu" else _ON_ACCELERATORS
    a, b = (torch.randn(n, width, generator=generator).to(device) for n in (rows, 2 * width))
    exact = a.double() @ b.double().T if device.type != "mps" else None
    found: dict[Kernels, float] = {}
    for kernels in _candidates(device):
        with Arithmetic(kernels).active(device):
            product = torch.nn.functional.linear(a, b)
        if kernels == "float32-onednn" and exact is not None:
            error = float((product.double() - exact).norm() / exact.norm())
            if error > _FLOAT32_ERROR:
                continue
        found[kernels] = float("inf")
    end, times = time.perf_counter() + _SECONDS, 0
    while times < _LEAST or time.perf_counter() < end:
        times += 1
        for kernels, least in found.items():
            with Arithmetic(kernels).active(device):
                found[kernels] = min(least, _time(lambda: torch.nn.functional.linear(a, b), device))
    return found


def _candidates(device: torch.device) -> list[Kernels]:
    import torch

    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    settable = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    return ["float32", *(("float32-onednn",) if onednn and settable else ()), "bfloat16"]


def _time(compute: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a computation took."""
    import torch

    started = time.perf_counter()
    compute()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def fast_float32(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Multiply in the fastest way that is as exact as float32, inside a `with` block."""
    return choose_arithmetic("float32", device).active(device)
