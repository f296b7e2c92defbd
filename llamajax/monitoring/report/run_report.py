"""`report.html`: a run, or several beside each other, on one page that needs nothing else.

Made only from files of the workdirs: `config.json`, `metrics.jsonl`, `events.jsonl`, `run.json`,
the black boxes, `samples.jsonl`, and `plan.json` (`plan --json=WORKDIR/plan.json`). The page holds
its style, its script and the numbers as JSON; the script draws everything.
"""

import base64
import contextlib
import hashlib
import html
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamajax.errors import UserError
from llamajax.files import replaced_file
from llamajax.monitoring.events import EVENTS
from llamajax.monitoring.metrics import METRICS
from llamajax.monitoring.paired_difference import describe_comparison
from llamajax.monitoring.report.curves import CELLS
from llamajax.monitoring.report.html_page import html_page, read_part
from llamajax.monitoring.report.run_data import read_run
from llamajax.monitoring.run_facts import write_report_facts

REPORT, COMPARISON = "report.html", "comparison.html"
# Nothing is loaded from elsewhere, and no script runs but ours.
_POLICY = """\
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none';
  script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; form-action 'none'">
"""
# Errors of reading a record that has an unexpected structure.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def write_report(
    *workdirs: Path, output: Path | None = None, price_per_hour: float | None = None
) -> Path:
    """Write the page of one run or of several and return its path.

    output: where; by default `report.html` in the workdir, whose `run.json` is brought up to date
    as well, or `comparison.html` in the first of several. price_per_hour: of one device, in any
    currency; by default what an earlier report of the run was given. Raises UserError where a
    workdir is no directory of a run or cannot be read, or the page cannot be written.
    """
    check_workdirs(workdirs)
    path = output or Path(workdirs[0]) / (COMPARISON if len(workdirs) > 1 else REPORT)
    with replaced_file(path, label=str(path)) as hidden:
        runs = read_runs(workdirs, price_per_hour)
        if output is None and len(runs) == 1:
            write_report_facts(workdirs[0], runs[0]["facts"])
        hidden.write_text(render(runs), "utf-8", "replace")
    return path


def read_runs(workdirs: Sequence[Path], price_per_hour: float | None) -> list[dict[str, Any]]:
    """Return what the page shows of runs.

    `paired` of a run describes how its losses compare with those of the first one. Raises UserError
    where a workdir cannot be read.
    """
    runs = []
    for workdir in workdirs:
        with _readable(workdir):
            runs.append(run := read_run(workdir, cells=CELLS // len(workdirs)))
            if run is not runs[0]:
                run["paired"] = _compared(run, runs[0])
        if price_per_hour is not None:
            run["facts"]["price_per_hour"] = price_per_hour
    return runs


def _compared(run: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    names = [run["name"], first["name"]]
    if names[0] == names[1]:
        names = [run["workdir"], first["workdir"]]
    return describe_comparison(run["workdir"], first["workdir"], names=names)


@contextlib.contextmanager
def _readable(workdir: Path) -> Iterator[None]:
    """Turn what the files of a run may raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"--workdir={workdir} cannot be read: a record in its files is not as `train` writes "
            f"it ({cause}); remove that line of {EVENTS} or {METRICS}"
        ) from error
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be read: {error}") from None


def check_workdirs(workdirs: Sequence[Path]) -> None:
    """Raise UserError where one of them is no directory of a run."""
    for workdir in map(Path, workdirs):
        if not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is not a directory; give the --workdir of a run")
        if not any((workdir / name).is_file() for name in (METRICS, "config.json")):
            raise UserError(
                f"--workdir={workdir} holds no run: neither {METRICS} nor config.json is there"
            )


def render(runs: Sequence[dict[str, Any]], *, version: str = "") -> str:
    """Return the page of what `read_runs` says. version: of a page that is served."""
    price = runs[0]["facts"].get("price_per_hour")
    data = {"runs": runs, "price_per_hour": price, "written_s": time.time(), "version": version}
    # `<` as an escape: no text in the data can end the element or begin another one.
    text = json.dumps(_plain(data), separators=(",", ":")).replace("<", "\\u003c")
    script = "".join(map(read_part, ("charts.js", "page.js", "sections.js")))
    said = "; ".join(f"{run['name']}: {', '.join(run['verdict']['said'])}" for run in runs)
    body = (
        f"<noscript><p>{html.escape(said)}. The curves of this page need JavaScript.</p>"
        f'</noscript>\n<script type="application/json" id="data">{text}</script>\n'
        f"<script>{script}</script>"
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = " | ".join(run["name"] for run in runs)
    return html_page(title, body, head=_POLICY.format(digest=digest))


def _plain(value: Any) -> Any:
    """Return a value as strict JSON has it: what is not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
