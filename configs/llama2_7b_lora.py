"""Llama-2 7B finetuned on instructions through adapters of rank 16, on one device or a few.

Hardware: one accelerator of 40 GB or more: 13.5 GB of frozen bf16 weights and 0.6 GB of adapters
          with gradients and moments, planned by hand, before activations; or several, as fsdp.
Command:  python -m llamajax.prepare --input=chats.jsonl --format=instructions \
              --chat_template=llama2 --tokenizer=hf/llama2_7b/tokenizer.model --output=data/chats
          python -m llamajax.train --config=configs/llama2_7b_lora.py --workdir=runs/chats_lora
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
    config.mesh.fsdp = -1

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
    config.train.accumulation_steps = 2

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.lora.base_dtype = "bfloat16"

    config.optim.learning_rate = 2e-4
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
