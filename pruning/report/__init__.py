"""Reports, figures and diagnoses of models and runs. The files that plot need matplotlib."""

from pruning.report.diagnose import Diagnosis, doctor
from pruning.report.frontier_html import frontier_page
from pruning.report.predictions import differing_predictions
from pruning.report.tensorboard import TensorBoardWriter

__all__ = ["Diagnosis", "TensorBoardWriter", "differing_predictions", "doctor", "frontier_page"]
