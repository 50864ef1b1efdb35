"""The one error of this package.

What is not covered: errors of torch itself (out of memory, a CUDA device-side assert) pass through.
"""


class KernelError(Exception):
    """Wrong input or wrong use of the fused loss.

    The text says what was found, what is allowed and what to do.
    """
