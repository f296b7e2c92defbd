"""`prepare` on Apache Beam: its tasks are the elements of a pipeline, which any runner executes.

Tasks read the input and write to OUTPUT.parts themselves. So the runner's workers see both under
the same paths as this machine, and have this package installed.
"""

import dataclasses
from typing import Any

from llamajax.corpus import tasks
from llamajax.corpus.preparation import PrepareSettings, ReportProgress, check_input
from llamajax.errors import UserError, combine

_REFUSAL = ".refusal.txt"


def prepare_on_beam(
    settings: PrepareSettings, *, num_tasks: int | None, options: str, progress: ReportProgress
) -> dict[str, Any]:
    """Write the output directory by a pipeline and return its manifest, as `preparation.prepare`.

    num_tasks: None for one a file. options: of the pipeline, as `runner=FlinkRunner,parallelism=8`;
    empty for Beam's own local runner. Raises UserError if Beam is missing, or a task raised one.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner=beam needs Apache Beam: pip install 'llamajax[beam]' (or apache-beam)"
        ) from None
    files, _ = check_input(settings)
    count = len(files) if num_tasks is None else num_tasks
    tasks.find_or_train_tokenizer(settings, files, progress)
    one = dataclasses.replace(settings, workers=1)  # the runner starts the processes
    flags = [f"--{part.strip().removeprefix('--')}" for part in options.split(",") if part.strip()]
    with beam.Pipeline(options=PipelineOptions(flags or ["--runner=DirectRunner"])) as pipeline:
        indices = pipeline | "tasks" >> beam.Create(range(count)) | beam.Reshuffle()
        _ = indices | "tokenize" >> beam.Map(_run, settings=one, num_tasks=count)
    refusals = sorted(tasks.parts_of(settings.output).glob(f"*{_REFUSAL}"))
    if refusals:
        problems = [file.read_text(encoding="utf-8") for file in refusals]
        for file in refusals:
            file.unlink()
        raise combine(problems, title="tasks of the pipeline were refused:")
    return tasks.merge(settings, num_tasks=count, progress=progress)


def _run(index: int, *, settings: PrepareSettings, num_tasks: int) -> None:
    """Run one task on some worker. A UserError goes into a file: Beam would retry a raised one."""
    try:
        tasks.run_task(settings, index=index, num_tasks=num_tasks, progress=lambda *_: None)
    except UserError as error:
        file = tasks.parts_of(settings.output) / f"{index:05d}{_REFUSAL}"
        file.write_text(str(error), encoding="utf-8")
