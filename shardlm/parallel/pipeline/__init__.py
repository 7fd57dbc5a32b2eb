"""Pipeline parallelism: schedules as data, packed into ticks that one program executes."""

from .draw import chart, charts, text_chart
from .schedule import SCHEDULES, Kind, Operation, Orders, Schedule, orders
from .simulate import Simulation, Span, Tick, Times, asynchronous, synchronous
from .stages import Stages, balance, layers_by_cost
from .table import Segment, Table
from .ticks import make_table
from .validate import validate

__all__ = [
    "SCHEDULES",
    "Kind",
    "Operation",
    "Orders",
    "Schedule",
    "Segment",
    "Simulation",
    "Stages",
    "Span",
    "Table",
    "Tick",
    "Times",
    "asynchronous",
    "balance",
    "chart",
    "charts",
    "layers_by_cost",
    "make_table",
    "orders",
    "synchronous",
    "text_chart",
    "validate",
]
