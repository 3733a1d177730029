"""Statistics: what curvatures are made from, measured once per expert on its task's data.

dataset     where a task's data are read from, and what their columns are
tasks       an example as model inputs, and the model's own loss
collect     hooks on modules
accumulate  sums and counts
file        the safetensors file with provenance; curvatures made from it
measure     all of it, from an id to a file
"""

from mats_hub.statistics.accumulate import Sums
from mats_hub.statistics.file import STATISTICS_FILE, Provenance, Statistics
from mats_hub.statistics.measure import compute_statistics

__all__ = ["STATISTICS_FILE", "Provenance", "Statistics", "Sums", "compute_statistics"]
