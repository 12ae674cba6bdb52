"""The processes of a run: launching, agreement, collectives, failures, their environment, precision, stop signals."""
