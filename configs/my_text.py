"""Your own text on one accelerator: any preset, sized for hours rather than weeks.

Hardware: one accelerator of 16 GB or more for the default of 32 M parameters (a CPU works, and is
          slow); more devices share it by themselves.
Command:  python -m llamajax.prepare --input='my/*.txt' --tokenizer=train:8192 --output=data/mine
          python -m llamajax.train --config=configs/my_text.py --workdir=runs/mine
          Another architecture as an argument, --config=configs/my_text.py:smollm2-135m, with a
          tokenizer of its vocabulary size (--tokenizer=train:49152), or the size of yours in
          --config.model.vocab_size.
Batch:    64 sequences of at most 1024 tokens: 65,536 tokens a step. Choose --config.train.steps
          so that the text is read no more than about four times.
Speed:    unmeasured.
Loss:     unmeasured; depends on the text.
"""

from ml_collections import ConfigDict

from llamajax.config import new_config, preset


def get_config(name: str = "bench-32m") -> ConfigDict:
    """The run of the preset `name`."""
    config = new_config()
    config.model = preset(name)
    config.mesh.fsdp = -1

    config.data.path = "data/mine"
    config.data.seq_len = min(1024, config.model.max_seq_len)
    config.data.global_batch_size = 64
    config.data.seed = 0

    config.train.steps = 2000
    config.train.seed = 0
    config.train.dtype = "bfloat16"
    config.train.accumulation_steps = 4
    config.train.eval_every = 200

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = config.train.get_ref("steps") // 20
    config.optim.schedule = "cosine"
    config.optim.final_learning_rate = 1e-4
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.checkpoint.every_steps = 200
    return config
