"""Pretrain or finetune a Llama, or continue where the same command stopped.

Example:
  python -m llamajax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m llamajax.train --config=configs/quickstart.py --workdir=runs/short \\
      --config.train.steps=50
  python -m llamajax.train --config=quickstart --workdir=runs/quickstart --dry_run
"""

import gc
import os
import time
from pathlib import Path

from llamajax.backends import exit_with_launcher, with_huge_pages
from llamajax.training.safety.shutdown import Shutdown
from llamajax.verbs import run_verb


def main(argv: list[str]) -> int:
    """Return an ExitCode: finished, stopped by a signal after saving, or by a guard."""
    shutdown = Shutdown().install()  # before anything slow, so that no signal is lost
    exit_with_launcher()
    # Not before `with_huge_pages`, which would have it imported twice.
    from llamajax.config import TrainFlags, parse_command_line

    flags = parse_command_line(argv, TrainFlags, verb="train", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    if flags.dry_run:
        from llamajax.training.messages import dry_run

        for line in dry_run(flags.config, workdir=Path(flags.workdir), overrides=flags.overrides):
            print(line)
        return 0
    hooks = []
    if flags.config.monitoring.profile_steps:
        from llamajax.planning.profile_hook import ProfileHook

        hooks.append(ProfileHook)
    from llamajax.training.run import train

    return train(
        flags.config,
        workdir=Path(flags.workdir),
        shutdown=shutdown,
        began_s=_process_start_s(),
        config_file=flags.config_file,
        more_hooks=hooks,
    )


def _process_start_s() -> float:
    """Return when this process began, on the clock of `time.monotonic`."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s


if __name__ == "__main__":
    with_huge_pages()
    gc.disable()  # what a start makes stays; the loop turns it on again behind its first step
    run_verb(main)
