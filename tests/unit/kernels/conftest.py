"""Triton kernels run in its interpreter here; the variable is read when triton is first imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
