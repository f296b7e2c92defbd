"""The public surface: names that scripts and users rely on."""

from pathlib import Path

from llamajax.config.keys import all_keys
from llamajax.config.values import NOT_SET, show

GOLDEN = Path(__file__).with_name("config_keys.txt")


def test_no_key_changes_unnoticed():
    found = [
        f"{key.path}: {key.type_words}, "
        + ("required" if key.default is NOT_SET else f"default {show(key.default)}")
        for key in all_keys().values()
    ]
    golden = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert found == golden, (
        "the config keys differ from tests/contracts/config_keys.txt. Users' files rely on them: "
        "adding a key is free (add its line); renaming, removing or changing one needs a reason "
        "in LOG.md."
    )


def test_numbers_that_change_the_loss_have_no_default():
    """The exceptions are off by default: z_loss 0 and rope_scaling none change nothing."""
    changing = {
        "model.rope_theta", "model.norm_eps", "model.init_std", "data.seq_len", "data.seed",
        "data.global_batch_size", "optim.learning_rate", "optim.warmup_steps", "optim.schedule",
        "optim.final_learning_rate", "optim.beta1", "optim.beta2", "optim.epsilon",
        "optim.weight_decay", "optim.clip_norm", "train.steps", "train.seed", "train.dtype",
    }  # fmt: skip
    assert {path for path in changing if all_keys()[path].default is not NOT_SET} == set()
