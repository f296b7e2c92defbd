"""`prepare` on Apache Beam: its tasks are the elements of a pipeline, which any runner executes.

Tasks read the input and write to OUTPUT.parts themselves. So the runner's workers see both under
the same paths as this machine, and have this package installed.
"""

import dataclasses
from typing import Any

from llamajax.corpus import tasks
from llamajax.corpus.preparation import ReportProgress, check_input
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.errors import UserError, combine

_REFUSAL = ".refusal.txt"


def prepare_on_beam(options: PrepareOptions, progress: ReportProgress) -> dict[str, Any]:
    """Write the output directory by a pipeline and return its manifest, as `preparation.prepare`.

    Raises UserError if Beam is missing, or a task raised one.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner=beam needs Apache Beam: pip install 'llamajax[beam]' (or apache-beam)"
        ) from None
    files, _ = check_input(options)
    options = dataclasses.replace(options, num_tasks=options.num_tasks or len(files))
    tasks.find_or_train_tokenizer(options, files, progress)
    one = dataclasses.replace(options, workers=1)  # the runner starts the processes
    given = [part.strip() for part in options.beam_options.split(",")]
    flags = [f"--{part.removeprefix('--')}" for part in given if part]
    with beam.Pipeline(options=PipelineOptions(flags or ["--runner=DirectRunner"])) as pipeline:
        indices = pipeline | "tasks" >> beam.Create(range(options.num_tasks)) | beam.Reshuffle()
        _ = indices | "tokenize" >> beam.Map(_run, options=one)
    refusals = sorted(tasks.parts_of(options).glob(f"*{_REFUSAL}"))
    if refusals:
        problems = [file.read_text(encoding="utf-8") for file in refusals]
        for file in refusals:
            file.unlink()
        raise combine(problems, title="tasks of the pipeline were refused:")
    return tasks.merge(options, progress)


def _run(index: int, *, options: PrepareOptions) -> None:
    """Run one task on some worker. A UserError goes into a file: Beam would retry a raised one."""
    try:
        tasks.run_task(dataclasses.replace(options, task_index=index), lambda *_: None)
    except UserError as error:
        file = tasks.parts_of(options) / f"{index:05d}{_REFUSAL}"
        file.write_text(str(error), encoding="utf-8")
