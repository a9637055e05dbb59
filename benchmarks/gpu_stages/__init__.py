"""The stages of `gpu.py`, in order of worth."""

from __future__ import annotations

from gpu_stages import checks, cifar10, profiles, sanitizers, speeds
from gpu_stages.stage import Stage

STAGES: tuple[Stage, ...] = (
    checks.BUILD,
    speeds.CEILINGS,
    checks.TESTS,
    speeds.DIFFERENCE,
    speeds.NUCLEAR,
    speeds.LOW_RANK_CONV,
    speeds.STEP,
    sanitizers.SANITIZE,
    profiles.PROFILE,
    cifar10.CIFAR10,
)
