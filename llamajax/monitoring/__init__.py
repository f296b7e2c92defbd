"""The record of a run: metrics and events on disk, progress on the terminal, times, a report."""

from llamajax.monitoring.events import EventLog, load_events
from llamajax.monitoring.metrics import MetricsWriter, load_metrics
from llamajax.monitoring.progress import Progress
from llamajax.monitoring.report.run_report import write_report
from llamajax.monitoring.run_facts import read_run_facts, write_run_facts
from llamajax.monitoring.timing import StepTimer
