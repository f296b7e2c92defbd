"""Llama-2 7B finetuned on instructions, all its weights, on 8 devices.

Hardware: 8 accelerators of 40 GB or more in one node (about 14 GB a device of weights, gradients
          and optimizer state, planned by hand, before activations).
Command:  python -m llamajax.prepare --input=chats.jsonl --format=instructions \
              --chat_template=llama2 --tokenizer=hf/llama2_7b/tokenizer.model --output=data/chats
          python -m llamajax.train --config=configs/llama2_7b_finetune.py --workdir=runs/chats
Start:    hf/llama2_7b, the published weights as a Hugging Face directory.
Speed:    unmeasured.
Loss:     unmeasured; depends on the data, of which answers alone count.
"""

from ml_collections import ConfigDict

from llamajax.config import new_config, preset


def get_config() -> ConfigDict:
    """The run."""
    config = new_config()
    config.model = preset("llama2-7b")
    config.mesh.fsdp = 8

    config.data.path = "data/chats"
    config.data.seq_len = 4096
    config.data.global_batch_size = 16
    config.data.seed = 0

    config.train.init_from = "hf/llama2_7b"
    config.train.steps = 500
    config.train.seed = 0
    config.train.dtype = "bfloat16"
    config.train.remat = "full"
    config.train.eval_every = 100

    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = config.train.get_ref("steps") * 3 // 100
    config.optim.schedule = "cosine"
    config.optim.final_learning_rate = 0.0
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 1.0

    config.checkpoint.every_steps = 100
    config.checkpoint.keep = 2
    return config
