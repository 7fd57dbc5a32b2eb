"""What a step costs, known before it runs: communication, memory, FLOPs and time, and assertions about them."""

from shardlm.inspect import topologies
from shardlm.inspect.bars import draw_communication, draw_memory
from shardlm.inspect.budget import assert_at_most, assert_fits, assert_no, assert_uniform_branches
from shardlm.inspect.flops import Flops, count_flops
from shardlm.inspect.hardware import CATALOGUE, Hardware
from shardlm.inspect.ledger import Entry, Ledger, ledger
from shardlm.inspect.liveness import Peak, peak_memory
from shardlm.inspect.memory import Memory
from shardlm.inspect.pictures import draw_mesh, draw_parameter
from shardlm.inspect.pipeline import PipelineCost
from shardlm.inspect.report import Comparison, Report, compare
from shardlm.inspect.theory import Expected
from shardlm.inspect.timeline import Timeline

__all__ = [
    "CATALOGUE",
    "Comparison",
    "Entry",
    "Expected",
    "Flops",
    "Hardware",
    "Ledger",
    "Memory",
    "Peak",
    "PipelineCost",
    "Report",
    "Timeline",
    "assert_at_most",
    "assert_fits",
    "assert_no",
    "assert_uniform_branches",
    "compare",
    "count_flops",
    "draw_communication",
    "draw_memory",
    "draw_mesh",
    "draw_parameter",
    "ledger",
    "peak_memory",
    "topologies",
]
