"""SmolLM2-135M from scratch on one accelerator: a whole small model in days.

Hardware: one accelerator of 24 GB or more; more devices share it by themselves.
Command:  python -m llamajax.prepare --input='text/*.parquet' --tokenizer=tokenizer.json \
              --output=data/smollm2
          python -m llamajax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
              --config.data.path=data/smollm2
Batch:    256 sequences of 2048: 524,288 tokens a step, 10 G tokens in all.
Schedule: warm-up, a plateau, and a linear fall over the last fifth (WSD), in the manner of the
          published recipe: continue from any checkpoint of the plateau.
Speed:    unmeasured.
Loss:     unmeasured.
"""

from ml_collections import ConfigDict

from llamajax.config import new_config, preset


def get_config() -> ConfigDict:
    """The run."""
    config = new_config()
    config.model = preset("smollm2-135m")
    config.mesh.fsdp = -1

    config.data.path = "data/smollm2"
    config.data.seq_len = 2048
    config.data.global_batch_size = 256
    config.data.seed = 0

    config.train.steps = 20_000
    config.train.seed = 0
    config.train.dtype = "bfloat16"
    config.train.accumulation_steps = 16
    config.train.remat = "full"
    config.train.eval_every = 500
    config.train.eval_batches = 16

    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = config.train.get_ref("steps") // 20
    config.optim.schedule = "wsd"
    config.optim.decay_steps = config.train.get_ref("steps") // 5
    config.optim.final_learning_rate = 0.0
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 1.0

    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every = 4000
    return config
