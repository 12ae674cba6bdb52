"""The processes of a run: launching, agreement, collectives, the environment of each, and stop signals."""
