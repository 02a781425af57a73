"""What a person looks at. The files that draw need matplotlib: `html`, `plots`, `pareto` and others."""

from pruning.report.diagnose import Diagnosis, doctor
from pruning.report.predictions import differing_predictions
from pruning.report.tensorboard import TensorBoardWriter

__all__ = ["Diagnosis", "TensorBoardWriter", "differing_predictions", "doctor"]
