"""Does a layout compute what one device computes? Run both, compare everything, and explain the first difference."""

from shardlm.verification.result import Verification, VerificationError
from shardlm.verification.run import verify

__all__ = ["Verification", "VerificationError", "verify"]
