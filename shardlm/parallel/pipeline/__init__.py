"""Pipeline parallelism: schedules as data, packed into ticks that one program executes."""

from .draw import chart, text_chart
from .schedule import SCHEDULES, Kind, Operation, Orders, Schedule, orders
from .simulate import Simulation, Span, Tick, Times, asynchronous, synchronous
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
    "Span",
    "Table",
    "Tick",
    "Times",
    "asynchronous",
    "chart",
    "make_table",
    "orders",
    "synchronous",
    "text_chart",
    "validate",
]
