"""HTML reports of runs, comparisons and studies. Only the commands import this folder."""
