"""`model.dtype` in torch's words.

What is not covered: what DeepSpeed keeps in fp32 beside it.
"""

from collections.abc import Mapping
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def multiplies_bf16(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether this CPU has bf16 units; True where torch cannot say.

    Args:
        capabilities: `torch.cpu.get_capabilities()`; None: of this CPU.
    """
    if capabilities is None:
        capabilities = getattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})()
    return any(has for name, has in capabilities.items() if name.endswith("bf16"))
