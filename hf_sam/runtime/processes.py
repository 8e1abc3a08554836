"""Processes that must not outlive their launcher."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_launcher() -> None:
    """Terminate this process when its launcher (`accelerate launch` or `torchrun`) dies. Linux only.

    A launcher that receives SIGTERM terminates its processes. One that is killed cannot: they would continue to train
    unnoticed, or wait for each other forever.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() == 1:  # the launcher died before the call above
        os.kill(os.getpid(), signal.SIGTERM)
