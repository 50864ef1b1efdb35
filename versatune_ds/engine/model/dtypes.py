"""`model.dtype` in torch's words.

What is not covered: what DeepSpeed keeps in fp32 beside it.
"""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
