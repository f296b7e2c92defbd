"""Where in the data a checkpoint goes on after rollbacks."""

import dataclasses

from llamajax.data import Position
from llamajax.data.position import Segment
from llamajax.training.safety.rollback import Rollback, RollbackLog

BEFORE = Segment(first_step=0, first_sample=0, batch_size=8, seq_len=16, mixture_hash="m")
AFTER = dataclasses.replace(BEFORE, first_step=200, first_sample=2400)


def test_a_rollback_leaves_out_data_only_from_where_it_went_back_to(tmp_path):
    audit = RollbackLog(tmp_path, primary=True)
    segment = dataclasses.asdict(AFTER)
    audit.add(
        Rollback(at_step=300, to_step=200, first_skipped_step=293, segment=segment, reason="x")
    )
    saved = Position((BEFORE,))
    # train.resume_step went back before it: the data of steps 101 to 200 is read again.
    assert audit.position(saved, step=100, rollbacks=0) == saved
    assert audit.position(saved, step=200, rollbacks=0).segments == (BEFORE, AFTER)
    assert audit.position(saved, step=250, rollbacks=1) == saved
