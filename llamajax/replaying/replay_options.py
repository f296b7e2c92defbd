"""The flags of `replay`; no jax."""

import dataclasses

from llamajax.config import MachineFlags, key


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayOptions(MachineFlags):
    """The step to replay, and where."""

    workdir: str = key(
        "the --workdir of the run; nothing is written there", metavar="DIR", is_path=True
    )
    step: int = key("the step, as the log has it", metavar="N")
    blackbox: str | None = key(
        "a file of blackbox/: the step as it was then, before a rollback; none: as it is now",
        metavar="FILE",
        default=None,
        is_path=True,
    )
    json: bool = key("print what was found as one JSON object on one line", default=False)
