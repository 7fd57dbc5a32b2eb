"""Pipeline parallelism: schedules as data, packed into ticks that one program executes."""

from .schedule import SCHEDULES, Kind, Operation, Orders, Schedule, orders
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
    "Table",
    "make_table",
    "orders",
    "validate",
]
