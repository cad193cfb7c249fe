"""The CPU kernels against the speed of memory."""
