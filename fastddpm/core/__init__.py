"""What everything else builds on: noise, schedules, tables, memory layout, precision, checks of arguments."""
