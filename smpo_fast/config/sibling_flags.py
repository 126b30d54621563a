"""Flags that training scripts of this family share, and the settings they stand for here."""

from __future__ import annotations

# Flag names that sibling scripts share, where they mean the same: flag -> key.
ALIASES: dict[str, str] = {
    "pretrained_model_name_or_path": "model.path",
    "pretrained_vae_model_name_or_path": "model.vae",
    "unet_init": "model.unet",
    "revision": "model.revision",
    "variant": "model.variant",
    "train_data_dir": "data.pairs",
    "max_train_samples": "data.max_pairs",
    "resolution": "data.resolution",
    "proportion_empty_prompts": "data.prompt_dropout",
    "output_dir": "run.dir",
    "seed": "run.seed",
    "max_train_steps": "run.steps",
    "checkpointing_steps": "run.save_every",
    "checkpoints_total_limit": "run.keep",
    "train_batch_size": "batch.micro_pairs",
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_steps",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip",
    "beta_dpo": "objective.beta",
    "rank": "lora.rank",
    "lora_alpha": "lora.alpha",
}
SWITCHES: dict[str, str] = {
    "gradient_checkpointing": "model.gradient_checkpointing=true",
    "enable_xformers_memory_efficient_attention": "model.attention=xformers",
    "use_8bit_adam": "optim.name=adamw8bit",
    "use_adafactor": "optim.name=adafactor",
    "use_ema": "optim.ema=0.9999",
    "no_hflip": "data.flip=false",
    "use_dora": "lora.use_dora=true",
}
# Flags that look familiar but mean something else here: said, not guessed.
REFUSED: dict[str, str] = {
    "gradient_accumulation_steps": "accumulation follows from batch.pairs_per_step, batch.micro_pairs and the ranks",
    "scale_lr": "optim.lr is the rate as applied: multiply it yourself (the released recipe's is 1.024e-5)",
    "num_train_epochs": "give run.steps",
    "sdxl": "SDXL or SD1.5 is read from the model",
    "resume_from_checkpoint": "a run continues from its folder: start the same command again",
    "dataset_name": "bring pairs as a parquet file: data.pairs=FILE",
    "mixed_precision": "give model.precision (fp32, bf16, fp16, bf16-autocast)",
}
