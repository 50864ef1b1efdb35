"""Parts of `kernels/benchmarks/fused_loss.py`: cases, candidates, worker, driver, results, picture.

What is not covered: installing anything. This folder is not part of the wheel.
"""
