"""What NVIDIA GPUs have used, read off their counters (NVML, which comes with the driver). No torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

LIBRARY = "libnvidia-ml.so.1"
SUCCESS = 0


def energy_counter(uuids: Sequence[str]) -> Callable[[], float] | None:
    """Reads the joules that GPUs have used together since their driver was loaded; None where a GPU has no such counter, or it
    can't be read.

    Args:
        uuids: of the GPUs, as `torch.cuda.get_device_properties` has them.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handles = [ctypes.c_void_p() for _ in uuids]
    if not handles or library.nvmlInit_v2() != SUCCESS:
        return None
    for uuid, handle in zip(uuids, handles, strict=True):
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        if library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)) != SUCCESS:
            return None
    last = 0.0

    def read() -> float:
        nonlocal last
        total = 0.0
        for handle in handles:
            spent = ctypes.c_ulonglong()  # millijoules
            if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(spent)) != SUCCESS:
                return last
            total += spent.value / 1000
        last = total
        return total

    return read if read() else None
