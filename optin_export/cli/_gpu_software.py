"""Which NVIDIA software goes with which GPU and driver, for `doctor`.

From NVIDIA's pages: CUDA's release notes (oldest driver of a major version), TensorRT's and TensorRT for RTX's support
matrices (compute capabilities), and Triton's release notes (CUDA of a release).
"""

from __future__ import annotations

import re

from optin_export.ship.images import IMAGE

#: CUDA major version -> the oldest driver that runs its libraries.
DRIVERS = {13: 580, 12: 525}
#: The first Triton release with CUDA 13.
TRITON_CUDA_13 = "25.08"
#: The oldest compute capability of TensorRT 10.9 and later.
OLDEST = (7, 5)
#: Those of TensorRT for RTX 1.7.
RTX = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))

RULES = (
    "TensorRT: GPUs from compute capability 7.5; TensorRT for RTX: 7.5 (without fp32), 8.x and 12.x; CUDA 13 (Triton "
    f"images from {TRITON_CUDA_13}): driver {DRIVERS[13]} or later; CUDA 12 (Triton images before): {DRIVERS[12]} or "
    "later"
)


def advice(name: str, driver: str | None) -> tuple[bool, str, str | None]:
    """Whether a GPU can run TensorRT, what goes with it, and what to change if something is too old.

    name: as `engines.gpu_name` gives it, e.g. 'NVIDIA L4 (sm89)'. driver: its version, e.g. '550.54.15', if known.
    """
    found = re.search(r"\(sm(\d+)(\d)\)", name)
    if found is None:
        return True, RULES, None
    capability = int(found[1]), int(found[2])
    shown = ".".join(map(str, capability))
    if capability < OLDEST:
        why = f"compute capability {shown} is too old for TensorRT 10.9 and later, which begin with 7.5"
        return False, why, "use engine: onnxruntime or torch on this GPU"
    rtx = "TensorRT for RTX runs here too" if capability in RTX else f"TensorRT for RTX does not support {shown}"
    major = None if driver is None else int(driver.partition(".")[0])
    if major is None:
        return True, f"compute capability {shown}: TensorRT 10.9 or later; {rtx}. {RULES}", None
    if major < DRIVERS[12]:
        why = f"driver {driver} is too old for the CUDA libraries of TensorRT 10.9 and later"
        return False, why, f"install driver {DRIVERS[12]} (CUDA 12) or {DRIVERS[13]} (CUDA 13) or later"
    if major < DRIVERS[13]:
        fits = (
            f"driver {driver}: packages for CUDA 12 (tensorrt-cu12, torch for cu12x) and {IMAGE} before "
            f"{TRITON_CUDA_13}; CUDA 13 needs driver {DRIVERS[13]}"
        )
    else:
        fits = f"driver {driver}: packages for CUDA 13 or 12, and {IMAGE} of every release"
    return True, f"compute capability {shown}: TensorRT 10.9 or later; {rtx}. {fits}", None
