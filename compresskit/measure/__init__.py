"""What a model costs and what it is worth: one record for each measurement. No torch at import."""

from __future__ import annotations

from compresskit.measure.record import Record, read_records, write_records
from compresskit.measure.suite import MEASUREMENTS, compare_latency, measure

__all__ = ["MEASUREMENTS", "Record", "compare_latency", "measure", "read_records", "write_records"]
