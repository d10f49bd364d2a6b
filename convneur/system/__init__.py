"""What a run stands on: processes, machines, accelerators and their libraries."""
