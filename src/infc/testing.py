"""What rewrites, plug-ins and their kernels are tested with."""

from .driver.check_rewrite import check_rewrite
from .driver.testing import check_golden, check_kernel

__all__ = ["check_golden", "check_kernel", "check_rewrite"]
